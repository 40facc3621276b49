"""Addresses, held against regular expressions that list every position outright."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery import RuleError, at, unfreeze, where
from surgery.structure.module_tree import Tree
from surgery.structure.path import Step, closest, generalise, match, parse
from tests.models import tiny_vit

MOST = 4  # siblings
NAMES = ["a", "b", "mlp", "0", "1", "11"]

paths = st.lists(
    st.builds(
        lambda name, siblings, share: Step(name, int(share * siblings), siblings),
        st.sampled_from(NAMES),
        st.integers(1, MOST),
        st.floats(0, 1, exclude_max=True),
    ),
    max_size=6,
).map(tuple)

bounds = st.one_of(st.just(""), st.integers(-MOST - 1, MOST + 1).map(str))
slices = st.builds(lambda a, b: f"[{a}:{b}]", bounds, bounds)
strides = st.builds(
    lambda a, b, c: f"[{a}:{b}:{c}]", bounds, bounds, st.sampled_from(["", "1", "2", "-1", "-2"])
)
indices = st.integers(-MOST - 1, MOST + 1).map(lambda i: f"[{i}]")
choices = st.lists(st.sampled_from(NAMES), min_size=2, max_size=3).map(
    lambda names: "{" + ",".join(names) + "}"
)
steps = st.one_of(
    st.sampled_from([*NAMES, "*", "**", "{x}", "{y}"]), indices, slices, strides, choices
)
addresses = st.lists(steps, min_size=1, max_size=5).map(".".join)


def encoded(path: tuple[Step, ...]) -> str:
    return "".join(f"/{s.name}#{s.position}#{s.siblings}" for s in path)


def positions(step: str) -> str:
    """Every (position, siblings) that Python's own indexing gives."""
    listed = []
    for n in range(1, MOST + 1):
        chosen = list(range(n))
        try:
            got = eval(f"chosen{step}", {"chosen": chosen})
        except IndexError:
            continue
        listed += [f"{i}#{n}" for i in ([got] if isinstance(got, int) else got)]
    return f"/[^/#]+#(?:{'|'.join(listed)})" if listed else "(?!)"


def regex(address: str) -> str:
    out, known = "", set()
    for step in re.findall(r"\[[^\]]*\]|[^.]+", address):
        if step == "**":
            out += r"(?:/[^/]+)*?"
        elif step == "*":
            out += r"/[^/]+"
        elif step.startswith("["):
            out += positions(step)
        elif "," in step:
            out += rf"/(?:{step[1:-1].replace(',', '|')})#\d+#\d+"
        elif step.startswith("{"):
            name = step[1:-1]
            out += (rf"/(?P={name})" if name in known else rf"/(?P<{name}>[^/#]+)") + r"#\d+#\d+"
            known.add(name)
        else:
            out += rf"/{step}#\d+#\d+"
    return out


@settings(max_examples=1000, deadline=None)
@given(addresses, paths)
def test_address_matches_and_captures_as_its_regular_expression(address, path):
    found = re.fullmatch(regex(address), encoded(path))
    assert match(address, path) == (None if found is None else found.groupdict())


@settings(max_examples=300, deadline=None)
@given(paths, st.data())
def test_address_made_from_a_path_matches_that_path(path, data):
    """Random addresses seldom match a long path; these always do."""
    written = []
    for s in path:
        forms = [s.name, "*", "**", f"[{s.position}]", f"[{s.position - s.siblings}]"]
        written.append(data.draw(st.sampled_from([*forms, f"[{s.position}:]", f"{{{s.name},z}}"])))
    assert match(".".join(written), path) == {}


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="ab.*{}[]:,-01 ", max_size=12))
def test_any_text_parses_or_is_a_rule_error(text):
    path = (Step("a", 0, 2), Step("b", 1, 2))
    try:
        found = match(text, path)
    except RuleError as error:
        found = error.rule == f'"{text}"' and {}
    assert found is None or isinstance(found, dict)


BAD = ["a..b", ".a", "a.", "***", "a*", "{a", "a}", "[x]", "[", "[]", "{}", "{a,}", "a b", "[1.5]"]
BAD += ["{a.b}", "{a,*}", "[::0]", "[-]", "[-:]", "[1:2:3:4]", "{a,b}c", " "]


@pytest.mark.parametrize("text", BAD)
def test_bad_address_is_a_rule_error_that_shows_it(text):
    with pytest.raises(RuleError) as caught:
        at(text, unfreeze)
    assert f'"{text}"' in caught.value.rule
    assert caught.value.fact.endswith(".")
    assert "[position]" in caught.value.remedy


def found(address: str) -> list[str]:
    return [site.path for site in where(address).find(Tree(tiny_vit(depth=4)))]


@pytest.mark.parametrize(
    ("address", "blocks"),
    [
        ("blocks.[0].mlp", [0]),
        ("blocks.[-1].mlp", [3]),
        ("blocks.[-4].mlp", [0]),
        ("blocks.[4].mlp", []),
        ("blocks.[-5].mlp", []),
        ("blocks.[:-3].mlp", [0]),
        ("blocks.[-2:].mlp", [2, 3]),
        ("blocks.[-9:].mlp", [0, 1, 2, 3]),
        ("blocks.[9:].mlp", []),
        ("blocks.[1:3].mlp", [1, 2]),
        ("blocks.[::2].mlp", [0, 2]),
        ("blocks.[::-2].mlp", [1, 3]),
        ("blocks.{1,3}.mlp", [1, 3]),
        ("blocks.2.mlp", [2]),
    ],
)
def test_positions_have_the_meaning_of_python(address, blocks):
    assert found(address) == [f"blocks.{i}.mlp" for i in blocks]


def test_the_empty_address_is_the_model_itself():
    assert found("") == [""]


def test_an_address_must_match_the_whole_path():
    assert found("blocks.0") == ["blocks.0"]
    assert found("mlp") == []
    assert found("locks.0") == []


def test_double_star_is_any_number_of_steps_none_included():
    path = tuple(Step(name, 0, 1) for name in "abc")
    assert match("**.a.**.b.**.c.**", path) == {}
    assert match("a.**.c", path) == {}
    assert match("a.b.**.b.c", path) is None


def test_one_name_captured_twice_must_agree():
    twice = (Step("1", 0, 1), Step("x", 0, 1), Step("1", 0, 1))
    assert match("{i}.x.{i}", twice) == {"i": "1"}
    assert match("{i}.x.{i}", (*twice[:2], Step("2", 0, 1))) is None


def test_captures_backtrack_to_where_they_agree():
    path = tuple(Step(name, 0, 1) for name in ("a", "b", "c", "b"))
    assert match("**.{x}.*.{x}", path) == {"x": "b"}
    assert match("**.{x}.**.{x}.**", path) == {"x": "b"}


def test_captures_reach_the_site():
    sites = where("blocks.{i}.{what}").find(Tree(tiny_vit()))
    assert {"i": "2", "what": "mlp"} in sites.values()
    assert all(set(captured) == {"i", "what"} for captured in sites.values())


def test_absent_children_take_no_position():
    model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU())
    model._modules["0"] = None
    assert [s.path for s in where("[0]").find(Tree(model))] == ["1"]


def test_an_address_is_parsed_once():
    assert parse("blocks.[1:].mlp") is parse("blocks.[1:].mlp")


@given(st.lists(st.sampled_from(NAMES), max_size=5))
def test_generalise_stars_numbers_alone(names):
    general = generalise(".".join(names))
    assert general == ".".join("*" if name.isdigit() else name for name in names)


@given(st.lists(st.lists(st.sampled_from(NAMES), min_size=1).map(".".join), min_size=1), st.data())
def test_nearest_addresses_exist_with_their_counts(known, data):
    for address, count in closest(data.draw(addresses), known):
        assert count == sum(generalise(path) == address for path in known) > 0


def test_nearest_of_a_slip_of_one_letter_is_what_was_meant():
    paths = [site.path for site in Tree(tiny_vit()).sites]
    assert closest("block.*.mlp", paths)[0] == ("blocks.*.mlp", 3)
    assert closest("blocks.*.atn.qkv", paths)[0] == ("blocks.*.attn.qkv", 3)
    assert closest("hed", paths)[0] == ("head", 1)


# the nearest addresses, in order

PATHS = ["blocks.0.mlp", "blocks.1.mlp", "blocks.0.attn", "blocks.1.attn", "head", "stem.mlp"]
NEAREST = [
    ("blocks.*.mpl", [], [("blocks.*.mlp", 2), ("blocks.*.attn", 2)]),  # likeness
    ("blocks.*.x", [], [("blocks.*.attn", 2), ("blocks.*.mlp", 2)]),  # alike: by the alphabet
    ("blocks.*.x", ["blocks.*.mlp"], [("blocks.*.mlp", 2), ("blocks.*.attn", 2)]),  # preferred
    ("blocks.*.x", ["q", "blocks.*.mlp", "blocks.*.attn"], [("blocks.*.mlp", 2)]),  # the first
    ("hed", [], [("head", 1)]),
    ("mlp", [], [("head", 1)]),  # an address is a whole path: nothing is alike
    ("**.mlp", [], [("stem.mlp", 1), ("blocks.*.mlp", 2)]),  # as alike: the shorter
    ("**.attn", [], [("blocks.*.attn", 2)]),
    ("stem.**", [], [("stem.mlp", 1)]),
    ("blocks.7.mlp", [], [("blocks.*.mlp", 2)]),
]


@pytest.mark.parametrize(("asked", "preferred", "near"), NEAREST)
def test_nearest_addresses_come_in_order(asked, preferred, near):
    assert closest(asked, PATHS, preferred)[: len(near)] == near


def test_as_many_nearest_addresses_as_asked_for():
    assert len(closest("blocks.*.mlp", PATHS)) == 2
    assert len(closest("blocks.*.mlp", PATHS, most=3)) == 3
    assert closest("x", ["", "a.0.b", "a.1.b"], most=9) == [("a.*.b", 2)]
    assert closest("x", [""]) == []


def test_an_address_that_means_nothing_is_told_by_its_step():
    with pytest.raises(RuleError, match="it has an empty step"):
        parse("blocks..mlp")
    with pytest.raises(RuleError, match=r'the step "\*x" is no address step'):
        parse("blocks.*x.mlp")


def test_what_is_parsed_is_kept_and_cannot_be_changed():
    for matcher in parse("name.*.[0]"):
        with pytest.raises(FrozenInstanceError):
            setattr(matcher, next(iter(vars(matcher))), None)

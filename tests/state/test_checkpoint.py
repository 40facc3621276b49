"""Save and load: one file, bitwise, strict, atomic, and data only."""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import surgery
from surgery import adapter, append, at, ffn, moa, norm, parallel, shared, unfreeze
from surgery.engine.vocabulary import vocabulary
from surgery.rules.expression import decode, encode
from surgery.state import writing
from tests.laws import checks as laws
from tests.laws.checks import ADAPTERX, Toy, plain, raised
from tests.models import images, tiny_vit


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors of a file."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["surgery"]), tensors


def rewrite(path: Path, about: Any, tensors: dict[str, Tensor]) -> None:
    """Write a file as surgery does, with any contents."""
    about = {k: v for k, v in about.items() if k != "hash"} if isinstance(about, dict) else about
    save_file(tensors, path, metadata={"surgery": json.dumps(about)})


def tuned(build: Callable[[], nn.Module] = tiny_vit, rules: Any = ADAPTERX) -> nn.Module:
    model = surgery.apply(build(), rules)
    laws.stir(model)
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A ViT's adapterx_ffn, saved."""
    torch.manual_seed(3)
    return surgery.save(tuned(), tmp_path / "tuned.safetensors")


def same_base() -> nn.Module:
    torch.manual_seed(3)
    return tiny_vit()


def refused(model: nn.Module, path: Path, **options: Any) -> surgery.FileError:
    """The FileError of loading; the model must be as it was, and not operated."""
    before, ours = laws.fingerprint(model), surgery.fingerprint(model)
    error = raised(surgery.FileError, lambda: surgery.load(model, path, **options))
    laws.assert_same(before, laws.fingerprint(model), "a refused load")
    laws.assert_same(ours, surgery.fingerprint(model), "a refused load")
    assert isinstance(error, surgery.FileError)
    assert error.fact
    assert error.remedy
    return error


# round trips -----------------------------------------------------------------------------------


def round_trip(
    build: Callable[[], nn.Module], rules: Any, x: Tensor, path: Path, **options: Any
) -> nn.Module:
    """Train, save, load into a fresh model of the same base: outputs and state bitwise equal."""
    torch.manual_seed(5)
    model = surgery.apply(build(), rules, seed=11)
    laws.train(model, x)
    surgery.save(model, path)
    torch.manual_seed(5)
    fresh = surgery.load(build(), path, **options)
    assert torch.equal(laws.outcome(fresh, x), laws.outcome(model, x))
    a, b = surgery.state_dict(model), surgery.state_dict(fresh)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    return fresh


@pytest.mark.parametrize(
    "rules", ["adapterx_ffn", "adapter", "adaptformer", "linear_probe", "full"]
)
def test_a_named_rule_set_comes_back_bitwise(rules: str, tmp_path: Path) -> None:
    fresh = round_trip(tiny_vit, rules, images(), tmp_path / "x.safetensors")
    flags = {k for k, p in fresh.named_parameters() if p.requires_grad}
    other = surgery.apply(tiny_vit(), rules)
    assert flags == {k for k, p in other.named_parameters() if p.requires_grad}


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Tensor]] = {
    "sequential": (sequential, at(nn.Linear, parallel(adapter(rank=2))), torch.randn(6, 8)),
    "running statistics": (sequential, at(norm, unfreeze), torch.randn(6, 8)),
    "frozen statistics": (sequential, at("0", unfreeze), torch.randn(6, 8)),
    "alias and tie": (Toy, [*laws.FAULTY, at("mlp", unfreeze)], torch.randn(6, 8)),
    "bf16": (
        lambda: tiny_vit().to(torch.bfloat16),
        ADAPTERX,
        images().to(torch.bfloat16),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_comes_back_bitwise(case: str, tmp_path: Path) -> None:
    build, rules, x = CASES[case]
    fresh = round_trip(build, rules, x, tmp_path / "x.safetensors")
    surgery.revert(fresh)
    torch.manual_seed(5)
    laws.assert_same(laws.shape_of(build()), laws.shape_of(fresh), "load, then revert")


def test_running_statistics_travel_only_where_they_changed(tmp_path: Path) -> None:
    model = surgery.apply(sequential(), at("0", unfreeze))
    model.train()(torch.randn(6, 8))  # the norm is frozen
    assert set(surgery.state_dict(model)) == {"base.0.weight", "base.0.bias"}
    live = surgery.apply(sequential(), at("1", unfreeze))
    assert set(surgery.state_dict(live)) == {"base.1.weight", "base.1.bias"}
    live.train()(torch.randn(6, 8))
    assert "base.1.running_mean" in surgery.state_dict(live)


def test_operations_are_saved_and_loaded_by_name(tmp_path: Path) -> None:
    model, x = same_base(), images()
    surgery.apply(model, ADAPTERX, name="first")
    surgery.apply(model, at("blocks.0.attn", append(adapter(rank=2), residual=True)), name="second")
    laws.stir(model)
    paths = [
        surgery.save(model, tmp_path / f"{n}.safetensors", name=n) for n in ("first", "second")
    ]
    fresh = same_base()
    for name, path in zip(("first", "second"), paths, strict=True):
        surgery.load(fresh, path, name=name)
    assert torch.equal(laws.outcome(fresh, x), laws.outcome(model, x))
    told = str(raised(surgery.OperationError, lambda: surgery.save(model, paths[0])))
    assert "first, second" in told


def test_load_keeps_all_random_number_generators(file: Path) -> None:
    model = same_base()
    before = laws.fingerprint(model)
    surgery.load(model, file)
    after = laws.fingerprint(model)
    moved = [mark for mark in before if "random" in mark and before[mark] != after[mark]]
    assert moved == []


def test_balance_is_given_again_at_load(file: Path) -> None:
    model = surgery.load(same_base(), file, balance=0.01)
    model(images())
    assert not surgery.balance_loss(model).requires_grad


def test_a_non_persistent_table_that_grew_is_not_state(tmp_path: Path) -> None:
    from tests.laws.test_laws import Cached

    model = surgery.apply(Cached(), at("one", parallel(plain)))
    model(torch.randn(5, 8))
    assert not any(key.endswith("table") for key in surgery.state_dict(model))


# the file --------------------------------------------------------------------------------------


def test_each_shared_tensor_is_stored_once(file: Path) -> None:
    _, tensors = contents(file)
    assert sum(key.startswith("parts.") for key in tensors) == 6
    assert sum(key.startswith("base.") for key in tensors) == 3 * 2 + 2
    model = tuned()
    assert sum(t.numel() for t in tensors.values()) == sum(
        p.numel() for p in surgery.parameters(model)
    )


def test_a_tied_tensor_is_stored_once(tmp_path: Path) -> None:
    model = surgery.apply(Toy(), at("mlp", unfreeze))
    _, tensors = contents(surgery.save(model, tmp_path / "x.safetensors"))
    assert {k for k in tensors if k.endswith("weight")} == {"base.mlp.0.weight"}


def test_the_file_holds_explicit_values_of_defaults(tmp_path: Path) -> None:
    model = surgery.apply(tiny_vit(), at(ffn, parallel(shared(moa()))))
    about, _ = contents(surgery.save(model, tmp_path / "x.safetensors"))
    kept = about["rules"] if isinstance(about["rules"], str) else json.dumps(about["rules"])
    for word, value in {"experts": 4, "rank": 64, "heads": 3, "top_k": 1, "dropout": 0.0}.items():
        assert f'"{word}": {value}' in kept
    assert '"nn": "ReLU"' in kept


def test_a_changed_default_does_not_change_what_a_file_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = surgery.apply(tiny_vit(), at(ffn, parallel(adapter())))
    path = surgery.save(model, tmp_path / "x.safetensors")
    known = adapter.__signature__
    rank = known.parameters["rank"].replace(default=3)
    others = [rank if p.name == "rank" else p for p in known.parameters.values()]
    monkeypatch.setattr(adapter, "__signature__", known.replace(parameters=others))
    assert dict(adapter().named)["rank"] == 3
    fresh = surgery.load(tiny_vit(), path)
    assert {p.shape for p in surgery.parameters(fresh)} == {
        p.shape for p in surgery.parameters(model)
    }


def test_the_file_is_plain_safetensors_with_json_metadata(file: Path) -> None:
    about, tensors = contents(file)
    assert {"rules", "seed", "sites", "text"} <= set(about)
    assert all(isinstance(t, Tensor) for t in tensors.values())
    assert b"pickle" not in file.read_bytes()


@pytest.mark.parametrize(
    "rule",
    [
        at("blocks.[-4:].mlp", parallel(adapter(rank=16), scale=0.5), times=2),
        at(ffn & ~surgery.inside("blocks.[0]"), parallel(shared(moa(rank=4), by=None, name="a"))),
        at(surgery.nearest(norm, before=ffn) | surgery.head, unfreeze, optional=True),
        at(surgery.span(norm, ffn), parallel(adapter(activation=surgery.QuickGELU))),
        at(nn.Linear & surgery.inside(surgery.attn), append(adapter(), residual=True)),
        at(surgery.holding("**.qkv"), surgery.freeze, unfreeze),
        at(surgery.where(nn.LayerNorm), surgery.prepend(adapter(activation=nn.GELU))),
    ],
    ids=repr,
)
def test_rules_come_back_equal_from_json(rule: surgery.Rule) -> None:
    data = json.loads(json.dumps(encode([rule], vocabulary())))
    (again,) = decode(data, vocabulary())
    assert again == rule
    assert repr(again) == repr(rule)


# atomic ----------------------------------------------------------------------------------------


def test_a_fault_during_save_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = tuned(), tmp_path / "x.safetensors"
    surgery.save(model, path)
    old = path.read_bytes()
    laws.stir(model, seed=2)
    for error in (laws.Fault, KeyboardInterrupt):
        for module, name in ((writing, "save_file"), (os, "replace")):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, failing(error, getattr(module, name)))
                raised(error, lambda: surgery.save(model, path))
            assert path.read_bytes() == old
            assert os.listdir(tmp_path) == ["x.safetensors"]
    surgery.save(model, path)
    assert path.read_bytes() != old


def failing(error: type[BaseException], real: Callable[..., Any]) -> Callable[..., Any]:
    """Does half of the work, then fails."""

    def fail(*args: Any, **kwargs: Any) -> None:
        if real.__name__ == "save_file":
            Path(args[1]).write_bytes(b"half")
        raise error

    return fail


def test_a_fault_at_any_line_of_save_leaves_the_old_file_and_the_model(tmp_path: Path) -> None:
    model, path = (
        surgery.apply(laws.Linears(), at("one", parallel(adapter(rank=1)))),
        tmp_path / "x",
    )
    surgery.save(model, path)
    old, before = path.read_bytes(), laws.fingerprint(model)
    lines = laws.events(lambda: surgery.save(model, path))
    for event in laws.runs(lines):
        wire = laws.Tripwire(event)
        wire.run(lambda: surgery.save(model, path))
        assert path.read_bytes() == old
        assert os.listdir(tmp_path) == ["x"], f"litter after {wire.where}"
    laws.assert_same(before, laws.fingerprint(model), "save")


def test_a_fault_at_any_line_of_load_leaves_the_model(tmp_path: Path) -> None:
    rules = [at("one", parallel(adapter(rank=1))), at("two", unfreeze)]
    path = surgery.save(tuned(laws.Linears, rules), tmp_path / "x.safetensors")
    model = laws.Linears()

    def load() -> None:
        surgery.load(model, path)
        surgery.revert(model)

    load()
    lines = laws.events(lambda: surgery.load(model, path))
    surgery.revert(model)
    laws.faults(model, lambda: surgery.load(model, path), laws.runs(lines))


def test_saving_into_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    error = raised(surgery.FileError, lambda: surgery.save(tuned(), tmp_path / "no" / "x"))
    assert f"there is no folder {tmp_path / 'no'}" in str(error)
    assert os.listdir(tmp_path) == []


def test_a_model_on_meta_cannot_be_saved_and_says_so(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = tiny_vit()
    surgery.apply(model, ADAPTERX)
    raised(surgery.SurgeryError, lambda: surgery.save(model, tmp_path / "x.safetensors"))
    assert os.listdir(tmp_path) == []


# strict ----------------------------------------------------------------------------------------

Change = Callable[[dict[str, Tensor]], object]
FIRST = "parts.shared/moa/24"


def part_key(tensors: dict[str, Tensor]) -> str:
    return next(key for key in sorted(tensors) if key.startswith("parts."))


CHANGES: dict[str, Change] = {
    "a part's key too few": lambda t: t.pop(part_key(t)),
    "a base key too few": lambda t: t.pop("base.head.weight"),
    "a part's key too many": lambda t: t.update({"parts.more": torch.ones(1)}),
    "a frozen base key": lambda t: t.update({"base.blocks.0.attn.qkv.weight": torch.ones(72, 24)}),
    "a key outside": lambda t: t.update({"blocks.0.norm2.weight": torch.ones(24)}),
    "another shape": lambda t: t.update({part_key(t): torch.ones(3, 3)}),
    "another dtype": lambda t: t.update({part_key(t): t[part_key(t)].double()}),
    "no tensors": lambda t: t.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_does_not_fit_is_refused(change: str, file: Path) -> None:
    about, tensors = contents(file)
    CHANGES[change](tensors)
    rewrite(file, about, tensors)
    refused(same_base(), file)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "another depth": lambda: tiny_vit(depth=6),
    "fewer blocks": lambda: tiny_vit(depth=2),
    "another width": lambda: tiny_vit(embed_dim=48),
    "another head": lambda: tiny_vit(num_classes=7),
    "another dtype": lambda: tiny_vit().double(),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_model_is_refused(other: str, file: Path) -> None:
    refused(OTHERS[other](), file)


def test_a_damaged_file_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for bad in (whole[:-5], whole[: len(whole) // 2], b"", b"\x00" * 100, whole[::-1]):
        file.write_bytes(bad)
        refused(same_base(), file)


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"weight": torch.ones(1)}, path)
    assert "load_state_dict" in refused(same_base(), path).remedy
    save_file({"weight": torch.ones(1)}, path, metadata={"surgery": "not json"})
    refused(same_base(), path)
    for about in (None, [], 3, {}, {"format": "99"}, {"format": "1"}):
        rewrite(path, about, {"weight": torch.ones(1)})
        refused(same_base(), path)


def test_no_file_is_refused(tmp_path: Path) -> None:
    refused(same_base(), tmp_path / "none.safetensors")
    refused(same_base(), tmp_path)


def test_a_pickle_is_refused_and_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    torch.save({"a": Bomb()}, path)
    refused(same_base(), path)


class Bomb:
    """Fails as it is unpickled."""

    def __reduce__(self) -> Any:
        return (raised, (KeyError, int))


@pytest.mark.parametrize("key", ["sites", "text", "seed", "rules"])
def test_damaged_metadata_is_refused(key: str, file: Path) -> None:
    about, tensors = contents(file)
    for bad in (None, "{", 3.5, [[]], {"a": 1}):
        rewrite(file, {**about, key: bad}, tensors)
        if key == "seed" and bad == 3.5:
            continue
        refused(same_base(), file)
    rewrite(file, {k: v for k, v in about.items() if k != key}, tensors)
    refused(same_base(), file)


def test_a_model_that_is_operated_already_keeps_its_operation(file: Path) -> None:
    model = surgery.apply(same_base(), "lora")
    before = laws.fingerprint(model)
    raised(surgery.OperationError, lambda: surgery.load(model, file))
    laws.assert_same(before, laws.fingerprint(model), "load")


def test_load_state_dict_is_all_or_nothing() -> None:
    model, other = tuned(), tuned()
    state = {k: t.clone() for k, t in surgery.state_dict(other).items()}
    before = laws.fingerprint(model)
    for change in CHANGES.values():
        bad = dict(state)
        change(bad)
        raised(surgery.FileError, lambda bad=bad: surgery.load_state_dict(model, bad))
        laws.assert_same(before, laws.fingerprint(model), "load_state_dict")
    surgery.load_state_dict(model, state)
    now = surgery.state_dict(model)
    assert all(torch.equal(now[k], t) for k, t in state.items())


# data only -------------------------------------------------------------------------------------

CALLS = [
    "eval",
    "exec",
    "__import__",
    "os.system",
    "open",
    "getattr",
    "words",
    "decode",
    "apply",
    "load",
    "save",
    "__class__",
    "__init__",
    "mro",
    "nn.Linear",
    "Linear",
    "init.zeros_",
    "utils",
    "Module.load_state_dict",
    "__builtins__",
    "__dict__",
    "",
]


def lists_and_calls(name: str) -> list[Any]:
    call = {"word": name, "given": ["echo unsafe"], "named": {}}
    return [
        call,
        {"name": name},
        {"nn": name},
        {"word": "at", "given": ["**", call], "named": {}},
        {"word": "where", "given": [call], "named": {}},
        {"word": "parallel", "given": [call], "named": {}},
        {"word": "adapter", "given": [], "named": {"activation": {"nn": name}}},
    ]


@pytest.mark.parametrize("name", [c for c in CALLS if c != "Linear"])
def test_a_name_outside_the_vocabulary_is_refused(name: str) -> None:
    for data in lists_and_calls(name):
        error = raised(surgery.SurgeryError, lambda data=data: decode(data, vocabulary()))
        assert isinstance(error, surgery.FileError), f"{data}: {error!r}"


def test_functions_of_nn_are_no_module_classes() -> None:
    bad = ["init", "functional", "factory_kwargs", "Buffer", "modules", "parallel"]
    for name in bad:
        raised(surgery.FileError, lambda name=name: decode({"nn": name}, vocabulary()))
    assert decode({"nn": "GELU"}, vocabulary()) is nn.GELU
    assert decode({"nn": "Parameter"}, vocabulary()) is nn.Parameter  # of places that are weights


@pytest.mark.parametrize(
    "data",
    [
        {"word": "ffn", "given": [], "named": {}},
        {"word": "unfreeze", "given": [], "named": {}},
        {"word": "adapter", "given": [], "named": {"bogus": 1}},
        {"word": "adapter", "given": [1, 2, 3, 4], "named": {}},
        {"word": "at", "given": [], "named": {}},
        {"word": "at", "given": ["**"], "named": {}},
        {"word": "at", "given": ["..", {"name": "unfreeze"}], "named": {}},
        {"word": "nearest", "given": ["a"], "named": {}},
        {"word": "at", "given": 3, "named": {}},
        {"word": ["at"], "given": [], "named": {}},
        {"word": "at", "given": [], "named": {"__class__": 1}},
        {"word": "moa", "given": [], "named": {"eval": 1}},
        {"word": "moa", "given": [], "named": {"": 1}},
        {"word": "&", "given": [1, 2], "named": {}},
        {"word": "~", "given": [5], "named": {}},
        {"word": "|", "given": ["a"], "named": {}},
        {"word": "Adapter", "given": [8], "named": {}},
        {"list": 3},
        {"name": ["ffn"]},
        {},
        {"a": 1},
    ],
    ids=repr,
)
def test_ill_formed_rules_in_a_file_are_a_file_error(data: Any, file: Path) -> None:
    about, tensors = contents(file)
    rules = json.dumps({"list": [data]}) if isinstance(about["rules"], str) else {"list": [data]}
    rewrite(file, {**about, "rules": rules}, tensors)
    refused(same_base(), file)


def test_rules_nested_without_end_are_a_file_error(file: Path) -> None:
    about, tensors = contents(file)
    deep = '{"list": [' * 5000 + "]}" * 5000
    rewrite(file, {**about, "rules": deep}, tensors)
    refused(same_base(), file)


def test_decoding_calls_words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    spies = {
        name: (lambda *a, name=name, **k: called.append(name))
        for name in vocabulary()
        if name != "ffn"
    }
    data = encode([at(surgery.inside("a"), parallel(adapter(rank=3)))], vocabulary())
    decode(data, spies)
    assert called == ["inside", "adapter", "parallel", "at"]


def test_no_word_of_rules_acts_on_anything() -> None:
    harmless = {"parallel", "append", "prepend", "replace", "freeze", "unfreeze", "shared", "where"}
    harmless |= {"inside", "holding", "nearest", "span", "at", "adapter", "moa", "QuickGELU"}
    harmless |= {"&", "|", "~", "[]", "insert", "token", "until", "fused", "fc1", "fc2"}
    harmless |= {  # each makes a module, and does nothing else
        "adalora", "adapter_plus", "arc", "back", "bank", "bases", "binary_adapter",
        "binary_lora", "boft", "c3a", "climb", "coefficients", "combined", "compacter",
        "convpass", "deft", "delora", "domains", "dylora", "dynamic_adapter", "dynamic_moa",
        "elastic_adapter", "elastic_lora", "elastic_prompt", "fact_tk", "fact_tt", "fourierft",
        "frozen", "gated_prompt", "glora", "goft", "gralora", "hira", "hra", "instance_prompt",
        "kadaptation", "kasa", "krona", "ladder", "lily", "lily_ups", "loha", "lokr", "lora",
        "loreft", "magnitude", "mica", "miss", "mlae", "molora", "mona", "oft", "olora", "peanut",
        "phm_rule", "pissa", "places", "pool", "prefix", "prefix_features", "projection",
        "prolora", "prompt", "prompt_generator", "psoft", "randlora", "repadapter", "rescale",
        "reversible", "rlrr", "road", "rows", "salient", "scale_shift", "scaled", "shift",
        "skill_lora", "slow_factors", "small_adapter", "snell", "sparse", "sparse_experts",
        "spectral_adapter", "spectral_basis", "tied", "tied_lora", "tiny_vector", "tinylora",
        "tk_factors", "toplora", "track", "tt_factors", "unilora", "vblora", "vera", "vida",
        "waveft",
    }  # fmt: skip
    harmless |= {"bypass", "centre_distances", "fusion", "geometry_adapter", "heard", "mixer"}
    harmless |= {"local_attention"}
    harmless |= {"embed", "block", "norm", "attn", "qkv", "proj", "ffn", "head"}
    harmless |= {"query", "key", "value", "weight", "side", "attend"}
    assert set(vocabulary()) == harmless, "a new word: may a file call it? then add it here"


# rules with code -------------------------------------------------------------------------------


def coded() -> list[surgery.Rule]:
    return [at("one", append(plain)), at(surgery.where(lambda s: s.path == "two"), unfreeze)]


def test_rules_with_code_save_and_need_rules_to_load(tmp_path: Path) -> None:
    model, x = laws.Linears(), torch.randn(2, 8)
    base = copy.deepcopy(model)
    surgery.apply(model, coded())
    laws.stir(model)
    path = surgery.save(model, tmp_path / "x.safetensors")
    error = refused(base, path)
    assert "rules=" in error.remedy
    assert "plain" in error.fact
    surgery.load(base, path, rules=coded())
    assert torch.equal(laws.outcome(base, x), laws.outcome(model, x))


def test_wrong_rules_are_refused(tmp_path: Path) -> None:
    rules = [at("one", append(plain)), at("two", unfreeze)]
    path = surgery.save(tuned(laws.Linears, rules), tmp_path / "x.safetensors")
    wrong = [
        [at("two", append(plain)), at("two", unfreeze)],
        [at("one", append(adapter(rank=1))), at("two", unfreeze)],
        [at("one", append(plain))],
        [at("one", append(plain)), at("one", unfreeze)],
        [*rules, at("one", unfreeze)],
        [at("one", parallel(plain)), at("two", unfreeze)],
    ]
    for each in wrong:
        refused(laws.Linears(), path, rules=each)
    surgery.load(laws.Linears(), path, rules=rules)


def test_rules_that_were_given_and_fit_may_be_written_otherwise(tmp_path: Path) -> None:
    path = surgery.save(tuned(laws.Linears, at("one", append(plain))), tmp_path / "x.safetensors")
    surgery.load(laws.Linears(), path, rules=at("[0]", append(plain)))


class Queue(nn.Module):
    """Buffers of several dtypes and shapes, that a forward in training changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.register_buffer("labels", torch.zeros(16, dtype=torch.long))
        self.register_buffer("at", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("seen", torch.zeros(2, 8, dtype=torch.bool))
        self.register_buffer("calls", torch.zeros(3, dtype=torch.uint8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.labels[int(self.at)] = 7
            self.at += 1
            self.seen[:, int(self.at)] = True
            self.calls += 1
        out: torch.Tensor = self.first(x)
        return out


def test_buffers_of_any_dtype_and_shape_are_saved_and_brought_back(tmp_path: Path) -> None:
    model, x = surgery.apply(Queue(), at("first", surgery.lora(rank=2))).train(), torch.ones(1, 8)
    model(x)
    now = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with surgery.disabled(model):
        assert not any(buffer.any() for buffer in model.buffers())
        model(x)
    assert all(torch.equal(now[name], buffer) for name, buffer in model.named_buffers())
    again = surgery.load(Queue(), surgery.save(model, tmp_path / "a.safetensors"))
    for name in ("labels", "at", "seen"):
        assert torch.equal(now[name], getattr(again, name))
    surgery.revert(model)
    assert not any(buffer.any() for buffer in model.buffers())


# wrapped since -----------------------------------------------------------------------------------


def _compiled(block: nn.Module) -> nn.Module:
    return torch.compile(block, backend="eager")


def _checkpointed(block: nn.Module) -> nn.Module:
    wrappers = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
    return importlib.import_module(wrappers).checkpoint_wrapper(block)


class Scaled(nn.Module):
    """A wrapper that has a tensor of a name that the inner module has, too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.weight = inner, nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x) * self.weight
        return out


@pytest.mark.parametrize("wrap", [_compiled, _checkpointed])
def test_a_file_of_a_model_whose_blocks_were_wrapped_fits_the_plain_one(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    model = surgery.apply(tiny_vit(), "adapterx_ffn")
    plain = [*surgery.state_dict(model)]
    model.blocks[0] = wrap(model.blocks[0])
    laws.stir(model)
    path = surgery.save(model, tmp_path / "a.safetensors")
    assert [*surgery.state_dict(model)] == plain
    again = surgery.load(tiny_vit(), path)
    now = surgery.state_dict(again)
    assert all(torch.equal(now[key], t) for key, t in surgery.state_dict(model).items())
    surgery.load_state_dict(model, now)


def test_modules_that_changed_places_are_saved_by_their_new_ones() -> None:
    model = surgery.apply(nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), at("*", unfreeze))
    first, second = model[0].weight, model[1].weight
    model[0], model[1] = model[1], model[0]
    state = surgery.state_dict(model)
    assert torch.equal(state["base.0.weight"], second)
    assert torch.equal(state["base.1.weight"], first)


def test_no_two_tensors_get_one_key() -> None:
    model = surgery.apply(nn.Sequential(nn.Linear(2, 2)), at("0", unfreeze))
    model[0] = Scaled(model[0])
    model[0].weight.requires_grad_(True)
    assert {*surgery.state_dict(model)} == {
        "base.0.weight", "base.0.inner.weight", "base.0.inner.bias"
    }  # fmt: skip


class Transposed(nn.Module):
    """Reads the weight of a module that it calls, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.b(self.a(x).relu()) @ self.a.weight
        return out


def test_what_a_forward_showed_of_weights_is_in_the_file(tmp_path: Path) -> None:
    model = surgery.apply(Transposed(), at("a", surgery.lora(rank=2)), example=torch.ones(3, 8))
    path = surgery.save(model, tmp_path / "a.safetensors")
    refused = raised(surgery.OperationError, lambda: surgery.merge(model))
    again = surgery.load(Transposed(), path)
    assert str(raised(surgery.OperationError, lambda: surgery.merge(again))) == str(refused)
    about, tensors = contents(path)
    rewrite(path, {**about, "read_besides": [1]}, tensors)
    raised(surgery.FileError, lambda: surgery.load(Transposed(), path))

"""What a forward decided is kept in the file: loading needs no example, and finds nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery import (
    FileError,
    MatchError,
    adapter,
    append,
    at,
    attn,
    ffn,
    head,
    insert,
    lora,
    nearest,
    norm,
    parallel,
    query,
    shared,
    span,
    unfreeze,
    value,
    where,
)
from surgery.parts import prompt_generator
from tests.laws.test_backbones import BACKBONES, SETS
from tests.models import encoder, hf_vit, images

ADAPTER = parallel(adapter(rank=2))


class PostNorm(nn.Sequential):
    """Norms after each sum, as in the first transformer: the norm before an FFN is the first."""

    def __init__(self, layers: int = 2) -> None:
        layer = nn.TransformerEncoderLayer(24, 3, 48, 0.0, batch_first=True)
        inner = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        super().__init__(inner, nn.Linear(24, 5))


def build(kind: type = PostNorm, **given: int) -> nn.Module:
    torch.manual_seed(0)
    return kind(**given).eval()


X = torch.randn(2, 4, 24)


def kept(path: Path, rules: surgery.Rules, make: Any = build, x: Any = X) -> nn.Module:
    """A model operated with an example, stirred, and saved."""
    model = surgery.apply(make(), rules, example=x)
    with torch.no_grad():
        for p in surgery.parameters(model):
            p += 0.1 * torch.randn_like(p)
    surgery.save(model, path)
    return model


def paths(done: Any) -> list[list[str]]:
    """The sites of each rule of a plan, or of an operation."""
    return [row["paths"] for row in done.record["rows"]]


def changed(path: Path, **about: Any) -> None:
    """The file with other words about itself."""
    with safe_open(path, "pt") as file:
        was = json.loads(file.metadata()["surgery"])
    save_file(load_file(path), path, metadata={"surgery": json.dumps({**was, **about})})


RULES: dict[str, Any] = {
    "adaptformer": "adaptformer",
    "adapterx_ffn": "adapterx_ffn",
    "span": at(span(norm, ffn), ADAPTER),
    "norm of attention": at(nearest(norm, before=attn), unfreeze),
    "both": at(nearest(norm, before=attn) | nearest(norm, before=ffn), unfreeze),
    "by address": at(nearest("**.{norm1,norm2}", before=ffn), append(adapter(rank=2))),
    "captured": at(
        where("*.layers.{i}.*") & nearest(norm, before=ffn),
        append(shared(adapter(rank=2), by="i"), residual=True),
    ),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_file_made_with_an_example_loads_without_one(rules, tmp_path):
    path = tmp_path / "x.safetensors"
    model = kept(path, rules)
    for example in (None, X):
        again = surgery.load(build(), path, example=example)
        assert torch.equal(again(X), model(X))
        surgery.save(again, path)  # what was decided is kept on
    assert paths(surgery.plan(build(), rules)) != paths(surgery.plan(build(), rules, example=X))


@pytest.mark.parametrize("rules", [at(query | value, lora(rank=2)), at(value, unfreeze)], ids=str)
def test_queries_and_values_need_no_example_again(rules, tmp_path):
    def make() -> nn.Module:
        return build(lambda: hf_vit(layers=2))

    x = {"pixel_values": images()}
    model = kept(tmp_path / "x.safetensors", rules, make, x)
    again = surgery.load(make(), tmp_path / "x.safetensors")
    assert torch.equal(again(**x).logits, model(**x).logits)


def test_without_an_example_a_guess_is_a_note():
    note = "note: nearest(norm, before=ffn): by the order of modules; example=inputs runs"
    assert note in str(surgery.plan(build(), "adapterx_ffn"))
    assert note in str(surgery.report(surgery.apply(build(), "adapterx_ffn")))
    assert "order of modules" not in str(surgery.plan(build(), "adapterx_ffn", example=X))
    assert "order of modules" not in str(surgery.plan(build(), at(ffn, ADAPTER)))
    assert "order of modules" not in str(
        surgery.plan(build(), at(nearest(norm, after=ffn), unfreeze))
    )


def test_what_the_file_knew_is_a_note_and_no_guess(tmp_path):
    kept(tmp_path / "x.safetensors", "adapterx_ffn")
    text = str(surgery.report(surgery.load(build(), tmp_path / "x.safetensors")))
    assert "as a forward told when the file was made" in text
    assert "order of modules" not in text


def test_a_file_made_without_an_example_guesses_as_it_did(tmp_path):
    model = surgery.apply(build(), "adapterx_ffn")
    surgery.save(model, tmp_path / "x.safetensors")
    assert torch.equal(surgery.load(build(), tmp_path / "x.safetensors")(X), model(X))


@pytest.mark.parametrize("rules", [RULES["span"], RULES["norm of attention"]])
def test_another_model_is_refused_and_left_as_it_was(rules, tmp_path):
    """A deeper one has all the places of the file, and is another model."""
    kept(tmp_path / "x.safetensors", rules)
    for layers in (1, 3):
        model = build(layers=layers)
        before = surgery.fingerprint(model)
        with pytest.raises(FileError, match="example=inputs"):
            surgery.load(model, tmp_path / "x.safetensors")
        assert surgery.fingerprint(model) == before


def test_another_rule_does_not_take_the_places_of_the_file(tmp_path):
    kept(tmp_path / "x.safetensors", RULES["span"])
    for rule in (at(span(norm, attn), ADAPTER), at(ffn, ADAPTER)):
        model = build()
        with pytest.raises(FileError, match="matched 2 sites when the file was made"):
            surgery.load(model, tmp_path / "x.safetensors", rules=rule)
        assert not hasattr(model, "surgery")


def test_what_is_heard_by_a_forward_needs_the_example_again(tmp_path):
    """The file has the places of rules, not what each part there hears."""
    heard = nearest(norm, before=ffn)
    rules = [
        at(heard, append(adapter(rank=2), residual=True)),
        at("0.layers.[1]", insert(prompt_generator(heads=2), hears=heard)),
    ]
    model = kept(tmp_path / "x.safetensors", rules)
    fresh = build()
    with pytest.raises(FileError, match="example=inputs"):
        surgery.load(fresh, tmp_path / "x.safetensors")
    assert not hasattr(fresh, "surgery")
    again = surgery.load(fresh, tmp_path / "x.safetensors", example=X)
    assert torch.equal(again(X), model(X))


def test_code_in_a_rule_is_given_again_and_its_places_are_known(tmp_path):
    def rule() -> surgery.Rule:
        return at(span(norm, ffn), parallel(lambda site: nn.Linear(site.width, site.out)))

    model = kept(tmp_path / "x.safetensors", rule())
    again = surgery.load(build(), tmp_path / "x.safetensors", rules=rule())
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize(
    "sites",
    [
        [["0.layers.0.nowhere", "0.layers.1.nowhere"]],
        [["0.layers.0.(norm1 to nowhere)"]],
        [[]],
        [["0.layers.0.(norm1 to linear2)"]],
        [["1", "1"]],
    ],
)
def test_places_changed_by_hand_are_refused(sites, tmp_path):
    """What does not exist is no place; what exists must hold what the file has for it."""
    kept(tmp_path / "x.safetensors", RULES["span"])
    changed(tmp_path / "x.safetensors", sites=sites)
    model = build()
    before = surgery.fingerprint(model)
    with pytest.raises(surgery.SurgeryError):
        surgery.load(model, tmp_path / "x.safetensors")
    assert surgery.fingerprint(model) == before


def test_a_rule_that_no_forward_decides_is_matched_whatever_the_file_says(tmp_path):
    path = tmp_path / "x.safetensors"
    kept(path, [at(head, unfreeze), RULES["norm of attention"]])
    told = ["0.layers.0.norm1", "0.layers.0.norm2"]
    changed(path, sites=[["0.layers.0.linear1"], told])
    with pytest.raises(FileError, match=r"at\(head, unfreeze\)"):
        surgery.load(build(), path)


@pytest.mark.parametrize("modules", [None, 3, "", "0123456789abcdef", {}])
def test_modules_changed_by_hand_decide_nothing(modules, tmp_path):
    kept(tmp_path / "x.safetensors", RULES["span"])
    changed(tmp_path / "x.safetensors", modules=modules)
    with pytest.raises(FileError, match="example=inputs"):
        surgery.load(build(), tmp_path / "x.safetensors")
    assert surgery.load(build(), tmp_path / "x.safetensors", example=X)


def test_a_file_with_a_slip_of_before_still_loads(tmp_path):
    """Rules were not looked at so closely once; what they chose is checked by the sites."""
    path = tmp_path / "x.safetensors"
    surgery.save(surgery.apply(build(), at("0.layers.*.linear1", ADAPTER)), path)
    rule = at("0.layers.*.{linear1,linear0}", ADAPTER)
    with pytest.raises(MatchError):
        surgery.apply(build(), rule)
    assert surgery.load(build(), path, rules=rule)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("backbone", ["bert", "encoder"])
def test_every_rule_set_loads_without_the_example_it_was_made_with(backbone, name, tmp_path):
    """On post-norm models, where the order of modules leads astray."""
    make, inputs = BACKBONES[backbone]
    x = inputs()
    try:
        torch.manual_seed(0)
        model = surgery.apply(make().eval(), name, example=x)
    except surgery.SurgeryError:
        pytest.skip("the set is not for this model")
    surgery.save(model, tmp_path / "x.safetensors")
    torch.manual_seed(0)
    again = surgery.load(make().eval(), tmp_path / "x.safetensors")
    assert paths(again.surgery.default) == paths(model.surgery.default)


def test_encoder_is_post_norm():
    assert not encoder().layers[0].norm_first

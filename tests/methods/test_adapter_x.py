"""Adapter-X, in parallel and serial, against a ViT written out with it; its counts, reading by
reading (ViT-B/16 on the meta device)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery import at, block, ffn, insert, nearest, norm, parallel, shared, token, unfreeze, until
from surgery.errors import RuleError
from surgery.methods.adapter_x import adapterx, adapterx_ffn, adapterx_serial
from surgery.parts import QuickGELU, moa, prompt_generator
from tests.methods.reference import (
    INPUTS,
    by_hand,
    close,
    parts,
    stirred,
    swin,
    trains_and_comes_off,
    vit_b,
)

SMALL: dict[str, Any] = {"rank": 4, "heads": 3}


def mixture(part: Any, x: Tensor, act: Any) -> Tensor:
    """Eq. 2 to 5: each sub-token to its likeliest expert, scaled by the probability of it."""
    b, t, d = x.shape
    c = d // part.heads
    out = torch.zeros(b, t, d, dtype=x.dtype)
    unit = part.embeddings / part.embeddings.norm(dim=1, keepdim=True)
    for n in range(b):
        for i in range(t):
            for j in range(part.heads):
                s = x[n, i, j * c : (j + 1) * c]
                g = ((part.reduction @ s) @ unit.T).softmax(0)
                p = int(g.argmax())
                hidden = act(part.down[p] @ s + part.down_bias[p])
                out[n, i, j * c : (j + 1) * c] = g[p] * (part.up[p] @ hidden + part.up_bias[p])
    return out


def written_out(plain: Any, found: dict[str, Any], serial: bool, gelu: bool = False) -> Tensor:
    (shared_part,) = [p for key, p in found.items() if key.startswith("shared/")]
    generators = [p for key, p in found.items() if key.endswith("/insert")]
    x = plain._pos_embed(plain.patch_embed(INPUTS["vit"]))
    for i, one in enumerate(plain.blocks):
        u = x + one.attn(one.norm1(x))
        z = one.norm2(u)
        if serial:
            m = one.mlp(z)
            a = mixture(shared_part, m, lambda h: h * torch.sigmoid(1.702 * h))
            x = u + m + a
        else:
            a = mixture(shared_part, z, torch.relu)
            x = u + one.mlp(z) + 0.1 * a
        if i < len(plain.blocks) - 1:
            heard = F.gelu(a) if gelu else a
            gamma = generators[i].gamma.repeat(24 // generators[i].gamma.numel())
            beta = generators[i].beta.repeat(24 // generators[i].beta.numel())
            new = gamma * heard.mean(1, keepdim=True) + beta
            x = torch.cat([x[:, :1], new, x[:, 1:]], 1)
    assert x.shape[1] == 5 + len(plain.blocks) - 1
    out: Tensor = plain.head(plain.norm(x)[:, 0])
    return out


READINGS = {
    "width / heads": prompt_generator(heads=3),
    "width": prompt_generator(),
    "scalar": prompt_generator(scalar=True),
    "GELU": prompt_generator(heads=3, activation=nn.GELU),
}


@pytest.mark.parametrize("serial", [False, True], ids=["parallel", "serial"])
@pytest.mark.parametrize("reading", READINGS)
def test_it_is_the_paper_written_out(reading: str, serial: bool) -> None:
    rules = (adapterx_serial if serial else adapterx)(**SMALL, generator=READINGS[reading])
    model = stirred("vit", rules)
    plain = by_hand("vit", model, lambda plain, parts: None)
    with torch.no_grad():
        want = written_out(plain, parts(model), serial, gelu=reading == "GELU")
        close(model(INPUTS["vit"]), want)


@pytest.mark.parametrize("rules", [adapterx(**SMALL), adapterx_serial(**SMALL)])
def test_all_of_it_is_trained_and_comes_off(rules: Any) -> None:
    trains_and_comes_off("vit", rules)


def test_the_mixture_is_stored_once_and_the_class_token_is_trained() -> None:
    model = surgery.apply(stirred("vit", adapterx(**SMALL)), at("head", unfreeze), name="more")
    keys = [key for key in surgery.state_dict(model) if "shared" in key]
    assert len(keys) == len({key.rpartition(".")[2] for key in keys}) == 6
    assert "base.cls_token" in surgery.state_dict(model)


def test_the_report_says_that_the_last_prompt_is_not_made() -> None:
    model = stirred("vit", adapterx(**SMALL))
    assert [key for key in parts(model) if key.endswith("insert")] == [
        "blocks/(1 to 2)/insert",
        "blocks/2/insert",
    ]
    assert "no token is made of what is heard last" in str(surgery.report(model))


def test_windows_take_no_prompts() -> None:
    with pytest.raises(RuleError, match=r"fixes their number .* is \(16, 16\)"):
        surgery.plan(swin(), adapterx(**SMALL))
    surgery.plan(swin(), adapterx_ffn(**SMALL))


# counts ----------------------------------------------------------------------------------------


MIXTURE = at(ffn, parallel(shared(moa())))
NORMS = at(nearest(norm, before=ffn), unfreeze)
CLASS = at("", unfreeze(token))


def prompts(generator: Any) -> list[Any]:
    """One a block: that of the last goes before the last norm."""
    made = [insert(generator, hears=ffn), insert(generator, hears=ffn)]
    return [at(until(block[1:], block), made[0]), at(nearest(norm, after=block[-1:]), made[1])]


HEADS, WIDTH, SCALAR = (
    prompt_generator(heads=3),
    prompt_generator(),
    prompt_generator(scalar=True),
)
BARE = at(ffn, parallel(shared(moa(bias=False))))
TEXT = at(ffn, parallel(shared(moa(by_token=True))))
ALGORITHM = at(ffn, parallel(shared(moa(router=768, top_k=None))))
UNSHARED = at(ffn, parallel(moa()))
COUNTS = [
    ("the mixture alone", [MIXTURE], 148_992),
    ("norms", [MIXTURE, NORMS], 167_424),
    ("norms, class token", [MIXTURE, NORMS, CLASS], 168_192),
    ("prompts of width d", [MIXTURE, *prompts(WIDTH)], 167_424),
    ("norms, prompts of width d / h", [MIXTURE, NORMS, *prompts(HEADS)], 173_568),
    ("the same, class token", [MIXTURE, NORMS, *prompts(HEADS), CLASS], 174_336),
    ("norms, one generator for all", [MIXTURE, NORMS, *prompts(shared(WIDTH))], 168_960),
    ("norms, scalar prompts", [MIXTURE, NORMS, *prompts(SCALAR)], 167_448),
    ("norms, scalar prompts, class token", [MIXTURE, NORMS, *prompts(SCALAR), CLASS], 168_216),
    ("norms, prompts of width d", [MIXTURE, NORMS, *prompts(WIDTH)], 185_856),
    ("norms, prompts of width d, class token", [MIXTURE, NORMS, *prompts(WIDTH), CLASS], 186_624),
    ("experts without bias", [BARE], 147_712),
    ("without bias, norms", [BARE, NORMS], 166_144),
    ("without bias, norms, prompts of width d / h", [BARE, NORMS, *prompts(HEADS)], 172_288),
    ("without bias, norms, prompts of width d", [BARE, NORMS, *prompts(WIDTH)], 184_576),
    ("the router looks at tokens, norms", [TEXT, NORMS], 200_192),
    ("Algorithm 1 by the letter", [ALGORITHM], 332_032),
    ("twelve mixtures", [UNSHARED], 1_787_904),
    ("twelve mixtures, norms", [UNSHARED, NORMS], 1_806_336),
    ("twelve, norms, prompts of width d / h", [UNSHARED, NORMS, *prompts(HEADS)], 1_812_480),
    ("twelve mixtures, norms, prompts of width d", [UNSHARED, NORMS, *prompts(WIDTH)], 1_824_768),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "count"), [c[1:] for c in COUNTS], ids=[c[0] for c in COUNTS])
def test_each_reading_has_its_count(rules: Any, count: int) -> None:
    assert surgery.plan(vit_b(), rules).trainable == count


def test_the_default_leaves_the_dead_prompt_out() -> None:
    assert surgery.plan(vit_b(), adapterx()).trainable == 174_336 - 2 * 256
    assert surgery.plan(vit_b(), adapterx_serial()).trainable == 174_336 - 2 * 256


def test_the_serial_experts_are_those_of_noah() -> None:
    model = surgery.apply(stirred("vit", at("head", unfreeze)), adapterx_serial(), name="x")
    room: Any = model.surgery
    assert any(isinstance(module, QuickGELU) for module in room.x.modules())

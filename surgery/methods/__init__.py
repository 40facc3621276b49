"""The named rule sets, one family of papers a file: functions that return a few rules.

    from surgery.methods import lora
    surgery.apply(model, lora(rank=4))    # or surgery.methods.lora(rank=4), or "lora" as it stands

Users may import what `__all__` names; `surgery.rulesets()` lists them with their sources. Arguments
are those of the parts a set is made of, which `surgery.parts` explains under the same names;
`scale` is a factor of what is added, `dropout` a probability. A new set: its file, its name in
`_SETS`, and a test that writes its formula out in plain PyTorch (`tests/methods`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from .._table import Table
from ..errors import RuleError, nearest_names
from ..rules.rule import Rule
from .adapter_x import adapterx, adapterx_ffn, adapterx_serial, daptx
from .adapters import adapter, adaptformer, houlsby
from .arc_adapters import arc, arc_att
from .baselines import bitfit, full, linear_probe
from .convolutions import convpass, convpass_att, repadapter, repadapter_att
from .gated_prompts import llama_adapter
from .interventions import loreft
from .kronecker import compacter, compacter_pp, kadaptation, krona
from .low_rank import dylora, lora, prolora, tied_lora, vera, vida
from .made_of_weights import deft, delora, glora, kasa, mica, peanut, tinylora
from .many_adapters import adapter_fusion, lae, language_adapter, scalearn
from .noah_supernet import noah
from .one_bit import bi_adaptformer, bi_lora
from .orthogonal import boft, goft, psoft, road
from .point_clouds import dapt, idpt, point_peft, pointgst
from .prompts import prefix_tuning, vpt_deep, vpt_shallow
from .reversible import meft
from .routed_low_rank import hydralora, lily, molora, toplora
from .scale_and_shift import ssf
from .side_networks import dtl, losa, lst, res_tuning
from .skills import mhr, mhr_mu, mhr_z, poly
from .sparse_experts import mosa
from .sparse_updates import sparse
from .tensor_factors import fact_tk, fact_tt
from .visual_adapters import adapter_plus, mona, sct
from .weight_free import (
    adalora,
    beft,
    c3a,
    fourierft,
    gralora,
    hydra,
    lora_fa,
    mlae,
    randlora,
    rslora,
    snell,
    unilora,
    vblora,
    waveft,
)
from .weight_updates import (
    dora,
    hira,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    miss,
    oft,
    olora,
    pissa,
    rlrr,
)

_SETS: dict[str, Callable[..., list[Rule]]] = {
    method.__name__: method
    for method in (
        adapterx, adapterx_serial, adapterx_ffn, adaptformer, adapter, houlsby,
        lora, ssf, arc, arc_att, vpt_deep, vpt_shallow, bitfit, linear_probe, full,
        vera, tied_lora, prolora, dylora, krona, kadaptation, compacter, compacter_pp,
        fact_tt, fact_tk, repadapter, repadapter_att, convpass, convpass_att, vida,
        bi_adaptformer, bi_lora, poly, mhr, mhr_z, mhr_mu, mosa, noah, sparse,
        lae, scalearn, language_adapter, llama_adapter, meft, dapt, daptx, idpt,
        dora, pissa, olora, hira, rlrr, loha, lokr, miss, oft, hra, ia3, ln_tuning,
        lst, dtl, prefix_tuning,
        mica, delora, tinylora, kasa, glora, deft, peanut,
        toplora, molora, hydralora, lily,
        adapter_plus, mona, sct,
        loreft, pointgst,
        rslora, lora_fa, hydra, beft, fourierft, waveft, c3a, randlora, vblora, unilora, gralora,
        mlae, adalora, snell, boft, goft, psoft, road,
        losa, res_tuning, adapter_fusion, point_peft,
    )
}  # fmt: skip

__all__ = [*_SETS]


def rulesets() -> Table:
    """The named rule sets: what each does, in a line, and its source.

    >>> print(rulesets())  # doctest: +ELLIPSIS
    Rule sets
    name              what it does ...
    """
    rows: list[tuple[object, ...]] = [(name, *_doc(method)) for name, method in _SETS.items()]
    return Table("Rule sets", ("name", "what it does", "source"), rows)


def rules_named(name: str) -> list[Rule]:
    """The rules of the named set. Raises RuleError, with the nearest names, where there is none."""
    if name not in _SETS:
        near = nearest_names(name, _SETS)
        raise RuleError(
            f'rules="{name}"',
            "no rule set has this name.",
            (f"Nearest: {near}. " if near else "") + f"All: {', '.join(_SETS)}.",
        )
    return _SETS[name]()


def _doc(method: Callable[..., list[Rule]]) -> tuple[str, str]:
    """What it does, in a line, and its source."""
    text = inspect.getdoc(method) or ""
    source = next((line for line in text.splitlines() if line.startswith("Source: ")), "")
    return text.splitlines()[0], source.removeprefix("Source: ")

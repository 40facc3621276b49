"""How many parameters each method trains on Point-MAE, head counted, beside what papers print.

Figures are those of Table 2 of Adapter-X (Li et al. 2024). Its 0.42 M and 1.88 % state neither the
rank nor what is counted; methods.md's readings stand here one by one, and which of them print so.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from backbones.point_mae import PointMAE
from surgery import at, ffn, methods, moa, parallel, prompt_generator, shared, unfreeze
from surgery.methods.adapter_x import left_in
from surgery.parts import dynamic_moa
from surgery.rules.rule import Rule

from .figures import CLASS, NORMS, Figure

HEAD = at("cls_head_finetune", unfreeze)
ALL = ("cls", "prompt", "patch")


@cache
def point_mae(classes: int = 15, reads: tuple[str, ...] = ("cls", "patch")) -> nn.Module:
    """Point-MAE on the meta device, with a head for what it reads."""
    with torch.device("meta"):
        return PointMAE(classes, reads=reads)


def reading(mixture: Rule, *rest: Rule) -> list[Rule]:
    """DAPT-X of a mixture, with the class token and the head, and what else is counted."""
    return [mixture, *rest, CLASS, HEAD]


def dynamic(rank: int) -> Rule:
    """One mixture of DAPT's adapters, shared."""
    return at(ffn, parallel(shared(dynamic_moa(rank=rank))))


WIDTH, SPLIT = left_in(prompt_generator()), left_in(prompt_generator(heads=3))
SCALAR = left_in(prompt_generator(scalar=True))
PLAIN = at(ffn, parallel(shared(moa(rank=32, activation=nn.GELU))))
BARE = reading(PLAIN, NORMS, *SPLIT)
BACKGROUND = reading(dynamic(64), NORMS, *WIDTH)  # with DAPT's own sizes, set by set
MODELNET = reading(dynamic(72), NORMS, *WIDTH)
FOUR = (BACKGROUND, BACKGROUND, BACKGROUND, MODELNET)


def figures() -> list[Figure]:
    """Every integer of section 1.3 of the notes on methods; each with the model it is of."""
    two, three = point_mae(), point_mae(15, ALL)
    forty = point_mae(40)
    prints = "it prints {}"

    def figure(method: str, setting: str, model: nn.Module, rules: list[Rule] | str, integer: int,
            printed: str = "", why: str = "") -> Figure:  # fmt: skip
        return Figure(method, setting, rules, integer, printed, 0, why, models=(model,))

    def daptx(setting: str, rules: list[Rule], integer: int, why: str = "") -> Figure:
        return figure("daptx", setting, three, rules, integer, "0.42 M", why)

    dapt = [("OBJ_BG, PB_T50_RS", three, 64), ("OBJ_ONLY", two, 64), ("ModelNet40", forty, 72)]
    counts = (1_087_771, 989_467, 1_069_716)
    sets = [methods.dapt(rank=rank) for _, _, rank in dapt]
    return [
        figure("full", "15 classes", two, "full", 22_093_327, "22.1 M"),
        figure("full", "40 classes", forty, "full", 22_099_752, "22.1 M"),
        figure("linear_probe", "15 classes", two, "linear_probe", 267_535),
        figure("linear_probe", "head reads prompts too", three, "linear_probe", 365_839),
        figure("linear_probe", "40 classes", forty, "linear_probe", 273_960),
        *(figure("dapt", f"{name}, rank {rank}", model, rules, n, "1.1 M", prints.format("0.99"))
          for (name, model, rank), rules, n in zip(dapt, sets, counts, strict=True)),
        Figure("dapt", "mean of the four", None, 1_058_681, "1.1 M",
            several=(sets[0], *sets), models=(three, three, two, forty)),
        figure("idpt", "15 classes", three, "idpt", 1_696_783, "1.7 M"),
        figure("idpt", "40 classes", point_mae(40, ALL), methods.idpt(), 1_703_208, "1.7 M"),
        figure("pointgst", "15 classes", two, "pointgst", 622_063, "0.6 M"),
        figure("point_peft", "15 classes, no memory bank", two, "point_peft", 671_503, "0.7 M"),
        daptx("rank 32, prompts (d/h): 1.88 % of the tuned model", methods.daptx(), 418_067),
        daptx("the same, plain experts: 1.88 % of 22.1 M", BARE, 416_527),
        daptx("rank 32, scalar prompts: 1.88 % of 22.1 M", reading(dynamic(32), NORMS, *SCALAR),
            415_019),
        daptx("rank 32, prompts (d): 1.92 % of 22.1 M", reading(dynamic(32), NORMS, *WIDTH),
            424_211),
        daptx("rank 64, prompts (d)", BACKGROUND, 461_331, prints.format("0.46")),
        figure("daptx", "the same, OBJ_ONLY", two, BACKGROUND, 363_027, "0.42 M",
            prints.format("0.36")),
        figure("daptx", "rank 72, prompts (d), ModelNet40", forty, MODELNET, 378_732, "0.42 M",
            prints.format("0.38")),
        Figure("daptx", "mean of these four: 1.88 % of 22.1 M", None, 416_105, "0.42 M",
            several=FOUR, models=(three, two, three, forty)),
    ]  # fmt: skip

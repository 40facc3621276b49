"""How many parameters each method trains on ViT-B/16, beside what its paper prints.

All on the meta device, the head left out, in one run: `python -m benchmarks parameters`. A figure
matches where our integer rounds to it; where it does not, the reason stands beside it. Figures are
those of Table 1 of Adapter-X (Li et al. 2024) unless a paper is named; what was read nowhere but
recalled is marked so.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

import surgery
from surgery import at, block, ffn, insert, nearest, norm, parallel, shared, token, unfreeze, until
from surgery._table import Table
from surgery.parts import lora as low_rank
from surgery.parts import moa, prompt_generator
from surgery.rules.rule import Rule, Rules

HEADS = 940 * 769  # of all 19 tasks of VTAB-1k together: 769 for each of their 940 classes
MEAN_HEAD = HEADS / 19  # 38,045.26


class Row(NamedTuple):
    """A method as it was run, the integer it must come to, and what a paper prints for it.

    printed  a figure with its unit, "0.17 M" or "24.6 K"; "" where none is known
    plus     parameters that the printed figure counts beside ours (a head)
    why      why it does not match, or what the figure counts
    each     several rule sets instead, whose mean is counted
    models   what they are met with, one each; a ViT-B/16 without head where there are none
    """

    method: str
    setting: str
    rules: Rules | None  # None: nothing beside the head
    integer: int
    printed: str = ""
    plus: float = 0
    why: str = ""
    each: tuple[Rules, ...] = ()
    models: tuple[nn.Module, ...] = ()

    @property
    def counted(self) -> int:
        """What is trained, of the whole list of rule sets in `each` their mean."""
        sets = self.each or ([self.rules] if self.rules else [])
        models = self.models or (vit(),) * len(sets)
        counts = [surgery.plan(*pair).trainable for pair in zip(models, sets, strict=True)]
        return round(sum(counts) / max(len(sets), 1))

    @property
    def verdict(self) -> str:
        if not self.printed:
            return self.why or "none printed"
        rounds = matches(self.counted + self.plus, self.printed)
        if rounds and self.plus:
            return f"with {self.why}"
        return "match" if rounds else f"no: {self.why}"


@cache
def vit() -> nn.Module:
    """ViT-B/16 at 224 without head, on the meta device: 85,798,656 parameters."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model("vit_base_patch16_224", num_classes=0)
    return model


def matches(count: float, printed: str) -> bool:
    """Whether a count rounds to a printed figure, in its unit and to its decimals.

    >>> matches(167_424, "0.17 M"), matches(156_768, "0.15 M")
    (True, False)
    """
    figure, unit = printed.split()
    decimals = len(figure.partition(".")[2])
    return f"{count / {'M': 1e6, 'K': 1e3, '': 1}[unit]:.{decimals}f}" == figure


def of(name: str, **arguments: Any) -> list[Rule]:
    """The rules of a named set, with arguments of its function."""
    made: list[Rule] = getattr(importlib.import_module("surgery.methods"), name)(**arguments)
    return made


MEAN = "the mean VTAB head (38,045), which the caption excludes"
MIXTURE = at(ffn, parallel(shared(moa())))
BARE = at(ffn, parallel(shared(moa(bias=False))))
APART = at(ffn, parallel(moa()))
NORMS = at(nearest(norm, before=ffn), unfreeze)
CLASS = at("", unfreeze(token))
WIDTH, SPLIT = prompt_generator(), prompt_generator(heads=3)
SCALAR = prompt_generator(scalar=True)


TT_RANKS = (8, 16, 8, 16, 8, 16, 8, 8, 8, 8, 8, 16, 4, 16, 16, 16, 16, 16, 8)
TK_RANKS = (32, 32, 16, 32, 16, 32, 16, 32, 32, 32, 16, 32, 16, 32, 32, 32, 32, 32, 16)


def prompts(generator: Any) -> list[Rule]:
    """A prompt of every block; that of the last, which a class token never reads, is counted."""
    edit = insert(generator, hears=ffn)
    return [at(until(block[1:], block), edit), at(nearest(norm, after=block[-1:]), edit)]


def _x(
    setting: str, rules: list[Rule], integer: int, printed: str = "0.17 M", why: str = ""
) -> Row:
    return Row("Adapter-X", setting, rules, integer, printed, why=why)


WIDE = "it prints 0.19: prompts of width d do not fit beside the norms"
READINGS = [
    _x("the mixture alone", [MIXTURE], 148_992, "1.15 M", "a typing error of the paper for 0.15"),
    _x("+ class token", [MIXTURE, CLASS], 149_760, "0.15 M"),
    _x("+ norms", [MIXTURE, NORMS], 167_424),
    _x("+ norms, class token", [MIXTURE, NORMS, CLASS], 168_192),
    _x("+ prompts (d)", [MIXTURE, *prompts(WIDTH)], 167_424),
    _x("+ prompts (d), class token", [MIXTURE, *prompts(WIDTH), CLASS], 168_192),
    _x("+ norms, prompts (d/h)", [MIXTURE, NORMS, *prompts(SPLIT)], 173_568),
    _x("+ norms, prompts (d/h), class token", [MIXTURE, NORMS, *prompts(SPLIT), CLASS], 174_336),
    _x("+ norms, one generator", [MIXTURE, NORMS, *prompts(shared(WIDTH))], 168_960),
    _x("+ norms, one generator, class token", [MIXTURE, NORMS, *prompts(shared(WIDTH)), CLASS],
       169_728),
    _x("+ norms, prompts (1)", [MIXTURE, NORMS, *prompts(SCALAR)], 167_448),
    _x("+ norms, prompts (1), class token", [MIXTURE, NORMS, *prompts(SCALAR), CLASS], 168_216),
    _x("+ norms, prompts (d)", [MIXTURE, NORMS, *prompts(WIDTH)], 185_856, why=WIDE),
    _x("+ norms, prompts (d), class token", [MIXTURE, NORMS, *prompts(WIDTH), CLASS], 186_624,
       why=WIDE),
    _x("no biases", [BARE], 147_712, "1.15 M", "a typing error of the paper for 0.15"),
    _x("no biases, norms", [BARE, NORMS], 166_144),
    _x("no biases, norms, prompts (d/h)", [BARE, NORMS, *prompts(SPLIT)], 172_288),
    _x("no biases, norms, prompts (d)", [BARE, NORMS, *prompts(WIDTH)], 184_576,
       why="it prints 0.18"),
    _x("router on whole tokens (text), norms",
       [at(ffn, parallel(shared(moa(by_token=True)))), NORMS], 200_192,
       why="the text's W of 64 x 768 is too large"),
    _x("Algorithm 1 by the letter (rank = d)",
       [at(ffn, parallel(shared(moa(router=768, top_k=None))))], 332_032,
       why="Algorithm 1 cannot be what was run"),
    _x("a mixture a block", [APART], 1_787_904, "1.8 M"),
    _x("a mixture a block, norms", [APART, NORMS], 1_806_336, "1.8 M"),
    _x("a mixture a block, norms, prompts (d/h)", [APART, NORMS, *prompts(SPLIT)], 1_812_480,
       "1.8 M"),
    _x("a mixture a block, norms, prompts (d)", [APART, NORMS, *prompts(WIDTH)], 1_824_768,
       "1.8 M"),
]  # fmt: skip


def first() -> list[Row]:
    """The methods of Adapter-X's Table 1, Adapter-X itself, and ARC."""
    released = "the mean of 19 released subnets (360,134), which are not to be had here"
    return [
        Row("full", "", "full", 85_798_656, "85.84 M", MEAN_HEAD, MEAN),
        Row("linear_probe", "", None, 0, "0.04 M", MEAN_HEAD, MEAN),
        Row("bitfit", "", "bitfit", 102_912, "0.10 M"),
        Row("vpt_shallow", "50 tokens", of("vpt_shallow", tokens=50), 38_400),
        Row("vpt_deep", "50 tokens", of("vpt_deep", tokens=50), 460_800, "0.53 M", 0,
            "a mean of 57.6 tokens, chosen for each task"),
        Row("lora", "rank 8, q, k and v", of("lora", rank=8), 294_912, "0.29 M"),
        Row("lora", "rank 8, q and v", at(surgery.qkv, low_rank(rank=8, rows="q _k v")), 294_912,
            "0.29 M"),
        Row("ssf", "", "ssf", 205_824, "0.24 M", MEAN_HEAD, MEAN),
        Row("adapter", "rank 8", "adapter", 156_768, "0.15 M", 0, "it is 0.157: truncated there"),
        Row("adapter", "rank 64", of("adapter", rank=64), 1_189_632, "1.19 M"),
        Row("houlsby", "rank 8", of("houlsby", norms=False), 313_536),
        Row("houlsby", "rank 8, norms", "houlsby", 313_536 + 38_400),
        Row("adaptformer", "rank 64", "adaptformer", 1_189_632, "1.26 M", 0,
            "1.2665 with the head of CIFAR-100 (76,900), truncated"),
        Row("noah", "supernet of 10", "noah", 12 * (7680 + 4 * 7680 + 2 * 7680 + 10 + 768),
            "0.36 M", 0, released),
        Row("arc", "rank 50", "arc", 96_432, "0.13 M", MEAN_HEAD, MEAN),
        Row("arc_att", "rank 50", "arc_att", 48_216, "0.08 M", MEAN_HEAD,
            "0.0863 with the mean head, truncated"),
        Row("adapterx_ffn", "as listed", "adapterx_ffn", 167_424, "0.17 M"),
        Row("adapterx", "as listed", "adapterx", 173_824, "0.17 M"),
        Row("adapterx_serial", "as listed", "adapterx_serial", 173_824, "0.17 M"),
        *READINGS,
    ]  # fmt: skip


def second() -> list[Row]:
    """The further adapter methods; figures of their own papers, recalled where so marked."""
    return [
        Row("vera", "rank 256", "vera", 24_576, "24.6 K"),
        Row("tied_lora", "rank 8, all trained", "tied_lora", 52_320),
        Row("prolora", "rank 8, 2 unshared, 4 tiles", "prolora", 129_024),
        Row("dylora", "up to rank 8", "dylora", 294_912),
        Row("krona", "32 x 24 (x) 24 x 32", "krona", 36_864),
        Row("compacter", "n 4, rank 24", "compacter", 57_088),
        Row("compacter_pp", "n 4, rank 24", "compacter_pp", 28_576),
        Row("kadaptation", "t 32", "kadaptation", 50_176, "79.699 K", 29_523,
            "the mean ELEVATER head (29,523)"),
        *(Row("fact_tt", f"rank {r}", of("fact_tt", rank=r), n)
          for r, n in ((4, 8_448), (8, 21_504), (16, 61_440))),
        Row("fact_tt", "mean of the 19 released ranks", None, 39_734, "0.040 M",
            each=tuple(of("fact_tt", rank=r) for r in TT_RANKS)),
        *(Row("fact_tk", f"rank {r}", of("fact_tk", rank=r), n)
          for r, n in ((8, 13_952), (16, 30_976), (32, 86_528))),
        Row("fact_tk", "mean of the 19 released ranks", None, 68_985, "0.069 M",
            each=tuple(of("fact_tk", rank=r) for r in TK_RANKS)),
        Row("convpass", "hidden 8", "convpass", 327_552, "0.33 M"),
        Row("convpass_att", "hidden 8", "convpass_att", 163_776, "0.16 M"),
        Row("repadapter", "rank 8, 2 groups", "repadapter", 239_808, "0.22 M", 0,
            "0.22 without biases"),
        Row("repadapter", "the same, no biases", of("repadapter", bias=False), 221_184, "0.22 M"),
        Row("repadapter_att", "rank 8, 2 groups", "repadapter_att", 119_904),
        Row("bi_adaptformer", "rank 32, one bit each", "bi_adaptformer", 589_824),
        Row("bi_lora", "rank 32, one bit each", "bi_lora", 1_179_648),
        Row("poly", "8 skills, rank 1, 19 tasks", "poly", 298_560),
        Row("mhr", "8 heads", "mhr", 324_096),
        Row("mhr_z", "one new task", "mhr_z", 1_536),
        Row("mhr_mu", "rank 1", "mhr_mu", 36_864),
        Row("mosa", "rank 16, 4 experts", "mosa", 792_768),
        Row("mosa", "rank 16, merged", of("mosa", experts=1), 322_752),
        Row("meft", "rank 8", "meft", 313_536),
        Row("vida", "ranks 1 and 128", "vida", 12 * (1 + 128) * 12_288),
        Row("sparse", "1 % of each linear", "sparse", 12 * (17_695 + 5_899 + 2 * 23_593)),
        Row("lae", "rank 5, 5 blocks", "lae", 5 * (2 * 768 * 5 + 5 + 768 + 1)),
        Row("scalearn", "3 parts, by feature", "scalearn", 12 * 3 * 768),
        Row("language_adapter", "2 domains, rank 384", "language_adapter",
            2 * 12 * (2 * 768 * 384 + 384 + 768)),
        Row("llama_adapter", "10 tokens, 10 blocks", "llama_adapter", 10 * (10 * 768 + 12)),
    ]  # fmt: skip


def report(rounds: int = 0) -> list[Table]:
    """The whole table; what does not come to its integer is told below it."""
    from . import points

    on = "trained on ViT-B/16, head left out"
    return [
        table(f"First ring: {on}", first()),
        table(f"Second ring: {on}", second()),
        table("Point clouds: trained on Point-MAE, head counted", points.rows(), 22.1),
    ]


def table(title: str, rows: list[Row], base: float = 85.84) -> Table:
    """A line for each row; `base` is what is 100 %, in millions."""
    counted = [(row, row.counted) for row in rows]
    lines: list[tuple[object, ...]] = [
        (r.method, r.setting, n, f"{n / base / 10_000:.3f}", r.printed or "-", r.verdict)
        for r, n in counted
    ]
    wrong = [
        f"WRONG: {r.method}, {r.setting}: not {r.integer:,}" for r, n in counted if n != r.integer
    ]
    columns = ("method", "setting", "trained", f"% of {base} M", "printed", "match")
    return Table(title, columns, lines, wrong)

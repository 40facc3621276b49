"""How many parameters each method trains on ViT-B/16, beside what its paper prints.

All on the meta device, the head left out, in one run: `python -m benchmarks parameters`. A figure
matches where our integer rounds to it; where it does not, the reason stands beside it. Figures are
those of Table 1 of Adapter-X (Li et al. 2024) unless a paper is named; what was read nowhere but
recalled is marked so.
"""

from __future__ import annotations

from typing import Any

from surgery import at, block, ffn, insert, methods, nearest, norm, parallel, qkv, shared, until
from surgery._table import Table
from surgery.parts import lora as low_rank
from surgery.parts import moa, prompt_generator
from surgery.rules.rule import Rule

from . import points
from .figures import CLASS, NORMS, Figure, table

HEADS = 940 * 769  # of all 19 tasks of VTAB-1k together: 769 for each of their 940 classes
MEAN_HEAD = HEADS / 19  # 38,045.26
MEAN = "the mean VTAB head (38,045), which the caption excludes"
MIXTURE = at(ffn, parallel(shared(moa())))
BARE = at(ffn, parallel(shared(moa(bias=False))))
APART = at(ffn, parallel(moa()))
WIDTH, SPLIT = prompt_generator(), prompt_generator(heads=3)
SCALAR = prompt_generator(scalar=True)

TT_RANKS = (8, 16, 8, 16, 8, 16, 8, 8, 8, 8, 8, 16, 4, 16, 16, 16, 16, 16, 8)
TK_RANKS = (32, 32, 16, 32, 16, 32, 16, 32, 32, 32, 16, 32, 16, 32, 32, 32, 32, 32, 16)


def prompts(generator: Any) -> list[Rule]:
    """A prompt of every block; that of the last, which a class token never reads, is counted."""
    edit = insert(generator, hears=ffn)
    return [at(until(block[1:], block), edit), at(nearest(norm, after=block[-1:]), edit)]


def _adapterx(
    setting: str, rules: list[Rule], integer: int, printed: str = "0.17 M", why: str = ""
) -> Figure:
    return Figure("Adapter-X", setting, rules, integer, printed, why=why)


WIDE = "it prints 0.19: prompts of width d do not fit beside the norms"
READINGS = [_adapterx(*reading) for reading in (
    ("the mixture alone", [MIXTURE], 148_992, "1.15 M", "a typing error of the paper for 0.15"),
    ("+ class token", [MIXTURE, CLASS], 149_760, "0.15 M"),
    ("+ norms", [MIXTURE, NORMS], 167_424),
    ("+ norms, class token", [MIXTURE, NORMS, CLASS], 168_192),
    ("+ prompts (d)", [MIXTURE, *prompts(WIDTH)], 167_424),
    ("+ prompts (d), class token", [MIXTURE, *prompts(WIDTH), CLASS], 168_192),
    ("+ norms, prompts (d/h)", [MIXTURE, NORMS, *prompts(SPLIT)], 173_568),
    ("+ norms, prompts (d/h), class token", [MIXTURE, NORMS, *prompts(SPLIT), CLASS], 174_336),
    ("+ norms, one generator", [MIXTURE, NORMS, *prompts(shared(WIDTH))], 168_960),
    ("+ norms, one generator, class token", [MIXTURE, NORMS, *prompts(shared(WIDTH)), CLASS],
       169_728),
    ("+ norms, prompts (1)", [MIXTURE, NORMS, *prompts(SCALAR)], 167_448),
    ("+ norms, prompts (1), class token", [MIXTURE, NORMS, *prompts(SCALAR), CLASS], 168_216),
    ("+ norms, prompts (d)", [MIXTURE, NORMS, *prompts(WIDTH)], 185_856, "0.17 M", WIDE),
    ("+ norms, prompts (d), class token", [MIXTURE, NORMS, *prompts(WIDTH), CLASS], 186_624,
       "0.17 M", WIDE),
    ("no biases", [BARE], 147_712, "1.15 M", "a typing error of the paper for 0.15"),
    ("no biases, norms", [BARE, NORMS], 166_144),
    ("no biases, norms, prompts (d/h)", [BARE, NORMS, *prompts(SPLIT)], 172_288),
    ("no biases, norms, prompts (d)", [BARE, NORMS, *prompts(WIDTH)], 184_576,
       "0.17 M", "it prints 0.18"),
    ("router on whole tokens (text), norms",
       [at(ffn, parallel(shared(moa(by_token=True)))), NORMS], 200_192,
       "0.17 M", "the text's W of 64 x 768 is too large"),
    ("Algorithm 1 by the letter (rank = d)",
       [at(ffn, parallel(shared(moa(router=768, top_k=None))))], 332_032,
       "0.17 M", "Algorithm 1 cannot be what was run"),
    ("a mixture a block", [APART], 1_787_904, "1.8 M"),
    ("a mixture a block, norms", [APART, NORMS], 1_806_336, "1.8 M"),
    ("a mixture a block, norms, prompts (d/h)", [APART, NORMS, *prompts(SPLIT)], 1_812_480,
       "1.8 M"),
    ("a mixture a block, norms, prompts (d)", [APART, NORMS, *prompts(WIDTH)], 1_824_768,
       "1.8 M"),
)]  # fmt: skip


def first() -> list[Figure]:
    """The methods of Adapter-X's Table 1, Adapter-X itself, and ARC."""
    released = "the mean of 19 released subnets (360,134), which are not to be had here"
    return [
        Figure("full", "", "full", 85_798_656, "85.84 M", MEAN_HEAD, MEAN),
        Figure("linear_probe", "", None, 0, "0.04 M", MEAN_HEAD, MEAN),
        Figure("bitfit", "", "bitfit", 102_912, "0.10 M"),
        Figure("vpt_shallow", "50 tokens", methods.vpt_shallow(tokens=50), 38_400),
        Figure("vpt_deep", "50 tokens", methods.vpt_deep(tokens=50), 460_800, "0.53 M", 0,
            "a mean of 57.6 tokens, chosen for each task"),
        Figure("lora", "rank 8, q, k and v", methods.lora(rank=8), 294_912, "0.29 M"),
        Figure("lora", "rank 8, q and v", at(qkv, low_rank(rank=8, rows="q _k v")), 294_912,
            "0.29 M"),
        Figure("ssf", "", "ssf", 205_824, "0.24 M", MEAN_HEAD, MEAN),
        Figure("adapter", "rank 8", "adapter", 156_768, "0.15 M", 0,
            "it is 0.157: truncated there"),
        Figure("adapter", "rank 64", methods.adapter(rank=64), 1_189_632, "1.19 M"),
        Figure("houlsby", "rank 8", methods.houlsby(norms=False), 313_536),
        Figure("houlsby", "rank 8, norms", "houlsby", 313_536 + 38_400),
        Figure("adaptformer", "rank 64", "adaptformer", 1_189_632, "1.26 M", 0,
            "1.2665 with the head of CIFAR-100 (76,900), truncated"),
        Figure("noah", "supernet of 10", "noah", 12 * (7680 + 4 * 7680 + 2 * 7680 + 10 + 768),
            "0.36 M", 0, released),
        Figure("arc", "rank 50", "arc", 96_432, "0.13 M", MEAN_HEAD, MEAN),
        Figure("arc_att", "rank 50", "arc_att", 48_216, "0.08 M", MEAN_HEAD,
            "0.0863 with the mean head, truncated"),
        Figure("adapterx_ffn", "as listed", "adapterx_ffn", 167_424, "0.17 M"),
        Figure("adapterx", "as listed", "adapterx", 173_824, "0.17 M"),
        Figure("adapterx_serial", "as listed", "adapterx_serial", 173_824, "0.17 M"),
        *READINGS,
    ]  # fmt: skip


def second() -> list[Figure]:
    """The further adapter methods; figures of their own papers, recalled where so marked."""
    return [
        Figure("vera", "rank 256", "vera", 24_576, "24.6 K"),
        Figure("tied_lora", "rank 8, all trained", "tied_lora", 52_320),
        Figure("prolora", "rank 8, 2 unshared, 4 tiles", "prolora", 129_024),
        Figure("dylora", "up to rank 8", "dylora", 294_912),
        Figure("krona", "32 x 24 (x) 24 x 32", "krona", 36_864),
        Figure("compacter", "n 4, rank 24", "compacter", 57_088),
        Figure("compacter_pp", "n 4, rank 24", "compacter_pp", 28_576),
        Figure("kadaptation", "t 32", "kadaptation", 50_176, "79.699 K", 29_523,
            "the mean ELEVATER head (29,523)"),
        *(Figure("fact_tt", f"rank {r}", methods.fact_tt(rank=r), n)
          for r, n in ((4, 8_448), (8, 21_504), (16, 61_440))),
        Figure("fact_tt", "mean of the 19 released ranks", None, 39_734, "0.040 M",
            several=tuple(methods.fact_tt(rank=r) for r in TT_RANKS)),
        *(Figure("fact_tk", f"rank {r}", methods.fact_tk(rank=r), n)
          for r, n in ((8, 13_952), (16, 30_976), (32, 86_528))),
        Figure("fact_tk", "mean of the 19 released ranks", None, 68_985, "0.069 M",
            several=tuple(methods.fact_tk(rank=r) for r in TK_RANKS)),
        Figure("convpass", "hidden 8", "convpass", 327_552, "0.33 M"),
        Figure("convpass_att", "hidden 8", "convpass_att", 163_776, "0.16 M"),
        Figure("repadapter", "rank 8, 2 groups", "repadapter", 239_808, "0.22 M", 0,
            "0.22 without biases"),
        Figure("repadapter", "the same, no biases", methods.repadapter(bias=False), 221_184,
            "0.22 M"),
        Figure("repadapter_att", "rank 8, 2 groups", "repadapter_att", 119_904),
        Figure("bi_adaptformer", "rank 32, one bit each", "bi_adaptformer", 589_824),
        Figure("bi_lora", "rank 32, one bit each", "bi_lora", 1_179_648),
        Figure("poly", "8 skills, rank 1, 19 tasks", "poly", 298_560),
        Figure("mhr", "8 heads", "mhr", 324_096),
        Figure("mhr_z", "one new task", "mhr_z", 1_536),
        Figure("mhr_mu", "rank 1", "mhr_mu", 36_864),
        Figure("mosa", "rank 16, 4 experts", "mosa", 792_768),
        Figure("mosa", "rank 16, merged", methods.mosa(experts=1), 322_752),
        Figure("meft", "rank 8", "meft", 313_536),
        Figure("vida", "ranks 1 and 128", "vida", 12 * (1 + 128) * 12_288),
        Figure("sparse", "1 % of each linear", "sparse", 12 * (17_695 + 5_899 + 2 * 23_593)),
        Figure("lae", "rank 5, 5 blocks", "lae", 5 * (2 * 768 * 5 + 5 + 768 + 1)),
        Figure("scalearn", "3 parts, by feature", "scalearn", 12 * 3 * 768),
        Figure("language_adapter", "2 domains, rank 384", "language_adapter",
            2 * 12 * (2 * 768 * 384 + 384 + 768)),
        Figure("llama_adapter", "10 tokens, 10 blocks", "llama_adapter", 10 * (10 * 768 + 12)),
    ]  # fmt: skip


def third() -> list[Figure]:
    """Updates of weights."""
    counted = {
        "dora": 294_912 + 12 * 2304, "pissa": 294_912, "olora": 294_912, "hira": 294_912,
        "rlrr": 230_400, "loha": 589_824, "lokr": 37_632, "miss": 12 * 64 * 2304,
        "oft": 12 * 24 * 496, "hra": 12 * 8 * 768, "ia3": 12 * (2 * 768 + 3072),
        "ln_tuning": 25 * 2 * 768, "rslora": 294_912, "lora_fa": 12 * 8 * 2304, "beft": 12 * 768,
        "waveft": 72_000, "c3a": 12 * 3 * 9 * 256, "randlora": 24 * 24 * (32 + 768),
        "vblora": 90 * 256 + 24 * 24 * 90, "unilora": 23_040, "gralora": 4 * 294_912,
        "mlae": 295_008, "adalora": 144 * 12_292, "snell": 96 * 13_824, "boft": 24 * 96 * 28,
        "goft": 12 * 767, "psoft": 48 * 560, "road": 12 * 6912,
    }  # fmt: skip
    biases = 12 * 2 * 2 * (2 + 768)
    return [
        Figure("fourierft", "3000 numbers", "fourierft", 72_000, "72 K"),
        Figure("hydra", "rank 2", "hydra", 202_752, "0.28 M", biases + MEAN_HEAD,
            "recalled; the biases of its code and the mean VTAB head"),
        *(Figure(name, "as listed", name, count) for name, count in counted.items()),
    ]  # fmt: skip


def fourth() -> list[Figure]:
    """What is made of the base weight, or of each token; what stands in the stream."""
    counted = {
        "mica": 73_728, "delora": 294_912 + 12, "tinylora": 13, "kasa": 294_912 + 12 * 8,
        "glora": 1_410_048, "deft": 294_912, "peanut": 12 * 2 * 8 * 2304,
        "toplora": 12 * 8 * (2 * 768 + 2304 + 1), "molora": 1_216_512, "hydralora": 764_928,
        "lily": 12 * 16 * (768 + 4) + 4 * 16 * 2304, "mona": 2_684_928,
        "loreft": 12 * (2 * 4 * 768 + 4), "lst": 1_853_196, "dtl": 36_864,
        "prefix_tuning": 12 * 2 * 10 * 768,
        "losa": 12 * (8 * 1537 + 768), "res_tuning": 12 * (2 * (32 * 1537 + 768) + 1),
        "adapter_fusion": 12 * (3 * 768**2 + 2 * 768),
    }  # fmt: skip
    return [
        Figure("adapter_plus", "rank 8", "adapter_plus", 165_984, "0.20 M", MEAN_HEAD,
            "recalled, of the mean VTAB head"),
        Figure("sct", "96 channels", "sct", 12 * (96 * 96 + 96), "0.11 M"),
        *(Figure(name, "as listed", name, count) for name, count in counted.items()),
    ]  # fmt: skip


def report(rounds: int = 0) -> list[Table]:
    """The whole table; what does not come to its integer is told below it."""
    on = "trained on ViT-B/16, head left out"
    return [
        table(f"First ring: {on}", first()),
        table(f"Second ring: {on}", second()),
        table(f"Updates of weights: {on}", third()),
        table(f"Of weights, of tokens, in the stream: {on}", fourth()),
        table("Point clouds: trained on Point-MAE, head counted", points.figures(), 22.1),
    ]

"""Adapter-X: A Novel General Parameter-Efficient Fine-Tuning Framework (Li et al. 2024).

The authors released no code, and the paper leaves open how its prompts are made; every reading is
an argument here. The default (a gamma and beta of width / heads, shared by the heads) is the one
whose count rounds to the 0.17 M and 0.20 % that the paper prints.
"""

from __future__ import annotations

from ..parts import QuickGELU, dynamic_moa, moa, prompt_generator
from ..rules.edits import append as serial
from ..rules.edits import insert, parallel, token, unfreeze
from ..rules.part import Maker, shared
from ..rules.relations import nearest, until
from ..rules.roles import block, ffn, head, norm
from ..rules.rule import Rule, at


def adapterx_ffn(
    rank: int = 64, experts: int = 4, heads: int = 3, top_k: int | None = 1, scale: float = 0.1
) -> list[Rule]:
    """One mixture of adapters shared by all blocks, beside every FFN; each block's own norm.

    The mixture is fed with the FFN's own input (after the norm, as Fig. 2 taps it); experts are
    ReLU adapters with dropout 0.1 and scale 0.1, as AdaptFormer's.

    Source: Li et al. 2024 (Adapter-X), Fig. 2, without its prompts
    """
    mixture = moa(experts=experts, rank=rank, heads=heads, top_k=top_k, dropout=0.1, fit=True)
    return [
        at(ffn, parallel(shared(mixture), scale=scale)),
        at(nearest(norm, before=ffn), unfreeze, optional=True),  # LeViT, Swin V2 have none
        at(head, unfreeze, optional=True),
    ]


def adapterx(
    rank: int = 64,
    experts: int = 4,
    heads: int = 3,
    top_k: int | None = 1,
    scale: float = 0.1,
    generator: Maker | None = None,
) -> list[Rule]:
    """One mixture of adapters beside every FFN, each block's own norm and prompt; the class token.

    A prompt is made of what the mixture gave at all tokens of a block, and put after the class
    token for the next; prompts add up, and are taken out after the last block, whose own nothing
    would read.

    generator  of a prompt; None: prompt_generator(heads=heads, fit=True)

    Source: Li et al. 2024 (Adapter-X), Fig. 2, Eq. 2 to 7 (AdaptFormer-X)
    """
    mixture, *rest = adapterx_ffn(rank, experts, heads, top_k, scale)
    return [mixture, *_specific(_default(generator, heads)), *rest]


def adapterx_serial(
    rank: int = 64,
    experts: int = 4,
    heads: int = 3,
    top_k: int | None = 1,
    generator: Maker | None = None,
) -> list[Rule]:
    """As adapterx, with the mixture on every FFN's output, before the residual sum.

    Experts are those of NOAH's serial adapter: QuickGELU, dropout 0.1, no scale.

    Source: Li et al. 2024 (Adapter-X), Eq. 1 to 7
    """
    mixture = moa(
        experts=experts, rank=rank, heads=heads, top_k=top_k, activation=QuickGELU, dropout=0.1,
        fit=True,
    )  # fmt: skip
    return [
        at(ffn, serial(shared(mixture), residual=True)),
        *_specific(_default(generator, heads)),
        at(nearest(norm, before=ffn), unfreeze, optional=True),
        at(head, unfreeze, optional=True),
    ]


def daptx(
    rank: int = 32,
    experts: int = 4,
    heads: int = 3,
    top_k: int | None = 1,
    dropout: float = 0.0,
    generator: Maker | None = None,
    last: bool = True,
) -> list[Rule]:
    """A shared mixture of DAPT's adapters beside each FFN, its norm, prompts left in; the token.

    As adapterx, with dynamic adapters for experts and no scale; and prompts are left in for a head
    that reads them (`reads=` of `backbones.point_mae.PointMAE`). For models with a class token. The
    rank is the one at which the paper's 1.88 % comes out; it states none for point clouds.

    last  the last block makes a prompt too, which only the head can read; False for a head that
          reads the class token alone, or a mean over tokens

    Source: Li et al. 2024 (Adapter-X), Fig. 2 and section 4.3 (DAPT-X)
    """
    mixture = dynamic_moa(
        experts=experts, rank=rank, heads=heads, top_k=top_k, dropout=dropout, fit=True
    )
    return [
        at(ffn, parallel(shared(mixture))),
        *left_in(_default(generator, heads), last),
        at(nearest(norm, before=ffn), unfreeze, optional=True),
        at("", unfreeze(token)),
        at(head, unfreeze, optional=True),
    ]


def _default(generator: Maker | None, heads: int) -> Maker:
    """What makes prompts: what was given, or else the reading whose count the paper prints."""
    return prompt_generator(heads=heads, fit=True) if generator is None else generator


def left_in(generator: Maker, last: bool = True) -> list[Rule]:
    """A prompt of what each block's part gave, put in for all that follows, the head too."""
    new = insert(generator, hears=ffn, keep=True)
    final = at(nearest(norm, after=block[-1:]), new, optional=True)
    return [at(block, new, optional=True), *([final] if last else [])]


def _specific(generator: Maker) -> list[Rule]:
    """What Adapter-X adds to a mixture: a prompt a block, and the class token is trained."""
    return [
        at(until(block, block), insert(generator, hears=ffn), optional=True),
        at("", unfreeze(token), optional=True),
    ]

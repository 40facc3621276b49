"""Methods first made for point clouds: DAPT (Zhou et al. 2024), IDPT (Zha et al. 2023), PointGST,
Point-PEFT (Tang et al. 2024).

Prompts are left in, for a head that reads them (`reads=` of `backbones.point_mae.PointMAE`).
"""

from __future__ import annotations

from torch import nn

from ..parts import dynamic_adapter, instance_prompt, prompt_generator, scale_shift
from ..parts.adapters import QuickGELU, adapter
from ..parts.geometry import centre_distances, geometry_adapter
from ..parts.graph_spectrum import spectral_adapter, spectral_basis
from ..parts.prompts import prompt
from ..rules.edits import append, insert, parallel, prepend, side, token, unfreeze
from ..rules.relations import holding, inside, nearest, span
from ..rules.roles import attn, block, embed, fc1, fc2, ffn, head, norm, proj, qkv
from ..rules.rule import Rule, at
from ..rules.selector import where
from .adapter_x import left_in

conv = where(nn.Conv1d) | nn.Conv2d | nn.Conv3d  # embeds patches; linears embed their positions


def dapt(rank: int = 64, dropout: float = 0.0, last: bool = True) -> list[Rule]:
    """A dynamic adapter beside each FFN, scale and shift after every operation, prompts left in.

    A prompt is made of what each block's adapter gave, and put after the class token for what
    follows. The class token is trained, so there must be one. Scale and shift stand at the patches'
    embedding, at norms, attention's projections and the FFN's layers. Published sizes: rank 64
    (ModelNet: 72); dropout 0.5, 0, 0.2 for ScanObjectNN's OBJ_BG, OBJ_ONLY, PB_T50_RS. Its code
    adds positions once: PointMAE(every_block=False).

    last  the last block makes a prompt too, which only the head can read; False for a head that
          reads the class token alone, or a mean over tokens

    Source: Zhou et al. 2024 (DAPT)
    """
    operation = (norm | qkv | proj | fc1 | fc2) & inside(block)
    return [
        at(embed & (conv | holding(conv)), scale_shift(), optional=True),
        at(operation, scale_shift()),
        at(ffn, parallel(dynamic_adapter(rank=rank, dropout=dropout))),
        *left_in(prompt_generator(activation=nn.GELU), last),
        at(nearest(norm, after=block[-1:]), scale_shift(), optional=True),
        at("", unfreeze(token)),
        at(head, unfreeze, optional=True),
    ]


def idpt(k: int = 20, first: int = 1) -> list[Rule]:
    """One prompt made of the sample's own tokens, put before the last block; the class token.

    The published position of the prompt, a constant that is not trained, is left out.

    first  tokens before the sample's own: 1, the class token, which is trained; 0 where there is
           none

    Source: Zha et al. 2023 (IDPT)
    """
    return [
        at(block[-1:], insert(instance_prompt(k=k, skip=first), after=first, keep=True)),
        at("", unfreeze(token), optional=first == 0),
        at(head, unfreeze, optional=True),
    ]


def pointgst(rank: int = 36, local: int = 32, centers: str = "**.pos_embed") -> list[Rule]:
    """An adapter beside each FFN and its norm, in the spectrum of the graph of the cloud's centres.

    The centres are what comes to the module that embeds them; attention of the first block makes
    their bases, once for all.

    centers  the address of that module

    Source: Liang et al. 2024 (PointGST)
    """
    first = attn[:1]
    return [
        at(centers, prepend(nn.Identity)),
        at(first, side(spectral_basis(local=local), hears=centers)),
        at(span(norm, ffn), parallel(spectral_adapter(rank=rank), hears=first)),
        at(head, unfreeze, optional=True),
    ]


def point_peft(
    rank: int = 16, tokens: int = 10, first: int = 6, centers: str = "**.pos_embed"
) -> list[Rule]:
    """Prompts in the first blocks, adapters behind FFNs and among neighbours behind all blocks.

    As its code, but that what its memory bank retrieves is not added to the prompts: it asks for
    features that the untouched model gives of the same cloud, a forward before this one. Prompts
    have no place in space, and are in no neighbourhood. Biases, the class token and the last norm
    are trained too.

    first    blocks that have prompts, of `tokens` each
    centers  the address of the module that embeds the cloud's centres

    Source: Tang et al. 2024 (Point-PEFT)
    """
    behind = adapter(rank=rank, activation=QuickGELU, dropout=0.1)
    return [
        at(centers, prepend(nn.Identity)),
        at(attn[:1], side(centre_distances(), hears=centers)),
        at(block[:first], insert(prompt(tokens=tokens, dropout=0.1))),
        at(ffn, append(behind, residual=True)),
        at(block, append(geometry_adapter(rank=rank), residual=True, hears=attn[:1])),
        at(block, unfreeze("**.bias"), optional=True),
        at("", unfreeze(token), optional=True),
        at(nearest(norm, after=block[-1:]) | head, unfreeze, optional=True),
    ]

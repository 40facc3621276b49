"""How wide the keys of an attention are, over all its heads: as its projections tell."""

from __future__ import annotations

from .layers import is_torch_attention, linear_shape
from .module_tree import Site


def key_width(attn: Site) -> int:
    """Features of its keys, and of its values; 0 where its projections do not tell.

    What makes queries, keys and values gives as many features as the last projection takes, for the
    queries, and twice those of the keys: in one (ViT, GPT-2; Falcon, whose heads share keys), two
    (PVT) or three (BERT; Llama, whose keys have fewer heads). Three alike are not followed by one.
    """
    if is_torch_attention(attn.module):
        return int(attn.module.embed_dim)  # type: ignore[arg-type]
    found = [linear_shape(site.module) for site in attn.below()]  # of positions, too (Swin V2's)
    shapes = [shape for shape in found if shape and attn.shape.width in (shape.width, shape.out)]
    outs = [shape.out for shape in shapes]
    if len(outs) == 3 and len({*outs}) == 1:
        return outs[0]
    ends = [i for i, out in enumerate(outs) if out == attn.shape.width]
    if not ends or not 2 <= len(outs) <= 4:
        return 0
    return max(0, sum(outs) - outs[ends[-1]] - shapes[ends[-1]].width) // 2

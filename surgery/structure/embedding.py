"""What the tokens at a place are made of: patches of a map, words, pieces of a line or a volume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from .anatomy import roles_of
from .layers import CONVS, linear_shape
from .module_tree import Site, Tree


class Embedded(NamedTuple):
    """kind    "map" (2-D convolutions), "words", "line" (1-D), "volume" (3-D), or "" (unknown)
    makers  what tells it
    """

    kind: str
    makers: list[Site]


def embedded(site: Site, tree: Tree) -> Embedded:
    """What makes the tokens that come to a site: what embeds nearest above its block.

    What stands beside the blocks of another tower (CLIP's, GIT's image encoder) does not count,
    nor what stands inside a block (T5's table of positions, SegFormer's convolutions).
    """
    blocks = roles_of(tree)["block"]
    for above in site.entry.above():
        if not any(block.order <= above.order < block.end for block in blocks):
            found = [s for child in above.children for s in _makers(child, site, blocks)]
            first = min((b.order for b in blocks if above.order <= b.order < above.end), default=0)
            early = [s for s in found if s.order < first]
            if told := _kind(early or found):
                return told
    return Embedded("", [])


def _makers(child: Site, site: Site, blocks: list[Site]) -> Iterator[Site]:
    """What may embed in a child that holds neither the site nor any block."""
    inside = (site.entry, *blocks)
    if any(child.order <= s.order < child.end for s in inside):
        return
    for each in (child, *child.below()):
        if isinstance(each.module, (*CONVS, nn.Embedding, nn.Linear)):
            yield each


def _kind(found: list[Site]) -> Embedded | None:
    """What these tell; None where they embed nothing."""

    def of(*kinds: type[nn.Module]) -> list[Site]:
        return [s for s in found if isinstance(s.module, kinds)]

    maps, lines, volumes = of(nn.Conv2d), of(nn.Conv1d), of(nn.Conv3d)
    if any(_makes_patches(s.module) for s in maps) or (maps and not lines):
        return Embedded("map", maps)
    if volumes:
        return Embedded("volume", volumes)
    if lines:
        return Embedded("line", lines)
    words = of(nn.Embedding)
    if words and not _are_positions(words, of(nn.Linear)):
        return Embedded("words", words)
    return None


def _makes_patches(conv: nn.Module) -> bool:
    """Whether it reads several positions. (Point-BERT's DGCNN has Conv2d that read one.)"""
    return isinstance(conv, nn.Conv2d) and (max(conv.kernel_size) > 1 or max(conv.stride) > 1)


def _are_positions(tables: list[Site], linears: list[Site]) -> bool:
    """Whether tables may be of positions, and a linear layer embed (SigLIP 2, Pix2Struct).

    A layer that takes what a table gives makes it wider (ALBERT, ELECTRA), and embeds nothing.
    """
    widths = {s.module.embedding_dim for s in tables}
    shapes = [shape for s in linears if (shape := linear_shape(s.module))]
    return any(shape.width not in widths and shape.out in widths for shape in shapes)

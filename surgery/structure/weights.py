"""Places that are parameters: a weight, or some of its rows, and who computes with it.

Most weights belong to a module that is called. Those of nn.MultiheadAttention, of experts in one
tensor, of a table that is tied to a head, nobody calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .dataflow import dataflow_of
from .layers import CONVS, Shape, forward_of, is_torch_attention, linear_shape
from .module_tree import Site, Tree
from .path import Step

BIASES = {"weight": "bias", "in_proj_weight": "in_proj_bias"}  # the rows of one go with the other's


class ParameterSite(Site):
    """A place that is a parameter, or rows of it: (out, in), (experts, out, in) or a vector.

    module   the module that holds it; its path ends with the name of the parameter
    name     of the parameter; bias: the name of the one that is added to what it gives, or ""
    rows     those that are meant; None: all
    reader   the site of the module that computes with it: its own, unless that is never called
    others   where modules share it: the same parameter, by its other names
    tied     whether it is meant wherever modules share it
    """

    others: Sequence[ParameterSite] = ()
    tied = True

    def __init__(self, holder: Site, name: str, rows: slice | None, reader: Site) -> None:
        super().__init__(holder.module, holder, (*holder.steps, Step(name, 0, 1)))
        self.name, self.rows, self.reader = name, rows, reader
        bias = BIASES.get(name, "")
        self.bias = bias if holder.module._parameters.get(bias) is not None else ""
        self.order, self.end = holder.order, holder.order + 1
        if rows is not None:
            self.path += f"[{rows.start}:{rows.stop}]"

    @property
    def is_stack(self) -> bool:
        """Whether it is one matrix for each of several experts."""
        return self.parameter.dim() == 3 and not isinstance(self.module, CONVS)

    @property
    def parameter(self) -> nn.Parameter:
        """The whole of it, as it is now."""
        parameter: Any = self.module._parameters[self.name]
        return parameter  # type: ignore[no-any-return]

    def read_shape(self, leave_out: Any = ()) -> None:
        size = self.parameter.shape
        out = size[-2] if self.is_stack else size[0]
        if self.rows is not None:
            out = len(range(*self.rows.indices(out)))
        width = size[-1] if self.is_stack else self.parameter[0].numel()
        self._shape = Shape(out if self.parameter.dim() == 1 else width, out, -1)


def parameter_site(
    tree: Tree,
    holder: Site,
    name: str,
    rows: slice | None = None,
    tied: bool = True,
    uncalled: bool = False,
) -> ParameterSite:
    """The place of a parameter of a module, the same one each time.

    tied      wherever modules share it; False: of this one alone
    uncalled  whether it is read by what is called around the module, as a file says
    """
    known = tree.memo.setdefault("parameters", {})
    key = (holder, name, None if rows is None else (rows.start, rows.stop), tied)
    if key not in known:
        reader = reader_by_forward(tree, holder) or _reader(holder, uncalled)
        site = known[key] = ParameterSite(holder, name, rows, reader)
        site.tied = tied
        if tied:
            site.others = [
                ParameterSite(s, n, rows, _reader(s))
                for s, n in _names(tree).get(id(site.parameter), [])
                if (s, n) != (holder, name)
            ]
    found: ParameterSite = known[key]
    return found


def _names(tree: Tree) -> dict[int, list[tuple[Site, str]]]:
    """By the id of a parameter, the sites of the modules that hold it, and its names there."""
    if "names of parameters" not in tree.memo:
        names: dict[int, list[tuple[Site, str]]] = {}
        for site in tree.sites:
            for name, p in site.module._parameters.items():
                names.setdefault(id(p), []).append((site, name))
        tree.memo["names of parameters"] = names
    found: dict[int, list[tuple[Site, str]]] = tree.memo["names of parameters"]
    return found


def reader_by_forward(tree: Tree, holder: Site) -> Site | None:
    """What computes with the weight of a layer that it does not call, as a forward tells.

    None where the layer is called, or nothing tells. (F.linear(x, self.qkv.weight, bias) in timm's
    BEiT, EVA and Swin V2, whose bias is another for queries and values alone.)
    """
    dataflow = dataflow_of(tree)
    if dataflow is None or linear_shape(holder.module) is None:
        return None
    trace = dataflow.trace
    if trace.calls_of(holder.module):
        return None
    readers = {
        id(op.call.module)
        for op in trace.ops
        for value in op.inputs
        if op.call and any(holder.module in w.holders for w in value.weights or ())
    }
    return next((site for site in holder.above() if id(site.module) in readers), None)


def _reader(holder: Site, uncalled: bool = False) -> Site:
    """Who computes with what a module holds: itself, or what is called around it."""
    above = [*([] if uncalled else [holder]), *holder.above()]
    if holder.parent is not None and reads_its_projection(holder.parent.module):
        return holder.parent
    called = (s for s in above if forward_of(s.module) is not nn.Module.forward)
    return next(called, above[-1])


def reads_its_projection(module: nn.Module) -> bool:
    """Whether it computes with the weights of its children without calling them."""
    return forward_of(module) is nn.MultiheadAttention.forward


def operand_weights(tree: Tree, attn: Site) -> list[Site]:
    """The weights that make query, key and value in torch's own attention: a third of one, or own.

    >>> tree = Tree(nn.MultiheadAttention(8, 2))
    >>> [site.path for site in operand_weights(tree, tree.root)]
    ['in_proj_weight[0:8]', 'in_proj_weight[8:16]', 'in_proj_weight[16:24]']
    """
    weights, _ = torch_projections(tree, attn)
    if len(weights) != 1:
        return weights
    width = weights[0].out // 3
    thirds = [slice(i * width, (i + 1) * width) for i in range(3)]
    return [parameter_site(tree, attn, "in_proj_weight", rows) for rows in thirds]


def torch_projections(tree: Tree, attn: Site) -> tuple[list[Site], list[Site]]:
    """The weights of torch's own attention that make query, key and value, and its output.

    >>> tree = Tree(nn.MultiheadAttention(8, 2))
    >>> [site.path for sites in torch_projections(tree, tree.root) for site in sites]
    ['in_proj_weight', 'out_proj.weight']
    """
    if not (is_torch_attention(attn.module) and reads_its_projection(attn.module)):
        return [], []
    own = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    held = attn.module._parameters
    makes: list[Site] = [parameter_site(tree, attn, n) for n in own if held.get(n) is not None]
    holding = [s for s in attn.children if s.module._parameters.get("weight") is not None]
    return makes, [parameter_site(tree, s, "weight") for s in holding]

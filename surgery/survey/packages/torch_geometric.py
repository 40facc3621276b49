"""Models of torch_geometric: graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, ...]]


class _Graph(nn.Module):
    """Layers of one kind over a graph, and a head for every node."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inside = nn.Linear(8, 32)
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.inside(x)
        for layer in self.layers:
            x = layer(x, edges)
        y: Tensor = self.head(x)
        return y


def _edges() -> Tensor:
    return torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])


def gps() -> Built:
    """GPS: each layer a convolution of neighbours beside attention among all, then a network.

    ffn: layers.*.mlp layers.*.conv.nn?
    qkv: -
    proj: -
    head: head
    prompts: no; tokens are nodes of graphs
    """
    from torch_geometric.nn import GINConv, GPSConv

    def layer() -> nn.Module:
        local = GINConv(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)))
        return GPSConv(32, local, heads=2)

    return _Graph(layer), (torch.randn(6, 8), _edges())


def graph_transformer() -> Built:
    """TransformerConv: attention along edges, no network.

    ffn: -
    qkv: layers.*.lin_{key,query,value}
    proj: -
    head: head
    prompts: no; tokens are nodes of graphs
    """
    from torch_geometric.nn import TransformerConv

    return _Graph(lambda: TransformerConv(32, 16, heads=2)), (torch.randn(6, 8), _edges())

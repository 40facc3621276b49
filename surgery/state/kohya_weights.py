"""What the weight of a layer becomes by tensors of LyCORIS: W', of W and what a file has for it.

Of lycoris-lora 4.1, each as its `get_merged_weight` says with a multiplier of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from einops import rearrange
from torch import Tensor

Tensors = Mapping[str, Tensor]
LORA = {"lora_A.weight", "lora_B.weight"}
LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LOKR = [
    {*first, *second}
    for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
]


BIASES = {"diff_b", "b_norm"}  # what is added to a bias
KNOWN = {
    *LORA, *LOHA, *(name for names in LOKR for name in names), *BIASES, "diff", "w_norm", "alpha",
    "hada_t1", "hada_t2", "lokr_t2", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "weight",
    "on_input", "oft_blocks", "rescale", "dora_scale", "lora_magnitude_vector", "lora_B.bias",
}  # fmt: skip


def rank_of(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """What alpha is divided by; None: the scale is 1, whatever alpha is."""
    for name in ("lora_A.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "b2.weight"):
        if shapes.get(name):
            return shapes[name][0]
    return None


def _scale(t: Tensors, alpha: float) -> float:
    rank = rank_of({name: tuple(tensor.shape) for name, tensor in t.items()})
    return alpha / rank if rank and alpha else 1.0


def _lora(W: Tensor, t: Tensors, alpha: float) -> Tensor:
    change = t["lora_B.weight"].flatten(1) @ t["lora_A.weight"].flatten(1)
    return W + _scale(t, alpha) * change.reshape(W.shape)


def _loha(W: Tensor, t: Tensors, alpha: float) -> Tensor:
    one, two = (t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"].flatten(1) for i in (1, 2))
    return W + _scale(t, alpha) * (one * two).reshape(W.shape)


def _lokr(W: Tensor, t: Tensors, alpha: float) -> Tensor:
    one = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    two = t["lokr_w2"].flatten(1) if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return W + _scale(t, alpha) * torch.kron(one, two).reshape(W.shape)


def _glora(W: Tensor, t: Tensors, alpha: float) -> Tensor:
    down, up = t["a1.weight"].flatten(1), t["a2.weight"].flatten(1)
    own = torch.einsum("o i ..., i r, r j -> o j ...", W, down, up)
    change = t["b1.weight"].flatten(1) @ t["b2.weight"].flatten(1)
    return W + _scale(t, alpha) * (own + change.reshape(W.shape))


def _ia3(W: Tensor, t: Tensors, alpha: float) -> Tensor:
    axis = 1 if t["on_input"] else 0
    shape = [1] * W.dim()
    shape[axis] = -1
    scaled: Tensor = W * (1 + t["weight"].reshape(shape))
    return scaled


def _oft(W: Tensor, t: Tensors, alpha: float) -> Tensor:
    """Outputs turned in blocks; with four axes, in a butterfly of such."""
    R = _rotations(t["oft_blocks"], alpha * len(W))
    if R.dim() == 3:
        blocks = W.reshape(len(R), -1, *W.shape[1:])
        new = torch.einsum("k n m, k n ... -> k m ...", R, blocks).reshape(W.shape)
    else:
        new = W
        for i, turn in enumerate(R):
            far = 2**i * (R.shape[-1] // 2)
            near = rearrange(new, "(c g k) ... -> (c k g) ...", g=2, k=far)
            blocks = near.reshape(len(turn), -1, *W.shape[1:])
            near = torch.einsum("b i j, b j ... -> b i ...", turn, blocks).reshape(W.shape)
            new = rearrange(near, "(c k g) ... -> (c g k) ...", g=2, k=far)
    scaled: Tensor = new * t["rescale"] if "rescale" in t else new
    return scaled


def _rotations(blocks: Tensor, most: float) -> Tensor:
    """(I + Q) (I - Q)^-1 of skew Q, which is no longer than `most`, where that is not 0."""
    Q = blocks - blocks.mT
    length = Q.square().sum().sqrt() + 1e-8
    Q = torch.where(length > most, Q * most / length, Q) if most > 0 else Q
    eye = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype)
    rotations: Tensor = torch.linalg.solve(eye - Q, eye + Q, left=False)
    return rotations


def _lengths(W: Tensor, lengths: Tensor) -> Tensor:
    """Rows, or columns where there is one row of lengths, of these lengths."""
    axis = 0 if lengths.dim() < 2 or len(lengths) == len(W) else 1
    others = [i for i in range(W.dim()) if i != axis]
    now = torch.linalg.vector_norm(W, dim=others, keepdim=True) + torch.finfo(W.dtype).eps
    scaled: Tensor = W * (lengths.reshape(now.shape) / now)
    return scaled


def _forms() -> list[tuple[set[str], Callable[[Tensor, Tensors, float], Tensor]]]:
    """What is done to a weight, by the names of the tensors that do it."""
    return [
        (LORA, _lora),
        (LOHA, _loha),
        *((names, _lokr) for names in LOKR),
        ({"a1.weight", "a2.weight", "b1.weight", "b2.weight"}, _glora),
        ({"weight", "on_input"}, _ia3),
        ({"oft_blocks"}, _oft),
        ({"oft_blocks", "rescale"}, _oft),
        ({"diff"}, lambda W, t, alpha: W + t["diff"]),
        ({"w_norm"}, lambda W, t, alpha: W + t["w_norm"]),
    ]


def changed(W: Tensor, t: Tensors, alpha: float) -> Tensor:
    """W', in W's shape and in float32 at least. Raises RuntimeError where they do not fit."""
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    t = {name: tensor.to(W) if tensor.dim() else tensor for name, tensor in t.items()}
    form = form_of(set(t) - {"dora_scale"})
    assert form is not None
    new = form(W, t, alpha)
    if new.shape != W.shape:
        raise RuntimeError(f"{tuple(new.shape)} is no weight of {tuple(W.shape)}")
    return _lengths(new, t["dora_scale"]) if "dora_scale" in t else new


def form_of(names: set[str]) -> Callable[[Tensor, Tensors, float], Tensor] | None:
    """What tensors of these names do to a weight; None: no known thing."""
    return next((form for known, form in _forms() if known == names), None)

"""A timm vision transformer with a fresh head, from timm's own weights or from a local file."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import timm
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn


def vit(
    name: str = "vit_base_patch16_224",
    num_classes: int = 1000,
    *,
    pretrained: bool = False,
    checkpoint: str | PathLike[str] | None = None,
) -> VisionTransformer:
    """timm's model `name`; its head is the file's where that has num_classes rows, else new.

    pretrained   timm downloads its own weights of that name
    checkpoint   or a local file: .npz of Google (ViT-B_16.npz, augreg_*.npz of ImageNet-21k),
                 .safetensors or .pth of timm; other image sizes are interpolated, as timm does

    Raises ValueError if both are given, if timm has no vision transformer of that name, and if
    the file leaves anything but the head unfilled; FileNotFoundError if there is no such file.
    Source: Dosovitskiy et al. 2021; weights: Steiner et al. 2022 (AugReg).

    >>> vit("vit_tiny_patch16_224", num_classes=100).head
    Linear(in_features=192, out_features=100, bias=True)
    """
    if pretrained and checkpoint is not None:
        raise ValueError(f"vit({name!r}): pretrained and checkpoint are both given. Give one.")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(
            f"vit({name!r}): there is no file {str(checkpoint)!r}. Nothing is downloaded for "
            "checkpoint=: give a file that is there, or pretrained=True, which asks timm's hub."
        )
    model: object = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    if not isinstance(model, VisionTransformer):
        fact = f"it is a {type(model).__name__}, no VisionTransformer"
        raise ValueError(f"vit({name!r}): {fact}. Use timm.create_model({name!r}).")
    if checkpoint is not None:
        load_weights(model, str(checkpoint))
    return model


def load_weights(model: VisionTransformer, path: str) -> None:
    """The weights of a file into `model`, by timm's own readers."""
    if path.endswith(".npz"):
        model.load_pretrained(path)
        return
    state = checkpoint_filter_fn(timm.models.load_state_dict(path), model)
    for key in ("head.weight", "head.bias"):
        if key in state and state[key].shape != getattr(model.state_dict().get(key), "shape", ()):
            del state[key]
    loaded = model.load_state_dict(state, strict=False)
    if lacking := [key for key in loaded.missing_keys if not key.startswith("head")]:
        fact = f"{len(lacking)} tensors are not in it, such as {lacking[0]}"
        raise ValueError(f"vit(checkpoint={path!r}): {fact}. Give weights of this architecture.")

"""A small vision transformer pretrained on printed glyphs: the source task of a transfer demo.

Letters and symbols of the DejaVu fonts that matplotlib carries are bent at random and
put through the same steps as the handwritten digits of scikit-learn: a 32x32 nearly
black-and-white bitmap, ink counted in 4x4 blocks to give 8x8, then enlarged to 16x16.
No digit is among them, nor a glyph that nearly coincides with one; "O" and the like remain.

    python -m surgery.demo.glyphs     # writes glyphs.safetensors beside this file
"""

from __future__ import annotations

import math
import unicodedata
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer
from torch import Tensor

PATH = Path(__file__).with_name("glyphs.safetensors")
HEAD = ("head.weight", "head.bias")

STYLES = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
}
FONTS = [family + style for family, styles in STYLES.items() for style in styles]
HELD_OUT = ("DejaVuSansMono-Oblique", "DejaVuSerif-Bold")  # fonts never trained on
BLOCKS = (range(0x100), range(0x370, 0x460))  # Latin and its symbols; Greek and Cyrillic
DIGITS = "0123456789"
BATCH = 64


# --- The model ---------------------------------------------------------------


def build(num_classes: int) -> VisionTransformer:
    """A vision transformer of 675,000 parameters: [B, 1, 16, 16] in 0..1 -> [B, num_classes]."""
    return VisionTransformer(
        img_size=16,
        patch_size=4,
        in_chans=1,
        num_classes=num_classes,
        embed_dim=96,
        depth=6,
        num_heads=4,
    )


def pretrained(num_classes: int, path: Path = PATH) -> VisionTransformer:
    """The backbone stored at `path` in float32 under a fresh head of `num_classes` outputs."""
    model = build(num_classes)
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) != set(HEAD) or unexpected:
        raise ValueError(f"{path} does not fit: missing {missing}, unexpected {unexpected}")
    return model


# --- The glyphs --------------------------------------------------------------


class Glyphs(NamedTuple):
    """Every class in every font.

    images: [classes, fonts, 48, 48] float32, ink 0..1; the longer side of a glyph spans 40 pixels.
    characters: one per class.
    """

    images: Tensor
    characters: str


def load_fonts() -> list[FT2Font]:
    """The fonts of FONTS, at 64 pixels to the em."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = [FT2Font(str(folder / f"{name}.ttf")) for name in FONTS]
    for font in fonts:
        font.set_size(64, 72)
    return fonts


def is_candidate(character: str) -> bool:
    """Whether this is an unaccented letter or a symbol of one of BLOCKS."""
    in_block = any(ord(character) in block for block in BLOCKS)
    return (
        in_block
        and unicodedata.category(character)[0] in "LSP"
        and not unicodedata.decomposition(character)
    )


def draw(font: FT2Font, character: str) -> Tensor:
    """One glyph centred in [48, 48], ink 0..1, its longer side scaled to 40 pixels."""
    font.set_text(character)
    font.draw_glyphs_to_bitmap(antialiased=True)
    ink = torch.from_numpy(np.array(font.get_image(), dtype=np.float32)) / 255
    rows, columns = ink.amax(1).nonzero(), ink.amax(0).nonzero()
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = 40 / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    size = (height, width)
    ink = F.interpolate(ink[None, None], size=size, mode="bilinear", antialias=True)[0, 0]
    top, left = (48 - height) // 2, (48 - width) // 2
    return F.pad(ink, (left, 48 - width - left, top, 48 - height - top))


def distinct(images: Tensor, reserved: int, limit: float = 0.9) -> list[int]:
    """Indices of images [N, 48, 48] that correlate below `limit` with all kept before them.

    The first `reserved` images count as kept but are not returned.
    """
    flat = F.avg_pool2d(images, 2).flatten(1)
    flat = F.normalize(flat - flat.mean(1, keepdim=True), dim=1)
    similarity = flat @ flat.T
    kept = list(range(reserved))
    for i in range(reserved, len(images)):
        if similarity[i, kept].max() < limit:
            kept.append(i)
    return kept[reserved:]


def load_glyphs() -> Glyphs:
    """Draw every candidate that all fonts hold, less those much like a digit or one another."""
    fonts = load_fonts()
    shared = set.intersection(*(set(font.get_charmap()) for font in fonts))
    candidates = "".join(filter(is_candidate, map(chr, sorted(shared))))
    plain = torch.stack([draw(fonts[0], c) for c in DIGITS + candidates])
    kept = distinct(plain, reserved=len(DIGITS))
    characters = "".join((DIGITS + candidates)[i] for i in kept)
    images = [torch.stack([draw(font, c) for font in fonts]) for c in characters]
    return Glyphs(torch.stack(images), characters)


# --- Random handwriting ------------------------------------------------------


def uniform(low: float, high: float, *shape: int, rng: torch.Generator) -> Tensor:
    """Numbers in low..high, of the given shape."""
    return low + (high - low) * torch.rand(shape, generator=rng)


def random_grid(batch: int, size: int, rng: torch.Generator) -> Tensor:
    """Where each output pixel reads its input: [batch, size, size, 2], -1..1 across the image."""
    angle = uniform(-0.2, 0.2, batch, rng=rng)  # radians: 11 degrees either way
    shear = uniform(-0.2, 0.2, batch, rng=rng)
    scale = uniform(0.95, 1.2, batch, 2, rng=rng)
    shift = uniform(-0.06, 0.06, batch, 2, 1, rng=rng)
    cos, sin = angle.cos(), angle.sin()
    rotate = torch.stack([cos, -sin, sin, cos], dim=1).view(batch, 2, 2)
    slant = torch.eye(2).repeat(batch, 1, 1)
    slant[:, 0, 1] = shear
    matrix = rotate @ slant @ torch.diag_embed(1 / scale)
    affine = F.affine_grid(
        torch.cat([matrix, shift], dim=2), [batch, 1, size, size], align_corners=False
    )
    bend = uniform(-0.08, 0.08, batch, 2, 4, 4, rng=rng)  # a wavering hand
    bend = F.interpolate(bend, size=(size, size), mode="bicubic", align_corners=True)
    return affine + bend.permute(0, 2, 3, 1)


def random_stroke(images: Tensor, rng: torch.Generator) -> Tensor:
    """Thicken or thin the strokes of [B, 1, H, W] at random, leaving ink nearly black and white."""
    blurred = F.avg_pool2d(F.avg_pool2d(images, 3, stride=1, padding=1), 3, stride=1, padding=1)
    threshold = uniform(0.15, 0.45, len(images), 1, 1, 1, rng=rng)
    return (8 * (blurred - threshold) + 0.5).clamp(0, 1)


def enlarge(images: Tensor) -> Tensor:
    """[B, 1, 8, 8] -> [B, 1, 16, 16], intensities unchanged: digits and glyphs both pass here."""
    return F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)


def scrawl(images: Tensor, rng: torch.Generator) -> Tensor:
    """Glyphs [B, 48, 48] -> [B, 1, 16, 16] in 0..1, as if written by hand and scanned at 8x8."""
    grid = random_grid(len(images), 32, rng)
    bitmap = F.grid_sample(images[:, None], grid, align_corners=False)
    return enlarge(F.avg_pool2d(random_stroke(bitmap, rng), 4))


def sample(
    glyphs: Glyphs, fonts: list[int], batch: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A random batch in the given fonts: images [batch, 1, 16, 16] and classes [batch]."""
    labels = torch.randint(len(glyphs.characters), (batch,), generator=rng)
    font = torch.tensor(fonts)[torch.randint(len(fonts), (batch,), generator=rng)]
    return scrawl(glyphs.images[labels, font], rng), labels


# --- Pretraining -------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float = 4e-3, warmup: int = 100) -> float:
    """Linear warm-up to `peak`, then a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


@torch.inference_mode()
def held_out_accuracy(model: VisionTransformer, glyphs: Glyphs, batches: int = 16) -> float:
    """The share, 0..1, of 256 * batches bent glyphs of the held-out fonts named rightly."""
    rng = torch.Generator().manual_seed(1)
    fonts = [FONTS.index(name) for name in HELD_OUT]
    model.eval()
    hits = 0
    for _ in range(batches):
        images, labels = sample(glyphs, fonts, 256, rng)
        hits += (model(images).argmax(1) == labels).sum().item()
    return hits / (256 * batches)


def pretrain(steps: int = 3600, seed: int = 0, path: Path = PATH) -> dict[str, Tensor]:
    """Train on glyphs, store the backbone at `path`, return its float32 state without the head."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    glyphs = load_glyphs()
    fonts = [i for i, name in enumerate(FONTS) if name not in HELD_OUT]
    model = build(len(glyphs.characters)).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    loss_column = TextColumn("loss {task.fields[loss]:.2f}")
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), loss_column) as progress:
        task = progress.add_task("Pretraining on glyphs", total=steps, loss=float("nan"))
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
            images, labels = sample(glyphs, fonts, BATCH, rng)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update(task, advance=1, loss=loss.item())
    accuracy = held_out_accuracy(model, glyphs)
    print(
        f"{accuracy:.3f} of glyphs in held-out fonts named rightly, "
        f"of {len(glyphs.characters)} classes"
    )
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in HEAD}
    store(
        state,
        path,
        steps=steps,
        seed=seed,
        source_accuracy=round(accuracy, 4),
        classes=len(glyphs.characters),
    )
    return state


def store(state: dict[str, Tensor], path: Path, **facts: float) -> None:
    """Write the state as float16 with `facts` and a description as metadata (safetensors)."""
    metadata = {name: str(value) for name, value in facts.items()}
    metadata["description"] = (
        "timm VisionTransformer backbone without its head, 16x16x1 input, pretrained on letters "
        "and symbols of the DejaVu fonts bent at random (no digits); stored as float16, to be "
        "used as float32"
    )
    save_file({name: tensor.half() for name, tensor in state.items()}, path, metadata)


if __name__ == "__main__":
    pretrain()

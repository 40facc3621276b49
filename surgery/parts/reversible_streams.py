"""Blocks as two reversible streams (Liao et al. 2023, MEFT), whose activations are not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import get_device_states, set_device_states

from ..errors import GraftError, RuleError
from ..rules.part import part
from ..structure.module_tree import Site
from .adapters import Adapter
from .arguments import positive

Pair: TypeAlias = tuple[Tensor, Tensor]
Half: TypeAlias = Callable[[Tensor], Tensor]
SCALES = {1: (0.1, 1.0), 2: (1.0, 0.1), 3: (0.1, 0.1)}  # lam, beta of each variant
KEEP = {1: 4, 2: 4, 3: 2}  # blocks, so that in float32 errors of 6e-8 grow to some 1e-4
MOST = 1e-2  # relative error of a pair that the inverse gave, which gradients would inherit
PRE_NORM = ["norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"]


class SmallAdapter(Adapter):
    """A bottleneck adapter whose two weights start normal with deviation `std`, biases zero.

    >>> SmallAdapter(768, rank=8).up.weight.std().item() < 0.021
    True
    """

    starts_at_zero = False

    def __init__(
        self,
        width: int,
        rank: int = 8,
        *,
        out: int | None = None,
        std: float = 0.02,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__(width, rank, out=out, activation=activation)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=std)


class Conditions(NamedTuple):
    """What half a block ran on and under: the strides of its input, random numbers, autocast."""

    strides: tuple[int, ...]  # torch chooses other paths by them, which keep other tensors
    requires_grad: bool  # of the input
    cpu_rng: Tensor
    devices: list[int]
    device_rngs: list[Tensor]
    kind: str  # of device: "cpu", "cuda", "meta"
    autocast: dict[str, Any]

    @classmethod
    def now(cls, x: Tensor) -> Conditions:
        """Those that a half on x would run under now."""
        kind = x.device.type
        autocast = {
            "enabled": kind != "meta" and torch.is_autocast_enabled(kind),
            "dtype": None if kind == "meta" else torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        rng = torch.get_rng_state()
        return cls(x.stride(), x.requires_grad, rng, *get_device_states(x), kind, autocast)

    def input(self, x: Tensor) -> Tensor:
        """The input again, with its strides, cut off from what gave it."""
        x = x.detach()
        if x.stride() != self.strides:
            x = torch.empty_strided(x.shape, self.strides, dtype=x.dtype, device=x.device).copy_(x)
        return x.requires_grad_(self.requires_grad)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A context with the random numbers and the autocast of then."""
        kind = "cuda" if self.kind == "cpu" else self.kind
        with torch.random.fork_rng(self.devices, device_type=kind):
            torch.set_rng_state(self.cpu_rng)
            set_device_states(self.devices, self.device_rngs, device_type=kind)
            if self.kind == "meta":  # which has no autocast
                yield
                return
            with torch.autocast(self.kind, **self.autocast):
                yield


class Tape:
    """What the way back has of a forward: the last pair, and those before every `keep`-th block.

    Tensors that autograd would keep of a half are numbered instead. When one is asked for, the
    half is run again on an input that the inverse gives; only one block's tensors exist at a time.
    """

    def __init__(self, streams: Reversible) -> None:
        self.streams = streams
        self.conditions: dict[tuple[int, int], Conditions] = {}  # of each half of each block
        self.shapes: dict[tuple[int, int], list[torch.Size]] = {}  # of what autograd would keep
        self.pairs: dict[int, Pair] = {}  # before block k, detached
        self.inverted: tuple[int, Pair] | None = None  # the last pair that the inverse gave
        self.rebuilt: tuple[int, list[list[Tensor]]] = -1, []  # a block, the tensors of its halves

    def mark(self, k: int, pair: Pair) -> None:
        """Keep the pair before block k."""
        self.pairs[k] = pair[0].detach(), pair[1].detach()

    def run(self, k: int, half: int, x: Tensor) -> Tensor:
        """Half a block forward, with numbers for what autograd would keep."""
        self.conditions[k, half] = Conditions.now(x)
        shapes = self.shapes[k, half] = []

        def pack(tensor: Tensor) -> int:
            shapes.append(tensor.shape)
            return len(shapes) - 1

        with saved_tensors_hooks(pack, lambda number: self.tensor(k, half, number)):
            return self.streams.run_half(k, half, x)

    def tensor(self, k: int, half: int, number: int) -> Tensor:
        """A tensor of the forward, by its number."""
        if self.rebuilt[0] != k:
            self.invert(k)
        return self.rebuilt[1][half][number]

    def before(self, k: int) -> Pair:
        """The pair before block k: kept, or by the inverse of block k."""
        if k in self.pairs:
            return self.pairs[k]
        if self.inverted is None or self.inverted[0] != k:
            self.invert(k)
        _, pair = self.inverted or (k, self.pairs[k])
        return pair

    def invert(self, k: int) -> None:
        """Invert block k, its halves run again as they ran, their tensors written down."""
        y1, y2 = self.streams.unswapped(self.before(k + 1))
        self.rebuilt = -1, []  # let go of the block after it
        g, of_g = self.rerun(k, 1, y1)
        x2 = (y2 - g) / self.streams.beta
        f, of_f = self.rerun(k, 0, x2)
        x1 = (y1 - f) / self.streams.lam
        self.rebuilt = k, [of_f, of_g]
        self.inverted = k, (x1, x2)
        self.check(k, x1, x2)

    def check(self, k: int, x1: Tensor, x2: Tensor) -> None:
        """Raise where a pair that is known (the first is x, x) was not brought back well."""
        known = self.pairs.get(k, (x2, x1) if k == 0 else None)
        if known is None:
            return
        errors = [(x - want).norm() / want.norm() for x, want in zip((x1, x2), known, strict=True)]
        if (error := max(ratio.item() for ratio in errors)) > MOST:
            _raise_later(
                f"reversible(keep={self.streams.keep})",
                f"rounding errors grew to {error:.1e} of the features on the way back to block {k}:"
                " gradients would be wrong.",
                "Give a smaller keep (1 is exact), larger lam and beta, or a finer dtype.",
            )

    def rerun(self, k: int, half: int, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What half a block gives, and the tensors that autograd would keep of it."""
        conditions = self.conditions[k, half]
        tensors: list[Tensor] = []

        def pack(tensor: Tensor) -> None:
            tensors.append(tensor.detach())

        with conditions.restored(), torch.enable_grad(), saved_tensors_hooks(pack, _unread):
            out = self.streams.run_half(k, half, conditions.input(x)).detach()
        if [tensor.shape for tensor in tensors] != self.shapes[k, half]:
            raise GraftError(
                f"reversible streams, block {k}",
                f"run again for its gradient, it kept other tensors ({len(tensors)}) than in the "
                f"forward ({len(self.shapes[k, half])}).",
                "Leave the model's mode and parts as they are between forward and backward.",
            )
        return out, tensors


def _raise_later(rule: str, fact: str, remedy: str) -> None:
    """Raise at the end of the backward that runs: an error inside it would keep its graph alive."""

    def fail() -> None:
        raise GraftError(rule, fact, remedy)

    torch.autograd.Variable._execution_engine.queue_callback(fail)


def _unread(_: None) -> Tensor:
    raise AssertionError("nothing goes back through a run that was made again")


class Reversible(nn.Module):
    """y1 = lam x1 + F(x2), y2 = beta x2 + G(y1) through all blocks, from x1 = x2 = x; their mean.

    variant 1   F the block, G an adapter, then (x1, x2) = (y2, y1)
            2   F an adapter, G the block, then (x1, x2) = (y2, y1)
            3   F the block's attention and G its FFN, both with their residual sums
    blocks      borrowed from the base, with what is grafted inside them; adapters one for each
    keep        a pair is kept before every so many blocks too; 0: the last alone

    Gradients are those of the plain forward, to the rounding of the inverse; the activations of
    one block exist at a time. Each block back, rounding errors grow by about 1 / (lam beta): `keep`
    bounds that, and a backward whose pairs come back wrong by more than 1 % raises GraftError.
    Compiled, traced or under torch.func, activations are kept as in any model.
    """

    blocks: nn.Sequential

    def __init__(
        self,
        blocks: nn.Sequential,
        adapters: list[nn.Module],
        variant: int,
        scales: tuple[float, float],
        keep: int = 0,
    ) -> None:
        super().__init__()
        self.__dict__["blocks"] = blocks  # of the base: no child, or it would be stored twice
        self.adapters = nn.ModuleList(adapters)
        self.variant, (self.lam, self.beta), self.keep = variant, scales, keep
        self.mixes_tokens = True

    def forward(self, x: Tensor) -> Tensor:
        tape = Tape(self) if torch.is_grad_enabled() and not _is_traced() else None
        run = self.run_half if tape is None else tape.run
        pair = x, x
        for k in range(len(self.blocks)):
            if tape is not None and self.keep and k % self.keep == 0:
                tape.mark(k, pair)
            x1, x2 = pair
            y1 = torch.add(run(k, 0, x2), x1, alpha=self.lam)
            y2 = torch.add(run(k, 1, y1), x2, alpha=self.beta)
            pair = self.unswapped((y1, y2))
        if tape is not None:
            tape.mark(len(self.blocks), pair)
        return (pair[0] + pair[1]) / 2

    def run_half(self, k: int, half: int, x: Tensor) -> Tensor:
        """F (half 0) or G (half 1) of block k."""
        block: Any = self.blocks[k]
        if self.variant == 3:
            return _ffn(block, x) if half else _attention(block, x)
        out = self.adapters[k](x) if half == self.variant % 2 else block(x)
        if isinstance(out, Tensor) and out.shape == x.shape:
            return out
        raise GraftError(
            f"reversible(variant={self.variant})",
            f"block {k}, a {type(block).__name__}, does not give one tensor of the shape it takes.",
            "Use it where blocks take and give one tensor (b, n, width).",
        )

    def unswapped(self, pair: Pair) -> Pair:
        """The streams change places after each block, but in variant 3; twice is as it was."""
        return pair if self.variant == 3 else (pair[1], pair[0])

    def extra_repr(self) -> str:
        return f"variant={self.variant}, lam={self.lam}, beta={self.beta}, keep={self.keep}"


def _is_traced() -> bool:
    return (
        torch.compiler.is_compiling()  # first: the others cannot be compiled
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
    )


def _attention(block: Any, x: Tensor) -> Tensor:
    y: Tensor = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    return y


def _ffn(block: Any, x: Tensor) -> Tensor:
    y: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return y


@part
def small_adapter(
    site: Site, rank: int = 8, std: float = 0.02, activation: type[nn.Module] = nn.GELU
) -> nn.Module:
    """A bottleneck adapter that starts small instead of at zero: up(act(down(x))).

    rank        hidden units
    std         deviation of both weights at the start; biases start at zero

    Parameters: width * rank + rank + rank * out + out.
    Source: Liao et al. 2023 (MEFT).

    >>> small_adapter(rank=16)
    small_adapter(rank=16)
    """
    positive("small_adapter", rank=rank)
    return SmallAdapter(site.width, rank, out=site.out, std=std, activation=activation)


@part
def reversible(
    site: Site,
    variant: int = 1,
    rank: int = 8,
    lam: float | None = None,
    beta: float | None = None,
    keep: int | None = None,
) -> nn.Module:
    """Run an nn.Sequential of blocks as two reversible streams: replace(reversible()).

    variant    1, 2 or 3 (see `Reversible`); 1 and 2 add an adapter of `rank` for each block
    lam, beta  the streams' scales, not 0; None: 0.1 and 1, 1 and 0.1, 0.1 and 0.1 by variant
    keep       a pair is kept before every so many blocks, which bounds rounding errors; 0: none,
               and memory does not grow with depth (the paper), for few blocks or float64; None: 4,
               or 2 for variant 3, which holds in float32

    It does not start as the identity: the base's features come out nearly, mixed with those of
    the block before. Raises RuleError where the site is not an nn.Sequential of equal blocks of
    one width, features last, or for variant 3 not of pre-norm blocks as timm's ViT has them.
    Parameters: blocks * (2 * width * rank + rank + width), none for variant 3.
    Source: Liao et al. 2023 (MEFT).

    >>> reversible(variant=2)
    reversible(variant=2)
    """
    positive("reversible", rank=rank, **({"keep": keep} if keep else {}))
    call = f"reversible(variant={variant!r}, lam={lam!r}, beta={beta!r})"
    if variant not in SCALES:
        raise RuleError(call, "there are variants 1, 2 and 3.", "Give one of them.")
    a, b = SCALES[variant]
    scales = (a if lam is None else lam, b if beta is None else beta)
    if not all(isinstance(scale, (int, float)) and scale * 0 == 0 != scale for scale in scales):
        raise RuleError(
            call,
            "a stream that is scaled by 0 cannot be brought back.",
            "Give finite numbers other than 0; None for the paper's.",
        )
    blocks: Any = site.module
    if reason := _unfit(site, variant):
        raise RuleError(
            call,
            f"{site.path or 'the model'} {reason}.",
            "Put it on an nn.Sequential of blocks of one width, as timm's ViT has them"
            + (" (variants 1 and 2 take any such)." if variant == 3 else "."),
        )
    count = 0 if variant == 3 else len(blocks)
    adapters: list[nn.Module] = [SmallAdapter(site.width, rank) for _ in range(count)]
    return Reversible(blocks, adapters, variant, scales, KEEP[variant] if keep is None else keep)


def _unfit(site: Site, variant: int) -> str:
    """Why the blocks of a site cannot be run as streams; "" if they can."""
    blocks = site.module
    is_plain = isinstance(blocks, nn.Sequential) and type(blocks).forward is nn.Sequential.forward
    if not is_plain or not len(blocks._modules):
        return f"is a {type(blocks).__name__}, and no nn.Sequential that is called whole"
    kinds = [type(block) for block in blocks.children()]
    if len(set(kinds)) > 1:
        names = dict.fromkeys(kind.__name__ for kind in kinds)
        return f"holds {', '.join(names)}, not blocks of one kind"
    if site.width != site.out or site.axis != -1:
        return f"takes {site.width} features and gives {site.out}, or not on the last axis"
    pre_norm = all(list(block._modules) == PRE_NORM for block in blocks.children())
    if variant == 3 and not pre_norm:
        return f"holds a {kinds[0].__name__}, whose attention and FFN cannot be told apart for sure"
    return ""

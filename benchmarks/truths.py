"""Where a model's roles are by its source, and what is found of them (`benchmarks.packages`).

A truth is told in addresses, one line a role: `ffn: layers.*.(fc1 to fc2)`. A site is compared by
the projections that it holds, so that `layers.*.mlp` is right as well.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

ROLES = ("ffn", "qkv", "proj", "head")


def truth(builder: Callable[..., Any]) -> dict[str, str]:
    """What a builder's docstring tells, by role; a line that is set in goes on with the last."""
    text = re.sub(r"\n +", " ", inspect.getdoc(builder) or "")
    found = [re.fullmatch(r"(\w+): *(.*)", line) for line in text.splitlines()]
    return {match[1]: match[2] for match in found if match}


def addresses(text: str) -> list[str]:
    """The addresses of a line; a span holds spaces of its own."""
    return re.findall(r"(?:\([^()]*\)|[^\s()])+", text) if text != "-" else []


def fitting(model: nn.Module, address: str) -> list[str]:
    """The paths in a model that an address fits."""
    sides = [re.escape(part) for part in address.split("*")]
    pattern = r"[^.]+".join(sides).replace(r"\{", "(?:").replace(r"\}", ")").replace(",", "|")
    paths = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return [path for path in paths if re.fullmatch(pattern, path)]


def projections(model: nn.Module, first: str, last: str) -> frozenset[int]:
    """What holds matrices from one module's registration to another's, as ids."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    inside = [i for i, n in enumerate(names) if f"{n}.".startswith((f"{first}.", f"{last}."))]
    if not first:
        inside = [0, len(names) - 1]
    span = names[min(inside) : max(inside) + 1]
    modules = dict(model.named_modules(remove_duplicate=False))
    return frozenset(_owner(modules, name) for name in span if _projects(modules[name]))


def _owner(modules: dict[str, nn.Module], name: str) -> int:
    """The module, or the layer whose parametrization it is."""
    return id(modules[name.split(".parametrizations.")[0]])


def _projects(module: nn.Module) -> bool:
    """Whether a module has a matrix of its own, and looks nothing up in it."""
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return True
    own = [p for p in module._parameters.values() if p is not None]
    return not isinstance(module, nn.Embedding) and any(_is_matrix(p) for p in own)


def _is_matrix(p: Tensor) -> bool:
    return sum(size > 1 for size in p.shape) >= 2


def expected(model: nn.Module, text: str) -> tuple[set[frozenset[int]], set[frozenset[int]]]:
    """The sites that must be found, and those that may be, each as its projections."""
    must, may = set[frozenset[int]](), set[frozenset[int]]()
    for address in addresses(text):
        sites = must if not address.endswith("?") else may
        sites |= set(_sites(model, address.rstrip("?")))
    return must, may


def _sites(model: nn.Module, address: str) -> Iterator[frozenset[int]]:
    """Each place that an address fits; (a to b) is a span under every owner before it."""
    span = re.fullmatch(r"(?:(.+)\.)?\((\S+) to (\S+)\)", address)
    owners = [""] if not (span and span[1]) else fitting(model, span[1])
    ends = [(o + "." * bool(o) + span[2], o + "." * bool(o) + span[3]) for o in owners if span]
    ends = ends or [(path, path) for path in fitting(model, address)]
    if not ends:
        raise LookupError(f"{address} fits no module")
    for first, last in ends:
        yield projections(model, first, last)


def found(model: nn.Module, example: Any) -> dict[str, set[frozenset[int]]]:
    """The sites of every role, each as its projections; without those of torch's own attention.

    (The weights of nn.MultiheadAttention are right wherever it stands.)
    """
    from surgery.structure.anatomy import roles_of
    from surgery.structure.dataflow import attach_dataflow
    from surgery.structure.module_tree import Tree

    tree = Tree(model)
    attach_dataflow(tree, example)
    roles = roles_of(tree)
    called = {role: [s for s in roles[role] if not is_of_torch(s)] for role in ROLES}
    held = {role: {projections_of(model, s) for s in sites} for role, sites in called.items()}
    return {role: sites - {frozenset()} for role, sites in held.items()}


def is_of_torch(site: Any) -> bool:
    """Whether it is a weight of torch's own attention."""
    return hasattr(site, "reader") and isinstance(site.reader.module, nn.MultiheadAttention)


def projections_of(model: nn.Module, site: Any) -> frozenset[int]:
    if hasattr(site, "reader"):  # the weight of a layer that is not called
        path = site.path.rpartition(".")[0]
        return projections(model, path, path)
    return projections(model, site.entry.path, site.exit.path)


def compared(model: nn.Module, told: dict[str, str], sites: dict[str, Any]) -> dict[str, str]:
    """For every role "" where it is right, or what is too much and what is missing."""
    names = names_of(model)
    verdicts: dict[str, str] = {}
    for role in ROLES:
        if told.get(role, "any") == "any":
            continue
        must, may = expected(model, told[role])
        has = sites[role]
        if role != "ffn":  # each projection for itself
            must, may, has = ({frozenset({i}) for s in x for i in s} for x in (must, may, has))
        extra, missing = has - must - may, must - has
        words = [f"too much: {listed(extra, names)}"] * bool(extra)
        words += [f"missing: {listed(missing, names)}"] * bool(missing)
        verdicts[role] = "; ".join(words)
    return verdicts


def names_of(model: nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


def listed(sites: set[frozenset[int]], names: dict[int, str]) -> str:
    """Sites by the addresses of their projections, numbers as stars."""
    texts: dict[str, int] = {}
    for site in sites:
        paths = sorted(names.get(i, "?") for i in site)
        text = "+".join(re.sub(r"(?<![^.])\d+(?![^.])", "*", path) for path in paths[:3])
        texts[text] = texts.get(text, 0) + 1
    return ", ".join(f"{text} x{n}" for text, n in sorted(texts.items()))

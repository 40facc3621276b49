"""What Surgery finds in models of many packages, beside what their sources say.

The builders in surgery/survey/packages give small models; the docstring of each is the truth, read
off its source by hand: where the feed-forward networks are, what makes queries, keys and values,
what projects their result, what the head is, and whether prompts may be put among the tokens.

    python -m benchmarks.packages                      # every package that there are builders for
    python -m benchmarks.packages vit_pytorch --only "cait|pit" --out page.md
    python -m benchmarks.packages --tree ../other      # what another tree of Surgery finds
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .package_page import PROMPTS, RULES, page
from .truths import (
    ROLES,
    compared,
    expected,
    found,
    is_of_torch,
    listed,
    names_of,
    projections_of,
    truth,
)

BUILDERS = Path(__file__).parents[1] / "surgery/survey/packages"
EXACT = ("adapterx_ffn", "lora", "adaptformer")  # which start as the identity
LIMIT = 180  # seconds for a model
Build = Callable[[], tuple[nn.Module, Any]]

# one model -------------------------------------------------------------------------------------


def built(build: Build) -> tuple[nn.Module, Any]:
    """A model whose gates, scales and last layers are not at zero, as after some training."""
    torch.manual_seed(0)
    model, example = build()
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel() and not p.any():
                p.normal_(std=0.02)
    return model.eval(), example


def call(model: nn.Module, example: Any) -> Any:
    torch.manual_seed(1)
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    from surgery._inputs import tensors_in

    with torch.no_grad():
        tensors = list(tensors_in(call(model, example)))
    return [t.clone() for t in tensors if t.is_floating_point() or t.is_complex()]


def tried(build: Build, rule: str, told: dict[str, str]) -> str:
    """What comes of a rule set on a fresh model: "runs", or what went wrong."""
    import surgery

    model, example = built(build)
    before, marks = outputs(model, example), _marks(model)
    try:
        surgery.apply(model, rule, example=example)
    except Exception as error:
        line = " ".join(str(error).split())
        kind = "refused" if isinstance(error, surgery.SurgeryError) else type(error).__name__
        return f"{kind}: {line[:1200]}"
    wrong = _misplaced(build, told) if rule == "lora" else []
    after = outputs(model, example)
    if rule in EXACT and not _same(before, after):
        wrong.append("another output at the start")
    done = f"runs{_without_prompts(rule, model)}"
    _move(model)
    wrong += [] if "idle" in told else _without_gradient(model, example)
    model.zero_grad(set_to_none=True)
    surgery.revert(model)
    changed = [m for m, value in _marks(model).items() if marks.get(m) != value]
    wrong += [f"revert left {len(changed)} marks changed: {', '.join(changed[:2])}"] * bool(changed)
    return "; ".join(wrong) or done


def _without_prompts(rule: str, model: nn.Module) -> str:
    """What is to be said of a rule set that found no place for its prompts, and may do so."""
    parts = model.get_submodule("surgery").named_modules()
    some = any(name.endswith("insert") for name, _ in parts)
    return "" if some or rule not in PROMPTS else ", without prompts"


def _move(model: nn.Module) -> None:
    """Move all parts a little from where they start, or zeros hide what comes before them."""
    with torch.no_grad():
        for p in model.get_submodule("surgery").parameters():
            p.add_(0.02 * torch.randn_like(p))


def _marks(model: nn.Module) -> dict[str, Any]:
    import surgery

    marks = surgery.fingerprint(model).items()
    theirs = ("random", "numbers")  # what a model counts of its own forwards (rotary tables)
    return {m: v for m, v in marks if not (m.startswith(theirs) or m.endswith(theirs))}


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether outputs are the same but for rounding: parts leave some fused kernels unused."""
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.numel()]
    return all(_distance(a, b) <= 1e-6 * max(1.0, a.abs().max().item()) for a, b in pairs)


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().nan_to_num(0.0).max().item()


def _without_gradient(model: nn.Module, example: Any) -> list[str]:
    """Parts whose gradient is none, or zero throughout."""
    from surgery._inputs import tensors_in

    with torch.enable_grad():
        made = [t for t in tensors_in(call(model, example)) if t.requires_grad]
        if not made:
            return ["no output has a gradient"]
        torch.stack(
            [(t.float() * torch.randn_like(t.float())).sum() for t in made]
        ).sum().backward()
    parts: dict[str, bool] = {}
    for name, p in model.get_submodule("surgery").named_parameters():
        part = ".".join(name.split(".")[:2])
        some = p.grad is not None and bool(p.grad.abs().max() > 0)
        parts[part] = parts.get(part, False) or some
    dry = [part for part, some in parts.items() if not some]
    return [f"{len(dry)} of {len(parts)} parts without a gradient ({dry[0]})"] if dry else []


def _misplaced(build: Build, told: dict[str, str]) -> list[str]:
    """Where lora stands that is no q, k or v, and which it leaves out."""
    import surgery

    model, example = built(build)
    sites = surgery.plan(model, "lora", example=example).sites
    places = [site for site in sites if not is_of_torch(site)]
    has = {frozenset({i}) for site in places for i in projections_of(model, site)}
    must, may = expected(model, told.get("qkv", "-"))
    must, may = ({frozenset({i}) for s in x for i in s} for x in (must, may))
    extra, missing, names = has - must - may, must - has, names_of(model)
    words = [f"wrong places: {listed(extra, names)}"] * bool(extra)
    return [*words, *([f"partial, without {listed(missing, names)}"] if missing else [])]


def score(build: Build, rules: Sequence[str]) -> dict[str, Any]:
    """Roles with an example and without, and what comes of each rule set."""
    told = truth(build)
    row: dict[str, Any] = {"truth": told}
    for word, given in (("with", True), ("without", False)):
        model, example = built(build)
        try:
            sites = found(model, example if given else None)
            row[word] = compared(model, told, sites)
        except Exception as error:
            row[word] = {r: f"{type(error).__name__}: {str(error)[:200]}" for r in ROLES}
    row["rules"] = {}
    for rule in rules:
        try:
            row["rules"][rule] = tried(build, rule, told)
        except Exception as error:
            row["rules"][rule] = f"BROKEN {type(error).__name__}: {str(error)[:300]}"
    return row


# all of them -----------------------------------------------------------------------------------


def builders(package: str) -> dict[str, Build]:
    """The functions of a package's file, by name."""
    name = f"builders_of_{package}"
    spec = importlib.util.spec_from_file_location(name, BUILDERS / f"{package}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    functions = {n: f for n, f in vars(module).items() if inspect.isfunction(f)}
    return {n: f for n, f in functions.items() if n[0] != "_" and f.__module__ == name}


def one_package(package: str, only: str, rules: Sequence[str]) -> None:
    """Score a package's models, a line of JSON each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {LIMIT} s")

    signal.signal(signal.SIGALRM, late)
    for name, build in builders(package).items():
        if only and not re.fullmatch(only, name):
            continue
        signal.alarm(LIMIT)
        try:
            row = score(build, rules)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        signal.alarm(0)
        print("ROW " + json.dumps({"package": package, "name": name, **row}), flush=True)


def scores(
    packages: list[str], only: str, rules: Sequence[str], tree: str = ""
) -> list[dict[str, Any]]:
    """The rows of several packages, each scored in a process of its own."""
    rows: list[dict[str, Any]] = []
    for package in packages:
        command = [sys.executable, "-m", __spec__.name, package, "--here", "--tree", tree]
        command += ["--only", only, "--rules", *rules]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
        rows += [json.loads(line) for line in lines]
        if done.returncode:
            rows.append({"package": package, "name": "?", "error": done.stderr.strip()[-300:]})
        print(f"{package}: {len(lines)}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", help="all there are builders for")
    parser.add_argument("--only", default="", help="a pattern of names")
    parser.add_argument("--rules", nargs="*", default=RULES, help="these rule sets alone")
    parser.add_argument("--tree", default="", help="a folder whose surgery is to be judged")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=None, help="write the rows to this file")
    parser.add_argument("--out", type=Path, default=None, help="write the page to this file")
    given = parser.parse_args()
    files = sorted(p.stem for p in BUILDERS.glob("*.py") if p.stem != "__init__")
    packages = given.packages or files
    if unknown := {*packages} - {*files}:
        parser.error(f"there are no builders for {', '.join(sorted(unknown))}")
    if given.tree:
        sys.path.insert(0, str(Path(given.tree).resolve()))
    if given.here:
        return one_package(packages[0], given.only, given.rules)
    rows = scores(packages, given.only, given.rules, given.tree)
    if given.json:
        given.json.write_text("\n".join(json.dumps(row) for row in rows))
    (given.out.write_text if given.out else print)(page(rows))
    return None


if __name__ == "__main__":
    main()

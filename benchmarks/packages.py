"""What Surgery finds in models of many packages, beside what their sources say.

The builders in surgery/survey/packages give small models; the docstring of each is the truth, read
off its source by hand: where the feed-forward networks are, what makes queries, keys and values,
what projects their result, what the head is, and whether prompts may be put among the tokens.

    python -m benchmarks.packages                      # every package that is installed
    python -m benchmarks.packages vit_pytorch --only cait --out page.md

Set PYTHONPATH to another tree to judge what that one finds.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BUILDERS = Path(__file__).parents[1] / "surgery/survey/packages"
ROLES = ("ffn", "qkv", "proj", "head")
RULES = ("adapterx_ffn", "lora", "adaptformer", "ssf", "arc", "vpt_deep", "adapterx")
EXACT = ("adapterx_ffn", "lora", "adaptformer")  # which start as the identity
LIMIT = 180  # seconds for a model
Build = Callable[[], tuple[nn.Module, Any]]

# the truth, and the addresses it is told in -----------------------------------------------------


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


def found(model: nn.Module, example: Any) -> dict[str, set[frozenset[int]]]:
    """The sites of every role, each as its projections."""
    from surgery.structure.anatomy import roles_of
    from surgery.structure.dataflow import attach_dataflow
    from surgery.structure.module_tree import Tree

    tree = Tree(model)
    attach_dataflow(tree, example)
    roles = roles_of(tree)
    return {role: {_of_site(model, s) for s in roles[role]} - {frozenset()} for role in ROLES}


def _of_site(model: nn.Module, site: Any) -> frozenset[int]:
    return projections(model, site.entry.path, site.exit.path)


def compared(model: nn.Module, told: dict[str, str], sites: dict[str, Any]) -> dict[str, str]:
    """For every role "" where it is right, or what is too much and what is missing."""
    names = _names(model)
    verdicts: dict[str, str] = {}
    for role in ROLES:
        if told.get(role, "any") == "any":
            continue
        must, may = expected(model, told[role])
        has = sites[role]
        if role != "ffn":  # each projection for itself
            must, may, has = ({frozenset({i}) for s in x for i in s} for x in (must, may, has))
        extra, missing = has - must - may, must - has
        words = [f"too much: {_listed(extra, names)}"] * bool(extra)
        words += [f"missing: {_listed(missing, names)}"] * bool(missing)
        verdicts[role] = "; ".join(words)
    return verdicts


def _names(model: nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


def _listed(sites: set[frozenset[int]], names: dict[int, str]) -> str:
    """Sites by the addresses of their projections, numbers as stars."""
    texts: dict[str, int] = {}
    for site in sites:
        paths = sorted(names.get(i, "?") for i in site)
        text = "+".join(re.sub(r"(?<![^.])\d+(?![^.])", "*", path) for path in paths[:3])
        texts[text] = texts.get(text, 0) + 1
    return ", ".join(f"{text} x{n}" for text, n in sorted(texts.items()))


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
        return f"{kind}: {line[:400]}"
    wrong = _misplaced(build, told) if rule == "lora" else []
    after = outputs(model, example)
    if rule in EXACT and not _same(before, after):
        wrong.append("another output at the start")
    _move(model)
    wrong += [] if "idle" in told else _without_gradient(model, example)
    model.zero_grad(set_to_none=True)
    surgery.revert(model)
    changed = [m for m, value in _marks(model).items() if marks.get(m) != value]
    wrong += [f"revert left {len(changed)} marks changed: {', '.join(changed[:2])}"] * bool(changed)
    return "; ".join(wrong) if wrong else "runs"


def _move(model: nn.Module) -> None:
    """Move all parts a little from where they start, or zeros hide what comes before them."""
    with torch.no_grad():
        for p in model.get_submodule("surgery").parameters():
            p.add_(0.02 * torch.randn_like(p))


def _marks(model: nn.Module) -> dict[str, Any]:
    import surgery

    return {m: v for m, v in surgery.fingerprint(model).items() if not m.startswith("random")}


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    pairs = zip(before, after, strict=True)
    return all(torch.allclose(a, b, 1e-5, 1e-6, equal_nan=True) for a, b in pairs)


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
    places = surgery.plan(model, "lora", example=example).sites
    has = {frozenset({i}) for site in places for i in _of_site(model, site)}
    must, may = expected(model, told.get("qkv", "-"))
    must, may = ({frozenset({i}) for s in x for i in s} for x in (must, may))
    extra, missing, names = has - must - may, must - has, _names(model)
    words = [f"wrong places: {_listed(extra, names)}"] * bool(extra)
    return [*words, *([f"partial, without {_listed(missing, names)}"] if missing else [])]


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


def scores(packages: list[str], only: str, rules: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of several packages, each scored in a process of its own."""
    rows: list[dict[str, Any]] = []
    for package in packages:
        command = [sys.executable, "-P", __file__, package, "--here", "--only", only]
        command += ["--rules", *rules]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
        rows += [json.loads(line) for line in lines]
        if done.returncode:
            rows.append({"package": package, "name": "?", "error": done.stderr.strip()[-300:]})
        print(f"{package}: {len(lines)}", file=sys.stderr, flush=True)
    return rows


# the page --------------------------------------------------------------------------------------


def outcome(row: dict[str, Any], rule: str) -> str:
    """One word for what came of a rule set, in the light of the truth."""
    came, told = row["rules"].get(rule, ""), row["truth"]
    if not came:
        return "not tried"
    if came == "runs":
        return "runs" if _may(rule, told) else "accepted though it cannot be right"
    if not came.startswith("refused"):
        return "wrong" if not came.startswith("partial") else "partial"
    idle = "idle" in told and "gradient" in came
    known = (reason := told.get("refuses", "").partition(";")[0]) and reason in came
    plain = _must(rule, told) and not idle and not known
    return "refused though plain" if plain else "rightly refused"


def _may(rule: str, told: dict[str, str]) -> bool:
    return not (rule in ("vpt_deep", "adapterx") and told.get("prompts", "").startswith("no"))


def _needed(told: dict[str, str], role: str) -> bool:
    """Whether the model has a role for certain."""
    return any(not address.endswith("?") for address in addresses(told.get(role, "-")))


def _must(rule: str, told: dict[str, str]) -> bool:
    if rule in ("vpt_deep", "adapterx"):
        plain = told.get("prompts", "").startswith("yes")
        return plain and (rule == "vpt_deep" or _needed(told, "ffn"))
    needs = {"lora": ("qkv",), "ssf": (), "arc": ("qkv", "ffn")}.get(rule, ("ffn",))
    return all(_needed(told, role) for role in needs)


def page(rows: list[dict[str, Any]]) -> str:
    """Counts, a line for each model, and every disagreement in words."""
    good = [row for row in rows if "error" not in row]
    text = [f"{len(good)} models of {len({r['package'] for r in good})} packages", ""]
    for word in ("with", "without"):
        ffns = sum(not r[word].get("ffn") for r in good)
        whole = sum(not any(r[word].values()) for r in good)
        text.append(f"- {word} an example: networks right in {ffns}, all roles in {whole}")
    words = ("runs", "rightly refused", "refused though plain", "partial", "wrong",
             "accepted though it cannot be right")  # fmt: skip
    text += ["", f"| rule set | {' | '.join(words)} |", f"|---|{'---:|' * len(words)}"]
    for rule in RULES:
        came = [outcome(row, rule) for row in good]
        text.append(f"| `{rule}` | {' | '.join(str(came.count(w)) for w in words)} |")
    text += ["", "| model | roles with | without | " + " | ".join(RULES) + " |"]
    text += ["|---" * (3 + len(RULES)) + "|", *map(_line, good), "", *_details(rows)]
    return "\n".join(text) + "\n"


def _line(row: dict[str, Any]) -> str:
    def roles(word: str) -> str:
        return ", ".join(r for r, wrong in row[word].items() if wrong) or "right"

    cells = [f"{row['package']}.{row['name']}", roles("with"), roles("without")]
    return "| " + " | ".join([*cells, *(outcome(row, rule) for rule in RULES)]) + " |"


def _details(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        lines = list(_disagreements(row))
        if lines:
            yield from (f"### {row['package']}.{row['name']}", "", *lines, "")


def _disagreements(row: dict[str, Any]) -> Iterator[str]:
    if "error" in row:
        yield f"- {row['error']}"
        return
    for word in ("with", "without"):
        for role, wrong in row[word].items():
            if wrong and not (word == "without" and row["with"].get(role) == wrong):
                yield f"- {role} {word} example: {wrong}"
    for rule in RULES:
        if outcome(row, rule) not in ("runs", "rightly refused", "not tried"):
            yield f"- `{rule}` {outcome(row, rule)}: {row['rules'][rule]}"
    if lines := row["truth"].get("prompts"):
        yield f"- prompts by the source: {lines}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", help="all there are builders for")
    parser.add_argument("--only", default="", help="a pattern of names")
    parser.add_argument("--rules", nargs="*", default=RULES, help="these rule sets alone")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=None, help="write the rows to this file")
    parser.add_argument("--out", type=Path, default=None, help="write the page to this file")
    given = parser.parse_args()
    files = sorted(p.stem for p in BUILDERS.glob("*.py") if p.stem != "__init__")
    packages = given.packages or files
    if given.here:
        return one_package(packages[0], given.only, given.rules)
    rows = scores(packages, given.only, given.rules)
    if given.json:
        given.json.write_text("\n".join(json.dumps(row) for row in rows))
    (given.out.write_text if given.out else print)(page(rows))
    return None


if __name__ == "__main__":
    main()

"""Imports go strictly downward, cost little, and every public word is explained by an example."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import surgery
from surgery.pattern import Pattern

ROOT = Path(surgery.__file__).parents[1]

FLOORS = {
    "chance": 0,
    "demo": 0,
    "demo.fit": 0,
    "demo.glyphs": 0,
    "errors": 0,
    "example": 0,
    "leaf": 0,
    "ops": 0,
    "pytest_plugin": 0,
    "spec.fault": 0,
    "spec.law": 0,
    "spec.transformer": 0,
    "survey.guess": 0,
    "survey.shrink": 0,
    "table": 0,
    "address": 1,
    "demo.pictures": 1,
    "survey.feed": 1,
    "term": 1,
    "trace": 1,
    "account": 2,
    "products": 2,
    "survey.zoo": 2,
    "tree": 2,
    "experts": 3,
    "flow": 3,
    "part": 3,
    "pattern": 3,
    "spec.seen": 3,
    "tokens": 3,
    "edit": 4,
    "feedforward": 4,
    "fold": 4,
    "insertion": 4,
    "parts.adapter": 4,
    "parts.arc": 4,
    "parts.combined": 4,
    "parts.domains": 4,
    "parts.fact": 4,
    "parts.gated": 4,
    "parts.instance": 4,
    "parts.moa": 4,
    "parts.mosa": 4,
    "parts.prompt": 4,
    "parts.rep": 4,
    "parts.rows": 4,
    "parts.scale": 4,
    "parts.sparse": 4,
    "relation": 4,
    "feeds": 5,
    "graft": 5,
    "parts.binary": 5,
    "parts.conv": 5,
    "parts.dynamic": 5,
    "parts.kronecker": 5,
    "parts.lora": 5,
    "parts.reversible": 5,
    "rule": 5,
    "named": 6,
    "parts.elastic": 6,
    "parts.skills": 6,
    "parts.vera": 6,
    "parts.vida": 6,
    "place": 6,
    "role": 6,
    "room": 6,
    "parts": 7,
    "proof": 7,
    "rulesets.arc": 7,
    "rulesets.attention": 7,
    "rulesets.baselines": 7,
    "rulesets.combined": 7,
    "rulesets.meft": 7,
    "rulesets.noah": 7,
    "rulesets.projections": 7,
    "rulesets.prompts": 7,
    "rulesets.scale": 7,
    "rulesets.sparse": 7,
    "stock": 7,
    "rulesets.adapters": 8,
    "rulesets.adapterx": 8,
    "rulesets.binary": 8,
    "rulesets.conv": 8,
    "rulesets.factored": 8,
    "rulesets.lowrank": 8,
    "rulesets.mixed": 8,
    "spec.strategies": 8,
    "words": 8,
    "rulesets.points": 9,
    "rulesets": 10,
    "meeting": 11,
    "plan": 12,
    "operate": 13,
    "merge": 14,
    "sensitivity": 14,
    "show": 14,
    "spec.case": 14,
    "state": 14,
    "survey.look": 14,
    "": 15,
    "combine": 15,
    "packed": 15,
    "spec.matching": 15,
    "spec.mixing": 15,
    "subnet": 15,
    "survey.report": 15,
    "survey.run": 15,
    "demo.digits": 16,
    "demo.recipe": 16,
    "search": 16,
    "spec.function": 16,
    "spec.routing": 16,
    "survey": 16,
    "demo.points": 17,
    "spec.parameters": 17,
    "spec.life": 18,
    "spec.check": 19,
    "cli": 20,
    "spec": 20,
    "spec.test_model": 20,
    "__main__": 21,
}


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT / "surgery").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted((ROOT / "surgery").rglob("*.py"))}


def floor(name: str) -> int | None:
    """A file that is not listed stands on the floor of its folder; None: on no floor."""
    while name not in FLOORS and "." in name:
        name = name.rpartition(".")[0]
    return FLOORS.get(name)


def imported(name: str, source: str) -> set[str]:
    """The modules of surgery that a text imports, anywhere in it; "" is the package itself."""
    package = name if name == "" or FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {_inner(alias.name.split(".")) for alias in node.names} - {None}
        elif isinstance(node, ast.ImportFrom):
            base = ["surgery", *package.split(".")] if package else ["surgery"]
            start = base[: len(base) + 1 - node.level] if node.level else []
            start = [*start, *(node.module.split(".") if node.module else [])]
            found |= {_inner([*start, alias.name]) for alias in node.names} - {None}
    return found


def _inner(path: list[str]) -> str | None:
    """The module of surgery at the start of a dotted path, the longest there is."""
    if path[0] != "surgery":
        return None
    inner = path[1:]
    while ".".join(inner) not in FILES:
        inner = inner[:-1]
    return ".".join(inner)


def test_every_file_stands_on_a_floor():
    assert {name: floor(name) for name in FILES if floor(name) is None} == {}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_strictly_downward(name):
    upward = {
        other for other in imported(name, FILES[name].read_text()) if floor(other) >= floor(name)
    }
    assert upward == set()


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("role", "import surgery.plan", {"plan"}),
        ("role", "import torch, surgery", {""}),
        ("role", "from .tree import Site", {"tree"}),
        ("role", "from . import edit, ops", {"edit", "ops"}),
        ("role", "from surgery import apply, state", {"", "state"}),
        ("role", "def f():\n    from surgery.state import load", {"state"}),
        ("parts.adapter", "from ..part import part", {"part"}),
        ("parts.adapter", "from .. import ops", {"ops"}),
        ("parts", "from .moa import moa", {"parts.moa"}),
        ("", "from . import ops\nfrom .parts import moa", {"ops", "parts.moa"}),
        ("role", "import torch\nfrom timm.layers import Mlp", set()),
    ],
)
def test_imports_are_seen_in_every_form(name, text, found):
    assert imported(name, text) == found


def test_the_engine_really_imports_something():
    assert {"graft", "place", "meeting", "tree"} <= imported("plan", FILES["plan"].read_text())


@pytest.mark.parametrize(
    ("folder", "above"),
    [("backbones", {"surgery"}), ("pointcloud", {"surgery", "backbones", "torch_geometric"})],
)
def test_what_stands_beside_imports_nothing_of_what_stands_on_it(folder, above):
    """And torch-geometric, whose import takes seconds, in one file that is imported late."""
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        tree = ast.parse(file.read_text())
        types = {id(n) for held in ast.walk(tree) if _is_for_types(held) for n in ast.walk(held)}
        told = [n for n in ast.walk(tree) if id(n) not in types]
        modules = [n.module or "" for n in told if isinstance(n, ast.ImportFrom)]
        modules += [a.name for n in told if isinstance(n, ast.Import) for a in n.names]
        known = above - ({"torch_geometric"} if file.name == "geometric.py" else set())
        assert not known & {m.split(".")[0] for m in modules}, file


def _is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_importing_pointcloud_imports_no_optional_package():
    code = "import sys, torch, pointcloud as p; p.group_points(torch.randn(1, 64, 3), 4, 4)\n"
    code += "p.chamfer(torch.randn(1, 64, 3), torch.randn(1, 64, 3))\n"
    heavy = [*HEAVY, "h5py", "surgery", "backbones"]
    assert fresh(code + f"print([n for n in {heavy} if n in sys.modules])") == "[]"


@pytest.mark.parametrize("name", ["address", "errors", "table"])
def test_strings_know_nothing_of_torch(name):
    text = FILES[name].read_text()
    assert not re.search(r"^\s*(from|import)\s+torch", text, re.MULTILINE)


HEAVY = ["timm", "torch_geometric", "matplotlib", "hypothesis", "sklearn", "transformers"]
HEAVY += ["peft", "rich", "pytest", "torchvision", "pandas", "scipy"]


def fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_importing_surgery_imports_no_optional_package():
    code = f"import sys, surgery; print([n for n in {HEAVY} if n in sys.modules])"
    assert fresh(code) == "[]"


def test_applying_rules_imports_no_optional_package():
    code = "import sys, torch, surgery\nfrom surgery import *\n"
    code += "m = torch.nn.TransformerEncoderLayer(24, 3, 48)\n"
    code += "m = torch.nn.Sequential(m)\n"
    code += "apply(m, 'adapterx_ffn'); str(report(m)); revert(m)\n"
    assert fresh(code + f"print([n for n in {HEAVY} if n in sys.modules])") == "[]"


# words


def public() -> dict[str, object]:
    return {name: getattr(surgery, name) for name in surgery.__all__}


EXPLAINED = {
    name: value
    for name, value in public().items()
    if not isinstance(value, (Pattern, ModuleType, surgery.edit.Trained, surgery.edit.Token))
}


def test_all_names_what_exists_once():
    assert len(set(surgery.__all__)) == len(surgery.__all__)
    assert all(hasattr(surgery, name) for name in surgery.__all__)


def test_star_import_shadows_no_builtin():
    import builtins

    assert [name for name in surgery.__all__ if hasattr(builtins, name)] == []


@pytest.mark.parametrize("name", EXPLAINED)
def test_every_public_word_has_a_docstring_of_its_own(name):
    doc = inspect.getdoc(EXPLAINED[name]) or ""
    assert doc.splitlines()[0].endswith((".", ":")) or ":" in doc.splitlines()[0]
    assert not doc.startswith(f"{name}(")  # which dataclass writes where there is none


@pytest.mark.parametrize(
    "name", [name for name, value in EXPLAINED.items() if not inspect.isclass(value)]
)
def test_every_public_function_has_an_example(name):
    assert ">>> " in (inspect.getdoc(EXPLAINED[name]) or "")


@pytest.mark.parametrize(
    "name", [name for name, value in EXPLAINED.items() if not inspect.isclass(value)]
)
def test_no_public_signature_takes_anything_by_name(name):
    kinds = {p.kind for p in inspect.signature(EXPLAINED[name]).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds

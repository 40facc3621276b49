"""Imports go strictly downward, cost little, and every public word is explained by an example."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import surgery
from surgery.rules.edits import Token, Trained
from surgery.rules.selector import Selector

ROOT = Path(surgery.__file__).parents[1]

# from the ground up; a file of the package itself stands in the room that lists it
ROOMS = {
    "ground": {"errors", "_table", "_rng", "_inputs", "_text", "_files", "_preserve", "_shards"},
    "structure": set(),
    "rules": set(),
    "parts": set(),
    "methods": set(),
    "engine": set(),
    "state": set(),
    "training": set(),
    "integrations": set(),
    "survey": set(),
    "spec": set(),
    "demo": set(),
    "face": {"", "cli", "_resolve", "_export", "__main__", "pytest_plugin"},
}
FLOOR = {room: floor for floor, room in enumerate(ROOMS)}
BUILDERS = "survey.packages"  # one file a package, a folder within its room


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT / "surgery").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted((ROOT / "surgery").rglob("*.py"))}


def room_of(name: str) -> str | None:
    """The room of a module: its folder, or the one that lists it; None: no room."""
    folder = name.partition(".")[0]
    listed = (room for room, files in ROOMS.items() if name in files)
    inside = FILES[name].parent.name == folder or f"{name}.".startswith(f"{BUILDERS}.")
    return folder if inside else next(listed, None)


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


def upward(name: str, source: str) -> set[str]:
    """What a text of that module imports from a room above its own."""
    floor = FLOOR[room_of(name)]
    return {other for other in imported(name, source) if FLOOR[room_of(other)] > floor}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import one another, each the next and the last the first; none: empty."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_file_is_in_a_room_and_every_room_is_listed_once():
    assert {name for name in FILES if room_of(name) not in FLOOR} == set()
    folders = {f.parent.name for f in FILES.values()} - {"surgery", FILES[BUILDERS].parent.name}
    assert folders == {room for room, files in ROOMS.items() if not files}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_downward(name):
    assert upward(name, FILES[name].read_text()) == set()


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_in_a_room(room):
    inside = [name for name in FILES if room_of(name) == room]
    arrows = {name: imported(name, FILES[name].read_text()) & {*inside} - {name} for name in inside}
    assert circle(arrows) == []


BESIDE = ("benchmarks", "pointcloud", "backbones")


def siblings(folder: str, source: str) -> set[str]:
    """The files of a flat folder that a text of it imports, anywhere in it."""
    paths: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = [folder] if node.level else []
            start += [node.module] if node.module else []
            paths += [".".join([*start, alias.name]) for alias in node.names]
    inner = [path.split(".")[1:2] or [""] for path in paths if path.split(".")[0] == folder]
    return {name if (ROOT / folder / f"{name}.py").is_file() else "__init__" for [name] in inner}


@pytest.mark.parametrize("folder", BESIDE)
def test_no_circle_beside_surgery(folder):
    files = {file.stem: file.read_text() for file in (ROOT / folder).glob("*.py")}
    arrows = {name: siblings(folder, source) - {name} for name, source in files.items()}
    assert circle(arrows) == []


def test_imports_of_siblings_are_seen_in_every_form():
    text = "from . import sample\nfrom .group import Groups\nimport pointcloud.draw, torch\n"
    text += (
        "def f():\n    from pointcloud import load, metrics\n    from pointcloud.data import take"
    )
    assert siblings("pointcloud", text) == {
        "sample", "group", "draw", "__init__", "metrics", "data",
    }  # fmt: skip


def test_upward_imports_and_circles_are_seen():
    assert upward("structure.path", "from ..engine.hooks import HookedSite") == {"engine.hooks"}
    assert upward("engine.hooks", "def f():\n    from surgery.state import load") == {"state"}
    assert upward("engine.hooks", "from ..structure.path import match") == set()
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize("name", sorted({*FILES} - {""}))
def test_no_name_hides_a_module(name):
    """`import surgery.engine.planning as p` is the module, and so is the attribute."""
    package, _, own = f"surgery.{name}".rpartition(".")
    if own == "__main__":
        pytest.skip("it is run, not imported")
    module = importlib.import_module(f"surgery.{name}")
    assert getattr(importlib.import_module(package), own) is module


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("rules.roles", "import surgery.engine.planning", {"engine.planning"}),
        ("rules.roles", "import torch, surgery", {""}),
        ("rules.roles", "from .selector import Selector", {"rules.selector"}),
        ("rules.roles", "from . import edits, rule", {"rules.edits", "rules.rule"}),
        ("rules.roles", "from surgery import apply, state", {"", "state"}),
        ("rules.roles", "def f():\n    from surgery.state import load", {"state"}),
        ("parts.adapters", "from ..rules.part import part", {"rules.part"}),
        ("parts.adapters", "from .. import errors", {"errors"}),
        ("parts", "from .mixture import moa", {"parts.mixture"}),
        ("", "from . import errors\nfrom .parts import moa", {"errors", "parts"}),
        ("rules.roles", "import torch\nfrom timm.layers import Mlp", set()),
    ],
)
def test_imports_are_seen_in_every_form(name, text, found):
    assert imported(name, text) == found


def test_the_engine_really_imports_something():
    source = FILES["engine.planning"].read_text()
    assert {"engine.switch", "engine.matching", "structure.module_tree"} <= imported(
        "engine.planning", source
    )


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


@pytest.mark.parametrize("name", ["structure.path", "errors", "_table", "_text", "_files"])
def test_strings_know_nothing_of_torch(name):
    text = FILES[name].read_text()
    assert not re.search(r"^\s*(from|import)\s+torch", text, re.MULTILINE)


HEAVY = ["timm", "torch_geometric", "matplotlib", "hypothesis", "sklearn", "transformers"]
HEAVY += ["accelerate", "lightning", "peft", "rich", "pytest", "torchvision", "pandas", "scipy"]


def fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_importing_surgery_imports_no_optional_package():
    code = f"import sys, surgery; print([n for n in {HEAVY} if n in sys.modules])"
    assert fresh(code) == "[]"


def test_importing_surgery_costs_little_beside_torch():
    """No compiler, no graphs, no distributed: these cost as much as torch itself."""
    code = "import sys, torch; before = set(sys.modules); import surgery\n"
    code += "new = {n.split('.')[0] for n in set(sys.modules) - before} - {'surgery'}\n"
    code += (
        "new |= {n for n in ('torch._dynamo', 'torch._inductor', 'sympy') if n in sys.modules}\n"
    )
    assert set(eval(fresh(code + "print(sorted(new))"))) <= {"einops", "safetensors"}


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
    if not isinstance(value, (Selector, ModuleType, Trained, Token))
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

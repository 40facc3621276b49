"""How many mistakes the tests see: every mutant that cosmic-ray makes of a file, tested in turn.

    pip install cosmic-ray && python .ci/mutants.py --sample 20 --out mutants.jsonl

Torch and its friends are imported once, and each mutant runs in a fork, in a copy of the checkout:
seconds a mutant, not a minute. Mutants of annotations are left out (nothing evaluates them). What
is done is in --out, one line a mutant; run again, and only what is missing runs, or, with
--survivors, what survived.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPEC = ["tests/spec/test_strategies.py"]
SELECTOR = ["tests/rules/test_selector.py", "tests/engine/test_planning.py"]
LAWS = [
    "tests/laws/test_laws.py",
    "tests/laws/test_operations.py",
    "tests/state/test_checkpoint.py",
]
LAWS += ["tests/engine/test_merging.py"]
ROUTING = ["tests/parts/test_mixture.py", "tests/engine/test_balance.py"]
MERGING = ["tests/engine/test_merge_targets.py", "tests/engine/test_merging.py"]
TESTS = {  # of each file in surgery/, the tests that hold it
    "structure/path": ["tests/structure/test_path.py", *SELECTOR, *SPEC],
    "rules/selector": [*SELECTOR, "tests/structure/test_anatomy.py", *SPEC],
    "rules/routing": [*ROUTING, *SPEC],
    "parts/functional": [*ROUTING, *SPEC],
    "engine/hooks": [
        "tests/parts/test_mixture.py",
        "tests/engine/test_hooks.py",
        "tests/engine/test_uncalled_modules.py",
        "tests/engine/test_fused_encoder.py",
        "tests/laws/test_laws.py",
        *SPEC,
    ],
    "engine/heard": [
        "tests/engine/test_side.py",
        "tests/engine/test_hearing.py",
        "tests/engine/test_uncalled_blocks.py",
    ],
    "engine/losses": [*ROUTING, *SPEC],
    "engine/hooked_weights": [
        "tests/engine/test_hooked_weights.py",
        "tests/engine/test_uncalled_weights.py",
    ],
    "engine/registration": [
        "tests/engine/test_hooks.py",
        "tests/engine/test_streams.py",
        "tests/engine/test_tokens.py",
        "tests/engine/test_uncalled_blocks.py",
        "tests/laws/test_laws.py",
    ],
    "engine/apply": [*LAWS, "tests/parts/test_mixture.py", *SPEC],
    "engine/journal": ["tests/engine/test_journal.py", *LAWS, *SPEC],
    "engine/tokens": [
        "tests/engine/test_tokens.py",
        "tests/methods/test_prompts.py",
        "tests/methods/test_adapter_x.py",
    ],
    "engine/build": ["tests/engine/test_build.py", "tests/engine/test_planning.py"],
    "engine/merging": MERGING,
}
MORE = [  # what may see a survivor
    "tests/engine/test_hooks.py",
    "tests/engine/test_checkpointing.py",
    "tests/test_errors.py",
    "tests/structure/test_dataflow.py",
    "tests/engine/test_planning.py",
]
SLOW = "not fault and not idle_site and not inductor and not shrink and not compile"
# one other operator for each (cosmic-ray knows all pairs); of < and > the bounds and the contrary
PAIRS = (
    "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Pow_Mul", "BitOr_BitAnd", "BitAnd_BitOr",
    "Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt",
    "GtE_Lt", "Is_IsNot", "IsNot_Is", "In_NotIn", "NotIn_In", "Delete_Not", "USub_UAdd",
)  # fmt: skip
Mutant = tuple[str, str, int, str]  # file, operator, occurrence, where


def file_of(name: str, root: Path = ROOT) -> Path:
    """The file of a name, in a checkout."""
    return root / f"surgery/{name}.py"


def drawn(name: str, sample: int | None) -> list[Mutant]:
    """All mutants of a file, or some of them, always the same."""
    mutants_of_file = list(mutants(name))
    if sample is None or sample >= len(mutants_of_file):
        return mutants_of_file
    chosen = random.Random(name).sample(range(len(mutants_of_file)), sample)
    return [mutants_of_file[i] for i in sorted(chosen)]


def mutants(name: str) -> Iterator[Mutant]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = file_of(name).read_text()
    nodes, skip = list(ast_nodes(get_ast(source))), annotations(source)
    for operator in operator_names():
        kind = get_operator(operator)
        paired = "Operator_" in operator and operator.split("Operator_")[1] not in PAIRS
        if kind.arguments() or paired:
            continue
        positions = (place for node in nodes for place in kind().mutation_positions(node))
        for i, (start, end) in enumerate(positions):
            if not any(a <= start and end <= b for a, b in skip):
                yield name, operator, i, f"{start[0]}:{start[1]}"


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(start, end) of every annotation."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        for note in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(note, ast.expr):
                end = (note.end_lineno or 0, note.end_col_offset or 0)
                spans.append(((note.lineno, note.col_offset), end))
    return spans


def mutated(name: str, operator: str, occurrence: int) -> str | None:
    from cosmic_ray.mutating import MutationVisitor
    from cosmic_ray.plugins import get_operator

    source = file_of(name).read_text()
    return MutationVisitor.mutate_code(source, get_operator(operator)(), occurrence)


def tested(copy: Path, name: str, seconds: float, every: bool) -> str:
    """What the tests say of the checkout there: killed, survived, or timeout (which is killed)."""
    child = os.fork()
    if child == 0:
        os.setpgrp()
        run_tests(copy, name, every)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def run_tests(copy: Path, name: str, every: bool) -> None:
    sink = os.open(os.devnull, os.O_WRONLY)
    if not os.environ.get("MUTANTS_LOUD"):
        os.dup2(sink, 1), os.dup2(sink, 2)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    tests = dict.fromkeys([*TESTS[name], *(MORE if every else []), f"surgery/{name}.py"])
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    options += ["-W", "ignore:Module already imported", "-k", SLOW]
    code = 1
    try:
        import pytest
        from hypothesis import Phase, settings

        settings.register_profile("quick", phases=[Phase.generate])  # to fail is enough
        settings.load_profile("quick")
        code = pytest.main([*options, *tests])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(int(code))


def preload() -> None:
    """Import what is slow, and nothing of ours."""
    import hypothesis
    import pytest
    import timm
    import torch
    import torch._dynamo
    import torchvision.models
    import transformers

    assert all((hypothesis, pytest, timm, torchvision))
    for name in ("ViT", "Bert", "GPT2", "Llama", "CLIPVision"):
        getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}Model")
    torch.set_num_threads(1)
    assert "surgery" not in sys.modules


def work(todo: list[Mutant], out: Path, seconds: float, every: bool) -> None:
    folder = Path(tempfile.mkdtemp())
    copy = folder / "checkout"
    ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, copy, ignore=ignored)
    for mutant in todo:
        name, operator, occurrence, where = mutant
        text = mutated(name, operator, occurrence)
        if text is None:
            continue
        target = file_of(name, copy)
        target.write_text(text)
        start = time.monotonic()
        outcome = tested(copy, name, seconds, every)
        target.write_text(file_of(name).read_text())
        row = {"mutant": key(mutant), "outcome": outcome, "s": round(time.monotonic() - start, 1)}
        with out.open("a") as file:
            file.write(json.dumps({"where": f"{name}.py:{where} {operator}", **row}) + "\n")
    shutil.rmtree(folder)


def key(mutant: Mutant) -> str:
    """What a mutant is, in the file as it is now."""
    source = file_of(mutant[0]).read_bytes()
    return f"{mutant[0]} {mutant[1]} {mutant[2]} {hashlib.sha256(source).hexdigest()[:8]}"


def table(rows: dict[str, dict[str, str]], mutants_of: dict[str, list[Mutant]]) -> str:
    """Who survived; and how many were killed of those done, file by file and of all."""
    survived, lines, outcomes = [], [], []
    for name, listed in mutants_of.items():
        done = [rows[key(mutant)] for mutant in listed if key(mutant) in rows]
        survived += [f"survived: {row['where']}" for row in done if row["outcome"] == "survived"]
        lines.append(score(name, [row["outcome"] for row in done]))
        outcomes += [row["outcome"] for row in done]
    return "\n".join([*survived, *lines, score("all", outcomes)])


def score(name: str, outcomes: list[str]) -> str:
    killed, n = sum(outcome != "survived" for outcome in outcomes), len(outcomes)
    return f"{name:17} {killed:4} of {n:4} mutants  {killed / max(n, 1):.1%}"


def read(out: Path) -> dict[str, dict[str, str]]:
    lines = out.read_text().splitlines() if out.exists() else []
    return {row["mutant"]: row for row in map(json.loads, lines)}


def check_as_it_is(names: Iterable[str], seconds: float, every: bool) -> None:
    """The tests must pass on what is not mutated."""
    for name in names:
        outcome = tested(ROOT, name, seconds, every)
        if outcome != "survived":
            sys.exit(f"the tests of {name} fail as it is: {outcome} (MUTANTS_LOUD=1 shows how)")


def work_in_turn(todo: list[Mutant], workers: int, out: Path, seconds: float, every: bool) -> None:
    """Test the mutants in some processes, each its own share."""
    children = []
    for i in range(workers):
        child = os.fork()
        if child == 0:
            work(todo[i::workers], out.resolve(), seconds, every)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def main() -> None:
    given = arguments()
    mutants_of = {name: drawn(name, given.sample) for name in given.files}
    if not given.show:
        rows = read(given.out)
        settled = {
            k for k, row in rows.items() if row["outcome"] == "killed" or not given.survivors
        }
        todo = [m for listed in mutants_of.values() for m in listed if key(m) not in settled]
        preload()
        check_as_it_is(dict.fromkeys(m[0] for m in todo), given.seconds, given.survivors)
        work_in_turn(todo, given.workers, given.out, given.seconds, given.survivors)
    print(table(read(given.out), mutants_of))


def arguments() -> argparse.Namespace:
    files = [name for name in TESTS if file_of(name).is_file()]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", default=files, help=", ".join(files))
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240, help="limit for a mutant")
    parser.add_argument("--sample", type=int, help="mutants of each file, drawn; all by default")
    parser.add_argument("--survivors", action="store_true", help="again, with more tests")
    parser.add_argument("--show", action="store_true", help="the table and the survivors alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()

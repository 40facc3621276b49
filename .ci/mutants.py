"""How many mistakes the tests see: every mutant that cosmic-ray makes of a file, tested in turn.

    pip install cosmic-ray && python .ci/mutants.py --out mutants.jsonl

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
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPEC = ["tests/test_spec.py"]
LIFE = ["tests/test_laws.py", "tests/test_merge.py", "tests/test_state.py"]
TESTS = {
    "address": ["tests/test_address.py", "tests/test_pattern.py", "tests/test_plan.py", *SPEC],
    "pattern": ["tests/test_pattern.py", "tests/test_plan.py", "tests/test_role.py", *SPEC],
    "graft": ["tests/test_mixture.py", "tests/test_bypass.py", "tests/test_laws.py", *SPEC],
    "operate": [*LIFE, "tests/test_mixture.py", *SPEC],
    "ops": ["tests/test_mixture.py", "tests/test_modes.py", *SPEC],
    "tokens": ["tests/test_insert.py", "tests/methods/test_prompts.py"],
    "insertion": ["tests/test_insert.py", "tests/methods/test_adapterx.py"],
    "stock": ["tests/test_lending.py", "tests/test_plan.py"],
    "fold": ["tests/test_fold.py", "tests/test_merge.py"],
    "merge": ["tests/test_fold.py", "tests/test_merge.py"],
}
MORE = ["tests/test_modes.py", "tests/test_errors.py", "tests/test_flow.py", "tests/test_plan.py"]
SLOW = "not fault and not idle_site and not inductor and not shrink and not compile"
# one other operator for each (cosmic-ray knows all pairs); of < and > the bounds and the contrary
PAIRS = (
    "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Pow_Mul", "BitOr_BitAnd", "BitAnd_BitOr",
    "Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt",
    "GtE_Lt", "Is_IsNot", "IsNot_Is", "In_NotIn", "NotIn_In", "Delete_Not", "USub_UAdd",
)  # fmt: skip
Mutant = tuple[str, str, int, str]  # file, operator, occurrence, where


def mutants(name: str) -> Iterator[Mutant]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / f"surgery/{name}.py").read_text()
    nodes, skip = list(ast_nodes(get_ast(source))), annotations(source)
    for operator in operator_names():
        made = get_operator(operator)
        paired = "Operator_" in operator and operator.split("Operator_")[1] not in PAIRS
        if made.arguments() or paired:
            continue
        positions = (place for node in nodes for place in made().mutation_positions(node))
        for i, (start, end) in enumerate(positions):
            if not any(a <= start and end <= b for a, b in skip):
                yield name, operator, i, f"{start[0]}:{start[1]}"


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(start, end) of every annotation."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for note in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(note, ast.expr):
                end = (note.end_lineno or 0, note.end_col_offset or 0)
                found.append(((note.lineno, note.col_offset), end))
    return found


def mutated(name: str, operator: str, occurrence: int) -> str | None:
    from cosmic_ray.mutating import MutationVisitor
    from cosmic_ray.plugins import get_operator

    source = (ROOT / f"surgery/{name}.py").read_text()
    return MutationVisitor.mutate_code(source, get_operator(operator)(), occurrence)


def tested(copy: Path, name: str, seconds: float, every: bool) -> str:
    """What the tests say of the checkout there: killed, survived, or timeout (which is killed)."""
    child = os.fork()
    if child == 0:
        os.setpgrp()
        run_tests(copy, name, every)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
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
    chosen = [*TESTS[name], *(MORE if every else []), f"surgery/{name}.py"]
    tests = [test for test in dict.fromkeys(chosen) if (copy / test).exists()]
    options = [
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore:Module already imported",
        "-k",
        SLOW,
    ]
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
        target = copy / f"surgery/{name}.py"
        target.write_text(text)
        start = time.monotonic()
        outcome = tested(copy, name, seconds, every)
        target.write_text((ROOT / f"surgery/{name}.py").read_text())
        row = {"mutant": key(mutant), "outcome": outcome, "s": round(time.monotonic() - start, 1)}
        with out.open("a") as file:
            file.write(json.dumps({"where": f"{name}.py:{where} {operator}", **row}) + "\n")
    shutil.rmtree(folder)


def key(mutant: Mutant) -> str:
    """What a mutant is, in the file as it is now."""
    source = (ROOT / f"surgery/{mutant[0]}.py").read_bytes()
    return f"{mutant[0]} {mutant[1]} {mutant[2]} {hashlib.sha256(source).hexdigest()[:8]}"


def table(out: Path, all_of_them: list[Mutant]) -> str:
    rows = read(out)
    lines, total = [], [0, 0]
    for name in dict.fromkeys(m[0] for m in all_of_them):
        keys = [key(m) for m in all_of_them if m[0] == name]
        done = [rows[k]["outcome"] for k in keys if k in rows]
        killed = sum(o != "survived" for o in done)
        total = [total[0] + killed, total[1] + len(done)]
        lines.append(
            f"{name:8} {killed:4} of {len(done):4} mutants  {killed / max(len(done), 1):.1%}"
        )
    return "\n".join(
        [
            *lines,
            f"all      {total[0]:4} of {total[1]:4} mutants  {total[0] / max(total[1], 1):.1%}",
        ]
    )


def read(out: Path) -> dict[str, dict[str, str]]:
    lines = out.read_text().splitlines() if out.exists() else []
    return {row["mutant"]: row for row in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", default=list(TESTS), help=", ".join(TESTS))
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240, help="limit for a mutant")
    parser.add_argument("--survivors", action="store_true", help="again, with more tests")
    parser.add_argument("--show", action="store_true", help="the table and the survivors alone")
    arguments = parser.parse_args()
    everything = [m for name in arguments.files for m in mutants(name)]
    done = read(arguments.out)
    if arguments.survivors:
        todo = [m for m in everything if done.get(key(m), {}).get("outcome") != "killed"]
    else:
        todo = [m for m in everything if key(m) not in done]
    if not arguments.show:
        preload()
        for name in dict.fromkeys(m[0] for m in todo):
            outcome = tested(ROOT, name, arguments.seconds, arguments.survivors)
            if outcome != "survived":
                sys.exit(f"the tests of {name} fail as it is: {outcome} (MUTANTS_LOUD=1 shows how)")
        workers = []
        for i in range(arguments.workers):
            child = os.fork()
            if child == 0:
                mine = todo[i :: arguments.workers]
                work(mine, arguments.out.resolve(), arguments.seconds, arguments.survivors)
                os._exit(0)
            workers.append(child)
        for child in workers:
            os.waitpid(child, 0)
    for row in read(arguments.out).values():
        if row["outcome"] == "survived" and row["mutant"] in {key(m) for m in everything}:
            print("survived:", row["where"])
    print(table(arguments.out, everything))


if __name__ == "__main__":
    main()

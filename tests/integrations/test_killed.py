"""The examples of trainers: killed at random steps and while they write, they end the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import surgery

ROOT = Path(surgery.__file__).parents[1]
RUNS = {  # what is called there: forwards of the model, and each way to write
    "hugging_face_trainer": """
import transformers
places = [(transformers.LlamaForCausalLM, "forward", 12), (torch, "save", 8), (os, "replace", 8)]
""",
    "accelerate_loop": """
import timm.models
places = [(timm.models.VisionTransformer, "forward", 16), (torch, "save", 4), (os, "replace", 12)]
""",
    "lightning_trainer": """
import timm.models
places = [(timm.models.VisionTransformer, "forward", 32), (torch, "save", 8)]
""",
    "timm_loop": """
import timm.models
places = [(timm.models.VisionTransformer, "forward", 32), (torch, "save", 4), (os, "replace", 4)]
""",
}
NEEDS = {"lightning_trainer": "lightning"}
CODE = """
import os, random, sys, torch
from pathlib import Path
sys.path[:0] = ["examples"]
from tests.integrations.killed import compare
import {name}
{places}
random.seed(seed := int.from_bytes(os.urandom(4)))
print("seed", seed, flush=True)
compare({name}.train, Path(sys.argv[1]), places, {processes})
"""


TWO = [
    pytest.param(name, 2, marks=pytest.mark.processes)
    for name in ("hugging_face_trainer", "accelerate_loop")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [*((name, 1) for name in RUNS), *TWO])
def test_a_run_that_is_killed_ends_as_one_that_is_not(
    name: str, processes: int, tmp_path: Path
) -> None:
    pytest.importorskip(NEEDS.get(name, "torch"))
    code = CODE.format(name=name, places=RUNS[name], processes=processes)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

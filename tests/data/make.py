"""python -m tests.data.make: the file and the answer of each rule set that has none yet."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

import surgery
from surgery.spec.case import stir
from tests.models import images
from tests.state.test_saved_before import DATA, SETS, answers, fresh


def main() -> None:
    known = dict(answers())
    for name in SETS:
        if name in known:
            continue
        model = surgery.apply(fresh(), name, seed=0)
        stir(model, 0)
        surgery.save(model, DATA / f"{name}.safetensors")
        with torch.no_grad():
            known[name] = model(images())
        print(name)
    save_file(known, DATA / "answers.safetensors")


if __name__ == "__main__":
    main()

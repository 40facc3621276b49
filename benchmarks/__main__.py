"""python -m benchmarks [subject ...]: plain tables, one thread. Without a subject: all of them."""

from __future__ import annotations

import argparse
import importlib
import warnings

import torch

from .timing import machine

SUBJECTS = (
    "adapters",
    "grouping",
    "hostile",
    "mixture",
    "operate",
    "overhead",
    "parameters",
    "serving",
)


def main() -> None:
    """Run the named subjects, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="subject", help=", ".join(SUBJECTS))
    parser.add_argument(
        "--rounds", "--n", type=int, help="rounds in each of the three runs; hostile: files"
    )
    given = parser.parse_args()
    unknown = [name for name in given.subjects if name not in SUBJECTS]
    if unknown:
        parser.error(f"no subject {unknown[0]!r}; there are {', '.join(SUBJECTS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of PEFT's imports and of timm's
    print(machine())
    for name in given.subjects or SUBJECTS:
        report = importlib.import_module(f".{name}", __package__).report
        for table in report(given.rounds) if given.rounds else report():
            print(f"\n{table}", flush=True)


if __name__ == "__main__":
    main()

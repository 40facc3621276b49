"""How fast Surgery is, as ratios taken in one process: `python -m benchmarks`."""

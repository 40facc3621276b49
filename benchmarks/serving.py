"""Load on examples/serve.py: clients that each ask for one sample at a time, over HTTP."""

from __future__ import annotations

import gc
import itertools
import json
import random
import statistics
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import uvicorn
from torch import Tensor, nn

import surgery
from examples import serve
from surgery._table import Table
from surgery.engine.operation import operations

MODEL, CLIENTS, ADAPTERS = "vit_small_patch16_224", 8, 16
KINDS = ("lora", "adapterx_ffn", "ssf", "bitfit")
ALONE = "the model, without a server"


class Load(NamedTuple):
    """What clients ask for: of which adapters, what memory there is, how large a batch may be."""

    names: tuple[str | None, ...]
    budget: int = 2**30
    batch: int = 32


class Run(NamedTuple):
    """Of one run: seconds of each request, of all, and of the CPU; samples of each forward."""

    waits: list[float]
    wall: float
    cpu: float
    batches: list[int]
    loads: int


def report(rounds: int = 32) -> list[Table]:
    """What is kept for an adapter, and a row for each load: `rounds` requests in every run."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = _files(Path(folder))
        kept = _kept(Path(folder), sizes)
        few = int(4.2 * sizes["lora0"])
        lora = tuple(name for name in sizes if name.startswith("lora"))
        each = tuple(f"{kind}{k}" for kind in KINDS for k in range(ADAPTERS // len(KINDS)))
        loads = {
            "the base alone": Load((None,)),
            "one LoRA": Load(lora[:1]),
            f"{ADAPTERS} LoRAs and the base": Load((*lora, None)),
            f"{ADAPTERS} adapters of four kinds": Load(each),
            f"{ADAPTERS} LoRAs, memory for 4": Load(lora, few),
            f"{ADAPTERS} LoRAs, one request at a time": Load(lora, batch=1),
        }
        runs: dict[str, list[Run]] = {name: [] for name in (ALONE, *loads)}
        for _ in range(3):
            runs[ALONE].append(_alone(rounds))
            for name, load in loads.items():
                runs[name].append(_run(Path(folder), load, rounds))
    return [kept, _table(runs, rounds)]


def _model() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(MODEL, num_classes=100)
    return model.eval()


def _files(folder: Path) -> dict[str, int]:
    """Adapters as if they were trained, and the bytes of each."""
    sizes = {}
    for kind in KINDS:
        for k in range(ADAPTERS if kind == "lora" else ADAPTERS // len(KINDS)):
            model = surgery.apply(_model(), kind, seed=k)
            with torch.no_grad():
                for parameter in surgery.parameters(model):
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
            path = surgery.save(model, folder / f"{kind}{k}.safetensors")
            sizes[path.stem] = path.stat().st_size
    return sizes


def _kept(folder: Path, sizes: Mapping[str, int]) -> Table:
    """Many of each kind on one model: bytes that are counted, and others, and times."""
    model, rows = _model(), list[tuple[object, ...]]()
    for kind in KINDS:
        begin = time.process_time()
        for k in range(ADAPTERS):
            _load(model, folder / f"{kind}0.safetensors", f"{kind}_{k}")
        load = (time.process_time() - begin) / ADAPTERS
        tracemalloc.start()
        _load(model, folder / f"{kind}0.safetensors", kind)
        gc.collect()
        objects, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        counted = operations(model)[-1].nbytes
        rows.append((kind, sizes[f"{kind}0"], counted, objects, f"{1e3 * load:.0f}"))
    begin, done = time.process_time(), operations(model)
    for operation in done:
        surgery.revert(model, name=operation.name)
    drop = 1e3 * (time.process_time() - begin) / len(done)
    columns = ("", "bytes of the file", "counted", "Python's objects", "ms to load")
    notes = [f"{ADAPTERS} of each, beside the earlier; {drop:.0f} ms to drop one, oldest first"]
    return Table(f"An adapter on {MODEL}", columns, rows, notes)


def _load(model: nn.Module, path: Path, name: str) -> None:
    surgery.load(model, path, name=name)
    surgery.activate(model, None)


def _samples() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(CLIENTS, 3, 224, 224)


def _alone(requests: int) -> Run:
    """What there would be to do without requests: forwards of as many samples as clients."""
    model, x = _model(), _samples()
    with torch.no_grad():
        model(x)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(requests // CLIENTS):
            model(x)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Run([wall * CLIENTS / requests] * requests, wall, cpu, [CLIENTS], 0)


def _run(folder: Path, load: Load, requests: int) -> Run:
    serve.BATCH = load.batch
    server = serve.Server(serve.Adapters(_model(), folder, load.budget), _samples()[0])
    batches: list[int] = []
    server.adapters.model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    bodies = [json.dumps((x * 1e4).round().div(1e4).tolist()) for x in _samples().double()]
    with _listening(server) as port:
        _ask(port, bodies[0], load.names)  # all were there once
        for seed in range(2):  # at first batches are of new sizes, and rows are shown to be rows
            batches.clear()
            drawn, count = random.Random(seed), next(server.adapters.count)
            names = [drawn.choices(load.names, k=requests // CLIENTS) for _ in bodies]
            wall, cpu = time.perf_counter(), time.process_time()
            with ThreadPoolExecutor(CLIENTS) as pool:
                waits = [*pool.map(partial(_ask, port), bodies, names)]
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        loads = next(server.adapters.count) - count - 1
        return Run([*itertools.chain(*waits)], wall, cpu, batches, loads)


@contextmanager
def _listening(server: serve.Server) -> Iterator[int]:
    """The server in a thread of its own; its port."""
    web = uvicorn.Server(uvicorn.Config(serve.app_of(server), port=0, log_level="warning"))
    thread = threading.Thread(target=web.run)
    thread.start()
    try:
        while not web.started:
            time.sleep(0.01)
        yield web.servers[0].sockets[0].getsockname()[1]
    finally:
        web.should_exit = True
        thread.join()


def _ask(port: int, inputs: str, names: Sequence[str | None]) -> list[float]:
    """Seconds that each request of one client took, one after the other."""
    waits, line = [], HTTPConnection("127.0.0.1", port)
    for name in names:
        body = f'{{"adapter": {json.dumps(name)}, "inputs": {inputs}}}'
        start = time.perf_counter()
        line.request("POST", "/predict", body, {"content-type": "application/json"})
        answer = line.getresponse()
        answer.read()
        waits.append(time.perf_counter() - start)
        if answer.status != 200:
            raise RuntimeError(f"{name}: {answer.status} {answer.reason}")
    line.close()
    return waits


def _table(runs: Mapping[str, list[Run]], requests: int) -> Table:
    rows: list[tuple[object, ...]] = []
    for name, of in runs.items():
        rate = _range([len(run.waits) / run.wall for run in of], 1)
        waits = sorted(wait for run in of for wait in run.waits)
        half, most = (f"{1e3 * waits[int(q * len(waits))]:.0f}" for q in (0.5, 0.95))
        cpu = f"{1e3 * min(run.cpu / len(run.waits) for run in of):.0f}"
        ratio = _range([run.cpu / base.cpu for run, base in zip(of, runs[ALONE], strict=True)], 2)
        size = f"{statistics.mean(n for run in of for n in run.batches):.1f}"
        loads = _range([float(run.loads) for run in of], 0)
        rows.append((name, rate, half, most, cpu, ratio, size, loads))
    columns = (
        "", "requests a second", "ms, median", "95 %", "CPU ms", "to the model", "batch", "loads",
    )  # fmt: skip
    notes = [
        f"{CLIENTS} clients, each with one request at a time of one image as JSON (1.2 MB), for an",
        f"adapter that it draws; {requests} requests in each of three runs, median (and range)",
        "CPU ms: of the process, clients and all, for each request, and to the forwards alone",
    ]
    return Table(f"Served {MODEL}", columns, rows, notes)


def _range(values: list[float], digits: int) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

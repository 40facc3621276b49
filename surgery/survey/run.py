"""Many models, each in a worker with a time limit: a crash or a hang is one row, not the end."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from . import zoo
from .builders import built
from .dummy_inputs import feed, one_line, refusal, unfed
from .look import Row, compared, joined, operated, read

LIMIT = 60  # seconds for a model
MEMORY = 18 * 2**30  # bytes of address space for all workers together
FULL = 3 * 2**30  # bytes in memory at which a worker makes room for a new one
Case = tuple[str, str, bool]  # source, name, whether to run it for real
Progress = Callable[[Any], None]


def rows(
    source: str,
    names: list[str] | None = None,
    *,
    real: bool = True,
    seconds: float = LIMIT,
    workers: int = 2,
    progress: Progress = lambda news: None,
) -> list[Row]:
    """Survey the models of a source, in the order of their names.

    source    timm, torchvision, transformers, package:NAME, or a module that builds models
    names     all of them where there is None
    real      run as well: every transformers type, the smallest of each other family
    progress  is called with each row as it comes, and with the number of all before the first
    """
    names = zoo.names(source) if names is None else names
    by_families = source in zoo.SOURCES and source != "transformers"
    cases = [(source, name, real and not by_families) for name in names]
    done = dict(_each(cases, seconds, workers, progress))
    if real and by_families:
        cases = [(source, name, True) for name in _smallest(list(done.values()))]
        for name, row in _each(cases, seconds, workers, progress):
            lost = row.status == "failed" and not row.parameters
            read_only = done[name]._replace(reason=f"not run here: {row.reason}")
            done[name] = read_only if lost else row
    return [done[name] for name in names]


def chosen(names: list[str], only: str) -> list[str]:
    """The names that any of some comma-separated patterns matches.

    >>> chosen(["vit_tiny", "vit_base", "bert"], "vit_*")
    ['vit_tiny', 'vit_base']
    """
    patterns = [p.strip() for p in only.split(",") if p.strip()]
    return [n for n in names if any(fnmatch(n, p) for p in patterns)]


def row_of(source: str, name: str, real: bool) -> Row:
    """One model, from its building to its row, in this process."""
    row = Row(source, name)
    if source == "transformers":
        return _row_of_type(row, real)
    if source in zoo.SOURCES:
        row = read(row, zoo.sketch(source, name))
        if not real:
            return row
        model = zoo.real(source, name)
        return _tried(row, model, zoo.picture(source, model))
    torch.manual_seed(0)
    model, example = built(source, name)
    row = read(row, model)
    return _tried(row, model, feed(model) if example is None else example) if real else row


def _tried(row: Row, model: nn.Module, inputs: Any) -> Row:
    """The row of a model that was run, where it has a plan; what goes wrong keeps what was read."""
    try:
        if row.status == "planned":
            return operated(row, model, inputs)
        by_forward = row if row.sites else read(row._replace(reason=""), model, inputs)
        if by_forward.status == "planned":
            return operated(by_forward, model, inputs, inputs)
        return compared(row, model, inputs)
    except Exception as error:
        return row._replace(status="failed", reason=_described(error))


def _row_of_type(row: Row, real: bool) -> Row:
    """The row of a transformers type, of its smallest model that runs, or of one that does not."""
    row = row._replace(family=row.name)
    try:
        model, inputs = zoo.tiny(row.name)
    except Exception as error:
        row = read(row, zoo.on_meta(row.name))
        return row._replace(reason=joined(row.reason, f"not run here: {_described(error)}"))
    row = read(row, model)
    row = _tried(row, model, inputs) if real else row
    left_out = unfed(model, inputs)
    if left_out and row.status in ("refused", "failed"):
        fed = ", ".join(inputs)
        why = f"it was fed {fed}; with {', '.join(left_out)} too: {refusal(model)}"
        row = row._replace(reason=f"{row.reason}; {why}")
    return row


def _smallest(done: list[Row]) -> list[str]:
    """Of every family, the smallest model that has a plan and the smallest that is refused."""
    smallest: dict[tuple[str, str], Row] = {}
    for row in done:
        if row.status != "failed":
            best = smallest.setdefault((row.family, row.status), row)
            smallest[row.family, row.status] = min(best, row, key=lambda r: r.parameters)
    return [row.name for row in smallest.values()]


def _each(
    cases: list[Case], seconds: float, workers: int, progress: Progress
) -> Iterator[tuple[str, Row]]:
    """Every case's row as it comes, from a few workers that are replaced when they die."""
    spare: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for _ in range(workers):
        spare.put(Worker(MEMORY // workers))

    def ask(case: Case) -> Row:
        worker = spare.get()
        try:
            return worker.ask(case, seconds)
        finally:
            spare.put(worker)

    progress(len(cases))
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(ask, case) for case in cases]):
            progress(future.result())
            yield future.result().name, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        while not spare.empty():
            spare.get().end()


class Worker:
    """One process that looks at one model after another, within so many bytes of memory."""

    def __init__(self, memory: int = MEMORY) -> None:
        self.memory = memory
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, case: Case, seconds: float) -> Row:
        """The row of a case; "failed" where the process died or took too long."""
        late = threading.Event()
        timer: threading.Timer | None = None

        def stop(process: subprocess.Popen[bytes]) -> None:
            late.set()
            process.kill()

        try:
            process = self._started()
            timer = threading.Timer(seconds, stop, [process])
            timer.start()
            return self._answered(case, process)
        except (EOFError, OSError, pickle.UnpicklingError):
            code = self.end()
            killed = ": killed, as for want of memory" if code == -9 else ""
            died = f"its process died (exit code {code}){killed}"
            reason = f"it took more than {seconds:g} seconds" if late.is_set() else died
            return Row(case[0], case[1], reason=reason)
        finally:
            if timer:
                timer.cancel()

    def _answered(self, case: Case, process: subprocess.Popen[bytes]) -> Row:
        """What the process says of a case; it ends where it has grown too large."""
        assert process.stdin is not None
        assert process.stdout is not None
        pickle.dump(case, process.stdin)
        process.stdin.flush()
        row: Row = pickle.load(process.stdout)
        if not pickle.load(process.stdout):
            self.end()
        return row

    def _started(self) -> subprocess.Popen[bytes]:
        """The process, ready: a new one where there is none, or the last has gone."""
        if self.process is None or self.process.poll() is not None:
            self.end()
            program = f"from {__name__} import work; work({self.memory})"
            code = f"import sys; sys.path[:] = {sys.path!r}; {program}"
            command = [sys.executable, "-c", code]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert self.process.stdout is not None
            pickle.load(self.process.stdout)
        return self.process

    def end(self) -> int | None:
        """End the process, if there is one; its exit code."""
        if self.process is None:
            return None
        if self.process.stdin:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        self.process.kill()
        code = self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self.process = None
        return code


def work(memory: int) -> None:
    """The life of a worker: cases in and rows out, until no more come or its memory has grown."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a model prints
    _limit_memory(memory)
    pickle.dump("ready", answers)
    answers.flush()
    while True:
        try:
            case = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_safely(*case), answers)
        gc.collect()
        stays = _resident() <= FULL
        pickle.dump(stays, answers)
        answers.flush()
        if not stays:
            return


def _safely(source: str, name: str, real: bool) -> Row:
    try:
        return row_of(source, name, real)
    except Exception as error:
        return Row(source, name, reason=_described(error))


def _described(error: BaseException) -> str:
    """An error as one line, with the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (at {os.path.basename(frames[-1].filename)}: {frames[-1].line})" if frames else ""
    if frames and frames[-1].filename == feed.__code__.co_filename:
        return str(error)
    message = one_line(error) or "no message"
    return f"{type(error).__name__}: {message[:240]}{where[:140]}"


def _limit_memory(memory: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0

"""Claim: one base and a folder of adapters answer mixed batches, in as much memory as you give.

    pip install "adapterx-surgery[vision,serve]"
    python examples/serve.py timm:vit_small_patch16_224 adapters/ --weights vit.safetensors
    curl localhost:8000/adapters
    curl localhost:8000/predict -H content-type:application/json -d @request.json

A request is {"adapter": "birds", "inputs": [...]}: one sample, for what surgery.save has written to
adapters/birds.safetensors; null is the base. Requests that come within a few ms are one batch, in
one thread, which loads and drops adapters, too. Copy this file and change it: here the model takes
one tensor, and gives one. docs/serving.md says more, with figures.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Collection
from concurrent.futures import Future
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery
from surgery._resolve import INPUTS, MODEL, build, inputs_of
from surgery.cli import number

BATCH, ROOM = 32, 256  # samples in one forward, and requests that wait, at most
WAIT = 0.005  # seconds for others to come


class Adapter(NamedTuple):
    """A file as it was found: its operation on the model, or why it is of no use there."""

    file: Path
    version: tuple[int, ...]
    operation: str = ""
    nbytes: int = 0
    error: str | None = None


class NoRoomNow(Exception):
    """An adapter has no room beside those that a batch needs: it is for the next."""


class Adapters:
    """The adapters of a folder that are on a model: those that were used last, in so many bytes."""

    def __init__(self, model: nn.Module, folder: Path, budget: int) -> None:
        self.model, self.folder, self.budget = model, folder, budget
        self.known: dict[str, Adapter] = {}  # the one that was used last is the last
        self.count = itertools.count()

    def files(self) -> dict[str, Path]:
        """What there is. Names of requests are looked up here, and never made into a path."""
        return {file.stem: file for file in sorted(self.folder.glob("*.safetensors"))}

    @property
    def nbytes(self) -> int:
        return sum(adapter.nbytes for adapter in [*self.known.values()])

    def bring(self, name: str, needed: Collection[str | None]) -> str:
        """The operation of an adapter, which is on the model then, as its file is now.

        Raises HTTPException where it cannot be, NoRoomNow where one `needed` would have to go.
        """
        adapter = self.known.get(name)
        file = adapter.file if adapter else self.files().get(name)
        if file is None or not file.exists():
            self.drop(name)
            raise HTTPException(404, f"There is no adapter {name!a:.99}: GET /adapters lists them.")
        about = file.stat()
        version = about.st_ino, about.st_mtime_ns, about.st_ctime_ns, about.st_size
        if adapter and adapter.version != version:
            self.drop(name)
        adapter = self.known.pop(name, None) or self._load(file, version, needed)
        self.known[name] = adapter
        if adapter.error:
            raise HTTPException(422, adapter.error)
        return adapter.operation

    def drop(self, name: str) -> None:
        if (adapter := self.known.pop(name, None)) and adapter.operation:
            surgery.revert(self.model, name=adapter.operation)

    def _load(
        self, file: Path, version: tuple[int, ...], needed: Collection[str | None]
    ) -> Adapter:
        nbytes = 0
        try:
            self._make_room(version[-1], needed)  # about what it takes, before it is read
            operation = f"adapter{next(self.count)}"
            surgery.load(self.model, file, name=operation)
            surgery.activate(self.model, None)  # the base answers, but for rows in mixed()
            nbytes = getattr(self.model.surgery, operation).nbytes
            self._make_room(nbytes, needed)
        except (surgery.SurgeryError, OSError, NoRoomNow) as error:
            if nbytes:
                surgery.revert(self.model, name=operation)
            if isinstance(error, NoRoomNow):
                raise
            told = str(error).replace(f"{self.folder}/", "")
            return Adapter(file, version, error=told)
        return Adapter(file, version, operation, nbytes)

    def _make_room(self, nbytes: int, needed: Collection[str | None]) -> None:
        """Drop those that were not used for longest, but none that is needed."""
        if nbytes > self.budget:
            fact = f"it takes {nbytes:,} bytes, and there are {self.budget:,} for all adapters."
            raise surgery.OperationError("", fact, "Start the server with a larger --budget.")
        while self.nbytes + nbytes > self.budget:
            idle = (n for n, a in self.known.items() if a.nbytes and a.operation not in needed)
            if (first := next(idle, None)) is None:
                raise NoRoomNow
            self.drop(first)


class Waiting(NamedTuple):
    """A request that waits for its answer."""

    adapter: str | None
    inputs: Tensor
    answer: Future[Any]

    def fails(self, error: Exception) -> None:
        if isinstance(error, (surgery.SurgeryError, IndexError, ValueError)):
            error = HTTPException(422, str(error))
        elif not isinstance(error, HTTPException):
            logging.getLogger("uvicorn.error").error("A request failed.", exc_info=error)
            error = HTTPException(500, type(error).__name__)
        self.answer.set_exception(error)


class Server:
    """A queue of requests, and one thread that runs the model for those that come together."""

    def __init__(self, adapters: Adapters, like: Tensor) -> None:
        self.adapters, self.like = adapters, like  # a sample as the model takes it
        self.queue: queue.Queue[Waiting | None] = queue.Queue(ROOM)  # None: no more will come
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.stopping = False

    def ask(self, adapter: str | None, inputs: Any) -> Future[Any]:
        """An answer to come. Raises HTTPException where none will."""
        waiting = Waiting(adapter, self._sample(inputs), Future())
        try:
            if self.stopping:
                raise queue.Full
            self.queue.put_nowait(waiting)
        except queue.Full:
            raise HTTPException(503, "Too many wait, or the server stops.") from None
        return waiting.answer

    def _sample(self, inputs: Any) -> Tensor:
        floats = self.like.is_floating_point()  # whole numbers are no less; tokens are whole
        try:
            x = torch.tensor(inputs, dtype=self.like.dtype if floats else None)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise HTTPException(422, f"inputs are no tensor: {error!s:.200}") from None
        if x.shape != self.like.shape or x.is_floating_point() > floats:
            given, taken = (f"{tuple(each.shape)} {each.dtype}" for each in (x, self.like))
            raise HTTPException(422, f"inputs are {given}, and the model takes {taken}.")
        if not (x := x.to(self.like)).isfinite().all():
            raise HTTPException(422, "inputs have numbers that are not finite.")
        return x

    def stop(self) -> None:
        """Answer those that wait, and end."""
        self.stopping = True
        self.queue.put(None)
        self.thread.join()

    def _work(self) -> None:
        came: list[Waiting | None] = []
        while None not in came:
            came = self._batch()
            left = [each for each in came if each and each.answer.set_running_or_notify_cancel()]
            while left:
                left = self._answer(left)

    def _batch(self) -> list[Waiting | None]:
        """The next request, and those that come soon behind it."""
        batch, until = [self.queue.get()], time.monotonic() + WAIT
        while len(batch) < BATCH:
            try:
                batch.append(self.queue.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                break
        return batch

    def _answer(self, batch: list[Waiting]) -> list[Waiting]:
        """Answer those whose adapters there is room for at once; the others."""
        operations: dict[str | None, str | None] = {None: None}
        ready, left = [], []
        for name in dict.fromkeys(each.adapter for each in batch):
            those = [each for each in batch if each.adapter == name]
            try:
                if name is not None:
                    operations[name] = self.adapters.bring(name, operations.values())
                ready += those
            except NoRoomNow:
                left += those
            except Exception as error:
                for each in those:
                    each.fails(error)
        if ready:
            self._run(ready, [operations[each.adapter] for each in ready])
        return left

    def _run(self, batch: list[Waiting], names: list[str | None]) -> None:
        model, half = self.adapters.model, len(batch) // 2
        try:
            x = torch.stack([each.inputs for each in batch])
            with torch.no_grad(), surgery.mixed(model, names) if any(names) else nullcontext():
                answers = [*zip(batch, model(x), strict=True)]
        except Exception as error:
            if half:  # those that do not fail alone are to be answered
                self._run(batch[:half], names[:half])
                self._run(batch[half:], names[half:])
            else:
                self._fail(batch[0], error)
            return
        for each, row in answers:
            if row.isfinite().all():
                each.answer.set_result(row.tolist())
            else:
                each.fails(HTTPException(422, "What comes out has numbers that are not finite."))

    def _fail(self, each: Waiting, error: Exception) -> None:
        """Of a part that cannot run here, say, the adapter is known until its file is another."""
        if isinstance(error, surgery.SurgeryError) and (name := each.adapter) is not None:
            known = self.adapters.known
            known[name] = known[name]._replace(error=str(error))
        each.fails(error)


class Question(BaseModel, extra="forbid"):
    """The body of a request: which adapter (null: the base), and one sample."""

    adapter: str | None
    inputs: Any


def app_of(server: Server) -> FastAPI:
    """The server's face."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.thread.start()
        yield
        await asyncio.to_thread(server.stop)

    app = FastAPI(title="Surgery", lifespan=lifespan)

    @app.exception_handler(RequestValidationError)
    async def misfit(request: Request, error: RequestValidationError) -> JSONResponse:
        """Without the inputs, which may be long, and no JSON (NaN)."""
        told = [{"where": each["loc"], "why": each["msg"]} for each in error.errors()]
        return JSONResponse({"detail": told}, 422)

    @app.post("/predict")
    async def predict(question: Question, request: Request) -> dict[str, Any]:
        answer = asyncio.wrap_future(server.ask(question.adapter, question.inputs))
        gone = asyncio.ensure_future(request.receive())  # behind the body nothing comes but an end
        await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not answer.done():
            answer.cancel()
            raise HTTPException(499, "The client has gone.")
        return {"adapter": question.adapter, "outputs": await answer}

    @app.get("/adapters")
    def adapters() -> dict[str, Any]:
        here, known = server.adapters, {**server.adapters.known}
        rows = [known.get(name, Adapter(file, ())) for name, file in here.files().items()]
        told = [{"name": a.file.stem, "nbytes": a.nbytes, "error": a.error} for a in rows]
        return {"budget": here.budget, "nbytes": here.nbytes, "adapters": told}

    @app.get("/health")
    def health() -> dict[str, int]:
        if not server.thread.is_alive():
            raise HTTPException(503, "The thread that runs the model has ended.")
        return {"waiting": server.queue.qsize()}

    return app


def main() -> None:
    """Serve what the command line names."""
    parser = argparse.ArgumentParser(description="Serve a folder of adapters on one base.")
    parser.add_argument("base", help=MODEL)
    parser.add_argument("folder", type=Path, help="of files of surgery.save")
    parser.add_argument("--weights", help="of the base, safetensors: timm's comes without")
    parser.add_argument("--inputs", default="", help=f"{INPUTS}; else guessed")
    parser.add_argument("--budget", type=number, default=1024, help="MiB for adapters")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=number, default=8000)
    given = parser.parse_args()
    if not given.folder.is_dir():
        parser.error(f"there is no folder {given.folder}")
    try:
        model = build(given.base, given.device).to(given.device).eval()
        example = inputs_of(given.inputs, model)
    except surgery.SurgeryError as error:
        parser.error(str(error))
    if given.weights:
        model.load_state_dict(load_file(given.weights))
    if not (isinstance(example, Tensor) and isinstance(model(example.to(given.device)), Tensor)):
        parser.error(f"{given.base} takes or gives more than one tensor: serve a module around it.")
    adapters = Adapters(model, given.folder, given.budget * 2**20)
    server = Server(adapters, example[0].to(given.device))
    uvicorn.run(app_of(server), host=given.host, port=given.port)


if __name__ == "__main__":
    main()

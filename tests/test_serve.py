"""examples/serve.py: many adapters on one base, asked for over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from fastapi import HTTPException
from fastapi.testclient import TestClient
from safetensors.torch import save_file
from torch import Tensor, nn

import surgery
from examples import serve
from surgery import activate, at, ffn, head, lora, unfreeze
from tests.engine.test_activity import train
from tests.methods.reference import EPS
from tests.models import images, tiny_vit

X = images(batch=6).double()
SETS: dict[str, Any] = {
    "low": "lora",
    "low.of another rank": [at(ffn, lora(rank=2)), at(head, unfreeze)],
    "train": "adapterx_ffn",  # no operation could have that name
    "tokens": "vpt_deep",
    "biases": "bitfit",
}


def base(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit(**changes).double().eval()


@torch.no_grad()
def write(folder: Path, name: str, rules: Any, seed: int = 0, **changes: Any) -> Path:
    model = surgery.apply(base(**changes), rules, seed=seed)
    train(model, "default", seed)
    return surgery.save(model, folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for seed, (name, rules) in enumerate(SETS.items()):
        write(folder, name, rules, seed)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "adapters")
    return tmp_path / "adapters"


@torch.no_grad()
def alone(file: Path | None, x: Tensor) -> Tensor:
    """What an adapter by itself makes of one sample."""
    model = base()
    if file is not None:
        activate(surgery.load(model, file, name="a"), "a")
    y: Tensor = model(x[None])[0]
    return y


@pytest.fixture(scope="module")
def want(saved: Path) -> dict[str | None, Tensor]:
    files = {None: None, **{name: saved / f"{name}.safetensors" for name in SETS}}
    return {name: torch.stack([alone(f, x) for x in X]) for name, f in files.items()}


def close(got: Any, wanted: Tensor) -> bool:
    return bool((torch.tensor(got, dtype=torch.float64) - wanted).abs().max() <= 256 * EPS)


def server_of(folder: Path, budget: int = 2**30, model: nn.Module | None = None) -> serve.Server:
    return serve.Server(serve.Adapters(model or base(), folder, budget), X[0])


def answers(server: serve.Server, asked: list[tuple[str | None, Any]]) -> list[Any]:
    """What each is answered where all wait as the server begins: an output, or the error."""
    futures: list[Future[Any]] = [server.ask(name, x.tolist()) for name, x in asked]
    server.thread.start()
    errors = [future.exception(60) for future in futures]
    server.stop()
    return [e or f.result() for e, f in zip(errors, futures, strict=True)]


def held(server: serve.Server) -> int:
    """Bytes that operations keep, counted tensor by tensor."""
    return sum(op.nbytes for op in operations(server))


def operations(server: serve.Server) -> list[Any]:
    additions: Any = getattr(server.adapters.model, "surgery", None)
    return additions.operations if additions else []


# answers ----------------------------------------------------------------------------------------


def test_each_row_is_answered_as_by_its_adapter_alone(folder, want):
    server = server_of(folder)
    asked = [(name, i) for i in range(5) for name in (*SETS, None)][:30]
    sizes = forwards(server)
    got = answers(server, [(name, X[i]) for name, i in asked])
    assert all(close(y, want[name][i]) for y, (name, i) in zip(got, asked, strict=True))
    assert 30 in sizes


def forwards(server: serve.Server) -> list[int]:
    """Of how many samples forwards are from now on, and what operations there were."""
    sizes: list[int] = []
    server.adapters.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


def test_the_base_answers_where_nothing_is_loaded_and_after(folder, want):
    model = base()
    assert answers(server_of(folder, model=model), [(None, X[0])])[0] == want[None][0].tolist()
    answers(server_of(folder, model=model), [("low", X[0]), ("biases", X[1])])
    assert answers(server_of(folder, model=model), [(None, X[0])])[0] == want[None][0].tolist()


def test_an_adapter_is_loaded_once_for_all_who_wait(folder, monkeypatch):
    loads = counted(monkeypatch)
    server = server_of(folder)
    answers(server, [("low", X[0])] * 3 + [("train", X[0])] + [("low", X[1])] * 40)
    assert sorted(loads) == ["low", "train"]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are loaded from now on."""
    loads: list[str] = []
    load = surgery.load

    def seen(model: nn.Module, path: Path, **rest: Any) -> nn.Module:
        loads.append(path.stem)
        return load(model, path, **rest)

    monkeypatch.setattr(surgery, "load", seen)
    return loads


# what is refused ---------------------------------------------------------------------------------

NAMES = [
    "", ".", "..", "nobody", "low.safetensors", "../outside", "../adapters/low", "./low", "low/",
    "/etc/passwd", "lo\0w", "low\n", "LOW", "x" * 10_000, "*", "l?w", "[l]ow", "~", "\ud800",
    "\u202e", "C:\\low", "..\\outside", "%2e%2e%2foutside",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_there_are_not(name, folder):
    write(folder.parent, "outside", "lora")
    server = server_of(folder)
    got = answers(server, [(name, X[0]), (None, X[0])])
    assert (got[0].status_code, operations(server)) == (404, [])
    assert isinstance(got[1], list)
    json.dumps(got[0].detail, ensure_ascii=False).encode()


def test_an_absolute_name_and_one_of_a_file_outside(folder):
    outside = write(folder.parent, "outside", "lora")
    got = answers(server_of(folder), [(str(outside.with_suffix("")), X[0])])
    assert got[0].status_code == 404


class Idle(nn.Module):
    """One of its layers never runs."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.flat, self.idle = nn.Flatten(), nn.Linear(4, 4)
        self.head = nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        if (x > 50).any():
            raise RuntimeError("a number above 50")
        y: Tensor = self.head(self.flat(x))
        return y


def spoilt(kind: str, path: Path) -> None:
    """A file that no model can use."""
    whole = write(path.parent.parent, "whole", "lora").read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(whole[:-100])
    elif kind == "changed":
        path.write_bytes(whole[:-100] + bytes(100))
    elif kind == "text":
        path.write_text("birds")
    elif kind == "endless":
        path.write_bytes(b"\xff" * 100)
    elif kind == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "classes":
        write(path.parent, path.stem, "lora", num_classes=7)
    elif kind == "width":
        write(path.parent, path.stem, "lora", embed_dim=12)
    elif kind == "depth":
        write(path.parent, path.stem, "lora", depth=4)


KINDS = {
    "empty": "no whole safetensors", "cut": "no whole safetensors", "changed": "was changed",
    "text": "no whole safetensors", "endless": "no whole safetensors", "folder": "it is a folder",
    "foreign": "not written by surgery.save", "classes": r"is \(7,", "depth": "matched 4 sites",
    "width": "among what its rules",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_of_no_use_are_told_and_nothing_is_touched(kind, folder, want, monkeypatch):
    spoilt(kind, folder / "bad.safetensors")
    server, loads = server_of(folder), counted(monkeypatch)
    before = surgery.fingerprint(server.adapters.model)
    (told,) = answers(server, [("bad", X[0])])
    assert surgery.fingerprint(server.adapters.model) == before
    assert told.status_code == 422
    with pytest.raises(AssertionError, match=KINDS[kind]):
        raise AssertionError(told.detail)
    assert str(folder) not in told.detail
    server = again(server)
    told, good, other = answers(server, [("bad", X[0]), ("low", X[1]), ("bad", X[2])])
    assert (told.status_code, other.status_code) == (422, 422)
    assert close(good, want["low"][1])
    assert loads.count("bad") == 1  # until the file is another
    bad = folder / "bad.safetensors"
    bad.rmdir() if bad.is_dir() else bad.unlink()
    assert answers(again(server), [("bad", X[0])])[0].status_code == 404
    shutil.copy(folder / "low.safetensors", bad)
    assert close(answers(again(server), [("bad", X[0])])[0], want["low"][0])


def again(server: serve.Server) -> serve.Server:
    """Another over the same adapters."""
    return serve.Server(server.adapters, server.like)


def test_a_part_that_never_runs_fails_its_own_requests(folder):
    model = Idle().double().eval()
    surgery.save(
        surgery.apply(Idle().double(), at("idle", lora(rank=2))), folder / "idle.safetensors"
    )
    surgery.save(
        surgery.apply(Idle().double(), at("head", lora(rank=2))), folder / "ok.safetensors"
    )
    server = server_of(folder, model=model)
    got = answers(server, [("ok", X[0]), ("idle", X[0]), (None, X[1]), ("idle", X[1])])
    assert [getattr(y, "status_code", 200) for y in got] == [200, 422, 200, 422]
    assert "never ran" in got[1].detail
    server = again(server)
    sizes = forwards(server)
    assert "never ran" in answers(server, [("idle", X[0])])[0].detail
    assert not sizes  # it is known


def test_one_request_that_fails_fails_no_other(folder):
    model = Idle().double().eval()
    asked = [(None, X[i]) for i in range(6)] * 2
    asked[7] = (None, X[0] + 100)
    got = answers(server_of(folder, model=model), asked)
    assert (got[7].status_code, got[7].detail) == (500, "RuntimeError")
    with torch.no_grad():
        rest = model(torch.stack([x for _, x in asked[:7] + asked[8:]]))
    assert close(got[:7] + got[8:], rest)


def test_numbers_that_overflow_fail_their_own_request(folder, want):
    asked = [("low", X[0]), ("low", X[1] * 1e307), (None, X[2]), ("train", X[3].sign() * 1e308)]
    got = answers(server_of(folder), asked)
    assert [getattr(y, "status_code", 200) for y in got] == [200, 422, 200, 422]
    assert close(got[0], want["low"][0])
    assert close(got[2], want[None][2])


WRONG = [
    b"", b"{", b"null", b"[]", b"[" * 100_000, b'"x"', b"\xff\xfe", b'{"adapter": null}',
    b'{"inputs": [1]}', b'{"adaptor": "low", "inputs": [1]}', b'{"adapter": NaN, "inputs": [1]}',
    b'{"adapter": 5, "inputs": [1]}', b'{"adapter": ["low"], "inputs": [1]}',
    b'{"adapter": "\\ud800", "inputs": [1]}', b'{"adapter": null, "inputs": [1], "x": Infinity}',
    *(b'{"adapter": "low", "inputs": %s}' % inputs for inputs in (
        b"1", b"[]", b"null", b'"x"', b"{}", b"[[1], [1, 2]]", b"[1, null]", b"[1, [2]]", b"NaN",
        b"1" * 400, b"[" * 5000 + b"]" * 5000, b'[["1"]]', b"true",
    )),
]  # fmt: skip


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    with TestClient(serve.app_of(server_of(folder))) as client:
        yield client


def test_bodies_that_are_wrong_are_told(client):
    for body in WRONG:
        got = client.post("/predict", content=body, headers={"content-type": "application/json"})
        assert got.status_code in (400, 422), body[:80]
        assert len(got.text) < 2000
    sample = X[0].tolist()
    for wrong in (sample[:2], [sample], [[[*row, 0.0] for row in side] for side in sample]):
        got = client.post("/predict", json={"adapter": "low", "inputs": wrong})
        assert "the model takes (3, 16, 16)" in got.json()["detail"]
    for names in ({}, {"adaptor": "low"}, {"adapter": "low", "model": "low"}):
        assert client.post("/predict", json={**names, "inputs": sample}).status_code == 422
    assert client.get("/health").json() == {"waiting": 0}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_do_not_come_in(number, client, want):
    body = json.dumps({"adapter": "low", "inputs": X[0].tolist()})
    odd = body.replace(str(X[0, 1, 2, 3].item()), number)
    assert odd != body
    headers = {"content-type": "application/json"}
    told = client.post("/predict", content=odd, headers=headers)
    assert (told.status_code, told.json()["detail"][:6]) == (422, "inputs")
    got = client.post("/predict", content=body, headers=headers).json()
    assert got["adapter"] == "low"
    assert close(got["outputs"], want["low"][0])


def test_tokens_are_whole_numbers(folder):
    server = serve.Server(serve.Adapters(nn.Embedding(9, 4), folder, 1), torch.tensor([1, 2]))
    with pytest.raises(HTTPException, match="the model takes"):
        server.ask(None, [1.5, 2])
    got = answers(server, [(None, torch.tensor([1, 8])), (None, torch.tensor([1, 9]))])
    assert len(got[0]) == 2
    assert (got[1].status_code, got[1].detail) == (422, "index out of range in self")


def test_a_full_queue_says_so_at_once(folder, monkeypatch):
    monkeypatch.setattr(serve, "ROOM", 2)
    server = server_of(folder)
    kept = [server.ask(None, X[0].tolist()) for _ in range(2)]
    began = time.monotonic()
    with pytest.raises(HTTPException) as told:
        server.ask(None, X[0].tolist())
    assert told.value.status_code == 503
    assert time.monotonic() < began + 2
    server.thread.start()
    server.stop()
    assert all(future.result(0) for future in kept)
    with pytest.raises(HTTPException, match="stops"):
        server.ask(None, X[0].tolist())


# memory ------------------------------------------------------------------------------------------


def sizes_of(folder: Path) -> dict[str, int]:
    """What each takes, on the model or as a file: of such small models that is more."""
    server = server_of(folder)
    answers(server, [(name, X[0]) for name in SETS])
    known = server.adapters.known
    return {name: max(known[name].nbytes, known[name].file.stat().st_size) for name in SETS}


def watched(server: serve.Server) -> list[int]:
    """What operations keep at each forward from now on; those of its rows are there."""
    seen: list[int] = []
    server.adapters.model.register_forward_pre_hook(lambda *_: seen.append(held(server)))
    return seen


def test_bytes_that_are_told_are_those_that_are_kept(folder):
    server = server_of(folder)
    answers(server, [(name, X[0]) for name in SETS])
    parts = [tensor for op in operations(server) for tensor in op.parameters()]
    assert held(server) == server.adapters.nbytes > 8 * sum(p.numel() for p in parts) > 0
    for name in SETS:
        server.adapters.drop(name)
    assert (operations(server), server.adapters.nbytes) == ([], 0)


def test_what_was_not_used_for_longest_is_dropped(folder):
    sizes = sizes_of(folder)
    server = server_of(folder, sizes["low"] + sizes["train"] + sizes["biases"])
    for names in (["low", "train", "biases"], ["low"], ["tokens"]):
        answers(server := again(server), [(name, X[0]) for name in names])
    assert "low" in server.adapters.known
    assert "train" not in server.adapters.known
    assert held(server) == server.adapters.nbytes <= server.adapters.budget


@pytest.mark.parametrize("room", [1.0, 1.3, 1.9])
def test_a_batch_that_needs_more_is_split_and_the_budget_is_kept(room, folder, want):
    budget = int(room * max(sizes_of(folder).values()))
    server = server_of(folder, budget)
    seen = watched(server)
    asked = [(name, i) for i in range(3) for name in (*SETS, None)]
    got = answers(server, [(name, X[i]) for name, i in asked])
    assert all(close(y, want[name][i]) for y, (name, i) in zip(got, asked, strict=True))
    assert len(seen) > 1
    assert max(seen) <= budget
    assert held(server) <= budget


def test_one_that_is_larger_than_all_memory_is_refused(folder, want, monkeypatch):
    sizes, loads = sizes_of(folder), counted(monkeypatch)
    least = min(sizes, key=sizes.__getitem__)
    server = server_of(folder, sizes[least])
    others = [name for name in SETS if name != least]
    got = answers(server, [(name, X[0]) for name in (*others, least, *others)])
    assert [getattr(y, "status_code", 200) for y in got] == [422] * 4 + [200] + [422] * 4
    assert all("larger --budget" in each.detail for each in got[:4])
    assert close(got[4], want[least][0])
    assert not {*others} & {*loads}  # its size is known before it is read


def test_a_file_that_is_replaced_is_seen(folder, want):
    server = server_of(folder)
    for name in ("low", "biases", "tokens"):
        os.replace(
            shutil.copy(folder / f"{name}.safetensors", folder / "half"), folder / "x.safetensors"
        )
        (got,) = answers(server := again(server), [("x", X[0])])
        assert close(got, want[name][0])
    assert len(operations(server)) == 1
    (folder / "x.safetensors").unlink()
    assert answers(again(server), [("x", X[0])])[0].status_code == 404
    assert not operations(server)


# over HTTP ---------------------------------------------------------------------------------------


@contextmanager
def running(server: serve.Server) -> Iterator[tuple[uvicorn.Server, int]]:
    """The server in a thread, as it is in a process; its port."""
    config = uvicorn.Config(serve.app_of(server), port=0, log_level="warning", lifespan="on")
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run)
    thread.start()
    try:
        until(lambda: web.started)
        yield web, web.servers[0].sockets[0].getsockname()[1]
    finally:
        web.should_exit = True
        thread.join(30)
    assert not any(each.is_alive() for each in (thread, server.thread))


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def ask(port: int, name: str | None, x: Tensor) -> tuple[int, Any]:
    body = json.dumps({"adapter": name, "inputs": x.tolist()}).encode()
    url, headers = f"http://127.0.0.1:{port}/predict", {"content-type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as got:
            return got.status, json.load(got)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_many_clients_at_once(folder, want):
    """With less memory than all takes, while a file is replaced, and bad ones are asked for."""
    (folder / "bad.safetensors").write_text("bad")
    server = server_of(folder, int(2.5 * max(sizes_of(folder).values())))
    seen, names = watched(server), [*SETS, None, "bad", "nobody"]
    asked = [(names[k % len(names)], k % len(X)) for k in range(160)]

    def one(k: int) -> tuple[int, Any]:
        if k == 80:
            other = shutil.copy(folder / "low.safetensors", folder / "half")
            os.replace(other, folder / "low.safetensors")
        return ask(port, asked[k][0], X[asked[k][1]])

    with running(server) as (_, port), ThreadPoolExecutor(8) as pool:
        got = list(pool.map(one, range(len(asked))))
    for (status, answer), (name, i) in zip(got, asked, strict=True):
        assert status == {"bad": 422, "nobody": 404}.get(str(name), 200)
        if status == 200:
            assert answer["adapter"] == name
            assert close(answer["outputs"], want[name][i])
    assert max(seen) <= server.adapters.budget
    assert len(seen) < len(asked)


class Held(nn.Module):
    """A forward that waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.begun, self.sizes = threading.Event(), threading.Event(), list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        self.begun.set()
        assert self.go.wait(30)
        return x.mean((1, 2, 3))[:, None]


def test_who_has_gone_is_not_computed_for(folder):
    model = Held()
    server = server_of(folder, model=model)
    body = json.dumps({"adapter": None, "inputs": X[0].tolist()}).encode()
    lines = "POST /predict HTTP/1.1", "host: x", "content-type: application/json"
    start = "\r\n".join((*lines, f"content-length: {len(body)}", "", "")).encode()
    with running(server) as (_, port), ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, port, None, X[0])
        assert model.begun.wait(30)
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(start + body)
            until(lambda: server.queue.qsize() == 1)
        stays = pool.submit(ask, port, None, X[1])
        until(lambda: server.queue.qsize() == 2)
        until(lambda: server.queue.queue[0].answer.cancelled())
        model.go.set()
        assert (first.result()[0], stays.result()[0]) == (200, 200)
    assert model.sizes == [1, 1]


def test_who_waits_when_it_ends_is_answered(folder):
    model = Held()
    server = server_of(folder, model=model)
    with running(server) as (web, port), ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, port, None, x) for x in X[:4]]
        until(lambda: model.begun.is_set() and server.queue.qsize() + sum(model.sizes) == 4)
        web.should_exit = True
        time.sleep(0.1)
        model.go.set()
        assert [future.result()[0] for future in asked] == [200] * 4


def test_what_there_is_is_told(client, folder):
    (folder / "bad.safetensors").write_text("bad")
    for name in ("low", "bad"):
        client.post("/predict", json={"adapter": name, "inputs": X[0].tolist()})
    told = client.get("/adapters").json()
    by_name = {each["name"]: each for each in told["adapters"]}
    assert {*by_name} == {*SETS, "bad"}
    assert by_name["low"]["nbytes"] == told["nbytes"] > 0
    assert by_name["train"] == {"name": "train", "nbytes": 0, "error": None}
    assert "no whole safetensors" in by_name["bad"]["error"]


def test_the_command_line(saved, tmp_path, monkeypatch):
    save_file(base().state_dict(), tmp_path / "base.safetensors")
    apps: list[Any] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **rest: apps.append((app, rest)))
    command = (
        f"x {__file__}:built {saved} --weights {tmp_path / 'base.safetensors'} --budget 3 --port 81"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    serve.main()
    ((app, rest),) = apps
    assert rest == {"host": "127.0.0.1", "port": 81}
    with TestClient(app) as client:
        got = client.post("/predict", json={"adapter": "low", "inputs": X[0].tolist()}).json()
        assert client.get("/adapters").json()["budget"] == 3 * 2**20
    assert close(got["outputs"], alone(saved / "low.safetensors", X[0]))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (f"{__file__}:built {__file__}", "there is no folder"),
        ("timm:test_vitt .", "Nearest: test_vit"),
        (f"{__file__}:pair .", "takes or gives more than one tensor"),
    ],
)
def test_command_lines_that_are_wrong(arguments, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", *arguments.split()])
    with pytest.raises(SystemExit):
        serve.main()
    assert told in capsys.readouterr().err


def pair() -> nn.Module:
    model: Any = nn.LSTM(4, 4)
    model.example = lambda: torch.zeros(2, 3, 4)
    return model


def built() -> nn.Module:
    model: Any = tiny_vit(drop_rate=0.5).double()  # which nobody is to meet
    model.example = lambda: X[:2]
    return model

"""Operations come, act, change and go, again and again: nothing grows, others keep their bytes."""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

import surgery
from surgery import (
    activate,
    at,
    block,
    disabled,
    ffn,
    head,
    insert,
    lora,
    mixed,
    norm,
    prompt,
    qkv,
    scale_shift,
    swap,
    unfreeze,
)
from surgery.errors import FileError
from surgery.parts import mica
from tests.engine.test_activity import answer, bytes_of, operation, train, vit
from tests.models import tiny_vit

KINDS: dict[str, Any] = {
    "lora": [at(qkv, lora(rank=2)), at(head, unfreeze)],
    "wide": [at(qkv, lora(rank=4, alpha=2.0)), at(head, unfreeze)],
    "shared": "adapterx_ffn",
    "tokens": at(block, insert(prompt(tokens=2))),
    "frozen": at(ffn, lora(rank=2, frozen_A=True)),
    "mica": at(qkv, mica(rank=2)),
    "scaled": [at(qkv, surgery.append(scale_shift())), at(norm, unfreeze)],
}
ROOM = {"lora": 8, "wide": 8, "frozen": 4, "mica": 4}  # of those that can have it


def small() -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit(depth=1).double().eval()


def files_of(
    folder: Path, *kinds: str, seeds: int = 1, build: Callable[[], nn.Module] = vit
) -> dict[str, list[Path]]:
    """Of each kind files of operations that were trained."""
    found: dict[str, list[Path]] = {}
    for kind in kinds:
        for seed in range(seeds):
            model = surgery.apply(build(), KINDS[kind], seed=seed)
            train(model, "default", seed)
            found.setdefault(kind, []).append(surgery.save(model, folder / f"{kind}{seed}"))
    return found


def hooks(model: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
              "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called",
              "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")  # fmt: skip
    return sum(len(vars(module)[table]) for module in model.modules() for table in tables)


def census(model: nn.Module) -> dict[str, Any]:
    """What there is: objects by type, bytes of tensors, hooks, modules, files, threads, caches."""
    gc.collect()
    things = gc.get_objects()
    kinds = Counter(f"{type(thing)!r}" for thing in things)
    tensors = [t for t in things if type(t) in (Tensor, nn.Parameter) and not t.is_meta]
    attributes = sum(len(vars(module)) for module in model.modules())
    everywhere = [v for k, v in vars(registration).items() if k.startswith("_global_")]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    del things, tensors
    return {
        "objects": kinds,
        "bytes": sum(storages.values()),
        "hooks": hooks(model),
        "of all modules": sum(len(table) for table in everywhere if isinstance(table, dict)),
        "attributes": attributes,
        "modules": len(sys.modules),
        "files": len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0,
        "threads": threading.active_count(),
        "entries": [len(op.journal.entries) for op in model.surgery.operations],  # type: ignore[union-attr, operator]
        "compiled": dict(torch._dynamo.utils.counters["stats"]),
    }


@torch.no_grad()
def test_two_hundred_cycles_leak_nothing(tmp_path: Path) -> None:
    """Load, activate, mix, swap, fail, and revert in every order, beside one that stays."""
    files = files_of(tmp_path, "lora", "wide", "shared", "tokens", build=small)
    model = surgery.apply(small(), KINDS["lora"], name="stays")
    train(model, "stays", 9)
    told, kept, gone = answer(model), bytes_of(model, "stays"), weakref.WeakSet[Any]()
    other = ("shared", "tokens")

    def cycle(i: int) -> None:
        pair = ["goes", other[i % 2]]
        surgery.load(model, files["lora"][0], name="goes", room=8)
        surgery.load(model, files[pair[1]][0], name=pair[1])
        gone.update(operation(model, name) for name in pair)
        answer(activate(model, {"goes": 0.5, "stays": 0.5}))
        with mixed(model, [pair[i // 2 % 2], None]):
            run = threading.Thread(target=answer, args=(model,))
            run.start()
            run.join()
        swap(model, "goes", files["wide"][0])
        with pytest.raises(FileError, match="of other rules"):
            swap(model, "goes", files["tokens"][0])
        with disabled(model, "goes"), torch.enable_grad():
            answer(model)
        for name in pair if i // 4 % 2 else pair[::-1]:
            surgery.revert(model, name=name)
        activate(model, "stays")

    for i in range(8):  # each way once: what is made once and kept is kept then
        cycle(i)
    census(model)
    before = census(model)
    for i in range(200):
        cycle(i)
    after = census(model)
    more = after.pop("objects") - before.pop("objects")
    assert {kind: n for kind, n in more.items() if n > 2} == {}, "objects were left"
    assert after == before
    assert not gone
    assert torch.equal(answer(model), told)
    now = bytes_of(model, "stays")
    assert all(torch.equal(now[key], tensor) for key, tensor in kept.items())


@pytest.mark.parametrize("seed", range(12))
def test_no_walk_changes_a_byte_of_another(seed: int, tmp_path: Path) -> None:
    """Random walks of everything that is done to one operation, beside others of other kinds."""
    draw = random.Random(seed)
    kinds = draw.sample([kind for kind in KINDS if kind != "wide"], 3)
    files, base, model = files_of(tmp_path, *kinds, seeds=2), answer(vit()), vit()
    alone: dict[Path, Tensor] = {
        file: answer(surgery.load(vit(), file)) for both in files.values() for file in both
    }
    held: dict[str, Path] = {}  # what each operation is
    for _ in range(16):
        kind = draw.choice(kinds)
        kept = {name: bytes_of(model, name) for name in held if name != kind}
        file = draw.choice(files[kind])
        if kind not in held:
            if held:
                activate(model, None)
            surgery.load(model, file, name=kind, room=draw.choice([None, ROOM.get(kind)]))
            held[kind] = file
        elif (act := draw.randrange(4)) == 0:
            swap(model, kind, file)
            held[kind] = file
        elif act == 1:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                surgery.revert(model, name=kind)
            del held[kind]
        else:
            activate(model, None if act == 2 else [kind])
        for name, tensors in kept.items():
            now = bytes_of(model, name)
            assert now.keys() == tensors.keys()
            assert all(torch.equal(now[key], t) for key, t in tensors.items()), (kind, name)
        for name in draw.sample([*held], len(held)):
            got, want = answer(activate(model, name)), alone[held[name]]
            assert (got - want).abs().max() <= 1e-14 * want.abs().max(), name
        assert torch.equal(answer(activate(model, None)) if held else answer(model), base)

"""What works on models in shards, or tensor parallel, on two processes: the same as on one."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import adapter, at, ffn, lora, parallel, scale_shift, unfreeze
from tests.ranks import results_of

NORMS = at("layers.*.norm2", unfreeze), at("norm", unfreeze)
RULES = [at("layers.*.linear1", lora(rank=3)), *NORMS]
SETS: dict[str, Any] = {"at modules": RULES, "at weights": "lora", "experts": "adapterx_ffn"}
X = torch.linspace(-1, 1, 320).view(4, 5, 16)
GOAL = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(2))
Wrap = Callable[[nn.Module], nn.Module]


def build() -> nn.Module:
    """Widths that two processes cannot share evenly."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 30, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)


def still(model: nn.Module) -> nn.Module:
    """Each forward gives the same."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def trained(rules: Any = RULES) -> nn.Module:
    model = still(surgery.apply(build(), rules))
    with torch.no_grad():
        for i, parameter in enumerate(surgery.parameters(model)):
            parameter.add_(0.01 * (i % 7 + 1))
    return model


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def columns(model: nn.Module) -> nn.Module:
    """Tensor parallel: the first linear by columns, the second by rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2,))
    plan = {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()}
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)
    return model


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


COLUMNS: dict[str, Any] = {
    "a linear by columns": at("layers.*.linear1", lora(rank=3)),
    "a linear by rows": at("layers.*.linear2", lora(rank=3)),
    "what follows it": at("layers.*.{linear1,linear2}", scale_shift()),
    "beside both": at(ffn, parallel(adapter(rank=3))),
    "shared experts": "adapterx_ffn",
    "the weights": at("layers.*.{linear1,linear2}", unfreeze),
}
MERGES = [*COLUMNS][:3]


def three_steps(model: nn.Module, run: nn.Module, x: Tensor, goal: Tensor) -> None:
    optimizer = torch.optim.SGD(surgery.groups(model, lr=0.1), momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        (run(x) - goal).square().mean().backward()
        optimizer.step()


def whole(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Any] = model.state_dict()
    return {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in state.items()}


def is_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def off(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert list(a) == list(b)
    return max((a[key] - b[key]).abs().max().item() for key in a)


# what is tried: each gives what must be true, or a number that must be small ---------------------


def saved(folder: str, rank: int, rules: Any) -> Any:
    one, many = trained(rules), fsdp2(trained(rules))
    many(X)  # the root stays gathered
    paths = surgery.save(one, f"{folder}/one-{rank}"), surgery.save(many, f"{folder}/many")
    assert not list(Path(folder).glob(".many*"))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert is_same(surgery.state_dict(surgery.load(build(), paths[1])), surgery.state_dict(one))
    mine = surgery.save(many, f"{folder}/many-{rank}")  # another path for each
    assert mine.read_bytes() == paths[0].read_bytes()
    return True


def stepped(wrap: Wrap, rank: int, rules: Any) -> float:
    one, many = trained(rules), trained(rules)
    three_steps(one, one, X, GOAL)
    three_steps(many, wrap(many), X[rank::2], GOAL[rank::2])
    return off(surgery.state_dict(one), surgery.state_dict(many))


def in_columns(folder: str, kind: str) -> Any:
    """Parts that are whole in all processes, at linears that are not: all of the above."""
    one, many = trained(rules := COLUMNS[kind]), columns(trained(rules))
    three_steps(one, one, X, GOAL)
    three_steps(many, many, X, GOAL)
    far = [off(surgery.state_dict(one), surgery.state_dict(many))]
    again = still(surgery.load(build(), surgery.save(many, f"{folder}/columns")))
    want = many(X).detach()
    far.append((again(X) - want).abs().max().item() / 4)
    with surgery.disabled(many):
        far.append((many(X) - build()(X)).abs().max().item() / 4)
    if kind in MERGES:
        assert off(surgery.merge(again).state_dict(), whole(surgery.merge(many))) == 0
        far.append((many(X) - want).abs().max().item() / 4)
        surgery.unmerge(many)
    assert torch.equal(many(X), want)
    assert is_same(whole(surgery.revert(many)), build().state_dict())
    return max(far)


def loaded(folder: str) -> Any:
    file = surgery.save(one := trained(), f"{folder}/good", verify=True)
    for filled in (lambda m: surgery.load(m, file, verify=True), _with_state(one)):
        many = fsdp2(surgery.apply(build(), RULES))
        many(X)
        filled(many)
        assert is_same(surgery.state_dict(many), surgery.state_dict(one))
        assert torch.equal(many(X), one(X))
    return True


def _with_state(one: nn.Module) -> Any:
    return lambda many: surgery.load_state_dict(many, surgery.state_dict(one))


def undone(rules: Any) -> Any:
    """Disabled, merged, unmerged, reverted; each time after a forward, which gathers."""
    one, many, base = trained(rules), fsdp2(trained(rules)), build()
    three_steps(many, many, X, GOAL)
    surgery.load_state_dict(one, surgery.state_dict(many))
    want = many(X).detach()
    with surgery.disabled(many):
        assert torch.equal(many(X), base(X))
    assert torch.equal(many(X), want)
    if rules != SETS["experts"]:
        surgery.merge(one)
        surgery.merge(many)
        assert torch.allclose(many(X), want, atol=1e-5)
        assert is_same(whole(many), one.state_dict())
        surgery.unmerge(many)
        assert torch.equal(many(X), want)
    surgery.revert(many)
    assert is_same(whole(many), base.state_dict())
    many(X).sum().backward()
    return all(p.grad is not None for p in many.parameters())


def of_two(rank: int) -> Any:
    """Two operations that train the same norm: each keeps, and gives back, its own."""

    def operated(wrap: Wrap, x: Tensor, goal: Tensor) -> nn.Module:
        model = trained()
        surgery.apply(model, at("layers.*.norm2", unfreeze), name="second")
        three_steps(model, wrap(model), x, goal)
        return model

    one, many = operated(lambda m: m, X, GOAL), operated(fsdp2, X[rank::2], GOAL[rank::2])
    names = ("default", "second")
    far = [off(*(surgery.state_dict(m, name=n) for m in (one, many))) for n in names]
    with surgery.disabled(one, "default"), surgery.disabled(many, "default"):
        far.append((one(X) - many(X)).abs().max().item())
    surgery.revert(one, name="default")
    surgery.revert(many, name="default")
    far.append(off(one.state_dict(), whole(many)))
    return max(far)


def handed_out() -> Any:
    """After a forward without gradients what is gathered is no use to an optimizer."""
    many = fsdp2(trained())
    with torch.no_grad():
        many(X)
    return all(hasattr(parameter, "full_tensor") for parameter in surgery.parameters(many))


def failed(folder: str, rank: int) -> Any:
    """Where the file of one cannot be written, or read, all are told."""
    many, told = fsdp2(trained()), []
    file = surgery.save(many, f"{folder}/whole")
    lost = f"{folder}/none/x"
    for call in (
        lambda: surgery.save(many, f"{folder}/here" if rank else lost),
        lambda: surgery.load(many, file if rank else lost),
    ):
        try:
            call()
        except surgery.FileError as error:
            told.append("none" in str(error))
    return told == [True, True]


def checkpointed(folder: str) -> Any:
    """torch.distributed.checkpoint of the adapter alone, into other shards, and one process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    many, place = fsdp2(trained()), f"{folder}/dcp"
    dcp.save(surgery.state_dict(many, sharded=True), checkpoint_id=place)
    others = (fully_shard(surgery.apply(build(), RULES)), surgery.apply(build(), RULES))
    for other in others:
        state = surgery.state_dict(other, sharded=True)
        dcp.load(state, checkpoint_id=place)
        surgery.load_state_dict(other, state)
        assert is_same(surgery.state_dict(other), surgery.state_dict(many))
    return len(list(Path(place).glob("*.distcp"))) == 2


def trials(folder: str, rank: int) -> dict[str, Callable[[], Any]]:
    by_set = {
        f"{name} {kind}": trial
        for kind, rules in SETS.items()
        for name, trial in {
            "saved": lambda r=rules, k=kind: saved(_folder(folder, k, rank), rank, r),
            "undone": lambda r=rules: undone(r),
            "stepped": lambda r=rules: stepped(fsdp2, rank, r),
            "stepped in DDP": lambda r=rules: stepped(ddp, rank, r),
        }.items()
    }
    by_set |= {
        f"in columns, {kind}": lambda k=kind: in_columns(_folder(folder, k, rank), k)
        for kind in COLUMNS
    }
    return by_set | {
        "loaded": lambda: loaded(_folder(folder, f"of-{rank}", 0)),
        "of two": lambda: of_two(rank),
        "handed out": handed_out,
        "failed": lambda: failed(folder, rank),
        "checkpointed": lambda: checkpointed(folder),
    }


def _folder(folder: str, kind: str, rank: int) -> str:
    import torch.distributed as dist

    Path(folder, kind).mkdir(exist_ok=True)
    dist.barrier()
    return f"{folder}/{kind}"


def work(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=30))
    done: dict[str, Any] = {}
    for name, trial in trials(folder, rank).items():
        try:
            done[name] = trial()
        except Exception:
            done[name] = traceback.format_exc()
        torch.save(done, f"{folder}/rank-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(__file__, tmp_path_factory.mktemp("ranks"), seconds=120)


@pytest.mark.processes
@pytest.mark.parametrize("name", trials("", 0))
def test_in_shards_it_is_as_on_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        result = rank.get(name, "it never came to it")
        assert not isinstance(result, str), result
        assert result if isinstance(result, bool) else 0 <= result < 1e-6


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

"""Models in shards on two processes: what is refused is so on both, and the remedy works."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import at, lora, unfreeze
from surgery.spec.case import stir
from tests.ranks import results_of

RULES = [at("layers.*.linear1", lora(rank=2)), at("layers.*.norm2", unfreeze)]
X = torch.linspace(-1, 1, 160).view(2, 5, 16)


def build() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def trained() -> nn.Module:
    model = surgery.apply(build(), RULES)
    with torch.no_grad():
        for i, parameter in enumerate(surgery.parameters(model)):
            parameter.add_(0.01 * (i % 7 + 1))
    return model


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


SHARDED: dict[str, Callable[[nn.Module], nn.Module]] = {"FSDP2": fsdp2, "FSDP1": fsdp1}


def gathered(wrapped: nn.Module) -> nn.Module:
    """The remedy as the errors give it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    plain = surgery.apply(build(), RULES)
    plain.load_state_dict(state)
    return plain


def calls(folder: str) -> dict[str, Callable[[nn.Module], Any]]:
    return {
        "apply": lambda m: surgery.apply(m, RULES, name="second"),
        "save": lambda m: surgery.save(m, f"{folder}/x.safetensors"),
        "state_dict": surgery.state_dict,
        "merge": surgery.merge,
        "revert": surgery.revert,
        "disabled": lambda m: surgery.disabled(m).__enter__(),
    }


# fully_shard gathers around each forward what has a shape: the rest works (test_in_shards)
REFUSED = {"FSDP2": {"apply"}, "FSDP1": {*calls("")}}


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def at_weights(wrap: Callable[[nn.Module], nn.Module]) -> list[float]:
    """How far answers and gradients of parts at weights are from those of one process."""

    def operated() -> nn.Module:
        model = surgery.apply(build(), "lora")
        stir(model, 1)
        return model

    alone, wrapped = operated(), wrap(operated())
    off = [(alone(X) - wrapped(X)).abs().max().item()]
    alone(X).square().sum().backward()
    wrapped(X).square().sum().backward()
    for (name, own), (_, theirs) in zip(
        alone.named_parameters(), wrapped.named_parameters(), strict=True
    ):
        if own.grad is not None:
            assert theirs.grad is not None, name
            grad: Any = theirs.grad
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            off.append(((whole - own.grad).abs().max() / own.grad.abs().max()).item())
    return off


def outcomes(kind: str, folder: str) -> dict[str, Any]:
    """What came of every call, as text; and answers after the remedy."""
    model = trained()
    wrapped = SHARDED[kind](model)
    with torch.no_grad():
        want = wrapped(X)
    done: dict[str, Any] = {}
    for name in sorted(REFUSED[kind]):
        call = calls(folder)[name]
        try:
            call(model)
            done[name] = "no error"
        except surgery.SurgeryError as error:
            done[name] = str(error)
        except Exception as error:  # what torch says itself
            done[name] = f"raw: {error}"
    with torch.no_grad():
        again: Tensor = wrapped(X)  # all calls have left it as it was
        plain = gathered(wrapped)
        done["off"] = [
            (again - want).abs().max().item(),
            (plain(X) - want).abs().max().item(),
            (surgery.load(build(), surgery.save(plain, f"{folder}/{os.getpid()}"))(X) - want)
            .abs()
            .max()
            .item(),
            (surgery.merge(plain)(X) - want).abs().max().item(),
            (surgery.revert(plain)(X) - build()(X)).abs().max().item(),
        ]
    return done


def work(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=30))
    done: dict[str, Any] = {kind: outcomes(kind, folder) for kind in SHARDED}
    done["at weights"] = {wrap.__name__: at_weights(wrap) for wrap in (ddp, fsdp2)}
    torch.save(done, f"{folder}/rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(__file__, tmp_path_factory.mktemp("ranks"), seconds=100)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_weights_that_nobody_calls_are_changed_in_shards_too(
    ranks: list[dict[str, Any]], kind: str
) -> None:
    for rank in ranks:
        off = rank["at weights"][kind]
        assert len(off) == 5
        assert max(off) < 1e-5


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "name"), [(k, name) for k in REFUSED for name in sorted(REFUSED[k])]
)
def test_refused_on_all_ranks_alike(ranks: list[dict[str, Any]], kind: str, name: str) -> None:
    texts = {rank[kind][name] for rank in ranks}
    assert len(texts) == 1
    assert "shards" in texts.pop()


@pytest.mark.processes
@pytest.mark.parametrize("kind", SHARDED)
def test_gathered_as_the_error_says_it_is_saved_merged_and_reverted(
    ranks: list[dict[str, Any]], kind: str
) -> None:
    for rank in ranks:
        *near, reverted = rank[kind]["off"]
        assert max(near) < 1e-5
        assert reverted == 0


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

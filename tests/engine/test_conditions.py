"""States of a model in which calls cannot be right: every public function, in every state."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import surgery
import surgery.spec.snapshot
from surgery import at, lora, unfreeze
from surgery.state import averaging
from surgery.training import spt

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says of its older ways

X = torch.linspace(-1, 1, 24).view(3, 8)
RULES = [at("first", lora(rank=2)), at("last", unfreeze)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


# the calls: those that want a model as it is built, and those that want one that was operated ----

Call = Callable[[nn.Module, Path], Any]


def _disabled(model: nn.Module, folder: Path) -> None:
    with surgery.disabled(model):
        pass


def _swapped(model: nn.Module, folder: Path) -> None:
    with averaging.swapped(model, STATE):
        pass


def _mixed(model: nn.Module) -> None:
    with surgery.mixed(model, ["default", None]):
        pass


def operated(rules: Any = RULES) -> nn.Module:
    return surgery.apply(build(), rules)


STATE = surgery.state_dict(operated())
BARE: dict[str, Call] = {
    "anatomy": lambda m, f: surgery.anatomy(m),
    "apply": lambda m, f: surgery.apply(m, RULES),
    "fingerprint": lambda m, f: surgery.fingerprint(m),
    "load": lambda m, f: surgery.load(m, f / "good.safetensors"),
    "load_peft": lambda m, f: surgery.load_peft(m, f / "peft"),
    "plan": lambda m, f: surgery.plan(m, RULES),
    "Plan.apply": lambda m, f: surgery.plan(m, RULES).apply(),
    "spt.measure": lambda m, f: spt.measure(m, [X.to(next(m.parameters()).device)], _loss),
}
OPERATED: dict[str, Call] = {
    "activate": lambda m, f: surgery.activate(m, None),
    "apply, a second time": lambda m, f: surgery.apply(m, RULES, name="second"),
    "as_lora": lambda m, f: surgery.as_lora(m, rank=1),
    "balance_loss": lambda m, f: surgery.balance_loss(m),
    "disabled": _disabled,
    "groups": lambda m, f: surgery.groups(m, lr=1e-3),
    "load_state_dict": lambda m, f: surgery.load_state_dict(m, STATE),
    "materialise": lambda m, f: surgery.materialise(m),
    "merge": lambda m, f: surgery.merge(m),
    "mixed": lambda m, f: _mixed(m),
    "parameters": lambda m, f: surgery.parameters(m),
    "penalty": lambda m, f: surgery.penalty(m),
    "report": lambda m, f: str(surgery.report(m)),
    "revert": lambda m, f: surgery.revert(m),
    "routing": lambda m, f: surgery.routing(m),
    "save": lambda m, f: surgery.save(m, f / "x.safetensors"),
    "save_peft": lambda m, f: surgery.save_peft(m, f / "y"),
    "save_pretrained": lambda m, f: surgery.save_pretrained(m, f / "folder"),
    "state_dict": lambda m, f: surgery.state_dict(m),
    "swap": lambda m, f: surgery.swap(m, "default", f / "good.safetensors"),
    "swapped": _swapped,
    "train_only": lambda m, f: surgery.train_only(m, "default"),
    "ensemble": lambda m, f: averaging.ensemble(m, [STATE], X),
}
MERGED: dict[str, Call] = {"unmerge": lambda m, f: surgery.unmerge(m)}


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sum()


def test_every_public_function_of_a_model_is_listed() -> None:
    functions = {
        name: value
        for name in surgery.__all__
        if inspect.isfunction(value := getattr(surgery, name))
    }
    of_models = {
        name
        for name, value in functions.items()
        if next(iter(inspect.signature(value).parameters), "") == "model"
    }
    assert of_models == {*BARE, *OPERATED, *MERGED} & {*functions}


# the states --------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As engines of training libraries are: what it has not itself, its module has."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


HELD: list[nn.Module] = []  # wrappers, which must live as long as the test


def _fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    HELD.append(FullyShardedDataParallel(model, use_orig_params=True, device_id=CPU))
    return HELD[-1]


def _ddp(model: nn.Module) -> nn.Module:
    HELD.append(nn.parallel.DistributedDataParallel(model))
    return HELD[-1]


def _tensor_parallel(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1,))
    return parallelize_module(model, mesh, {"first": ColwiseParallel()})


def _fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def _holding_ddp(model: nn.Module) -> nn.Module:
    model.last = _ddp(model.last.requires_grad_(True))
    return model


def _replicated(model: nn.Module) -> nn.Module:
    from torch.distributed._composable import replicate

    return replicate(model)


def _offloaded(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device=CPU)


def _in_inference(model: nn.Module) -> nn.Module:
    with torch.inference_mode():
        return model.double()


CPU = torch.device("cpu")
PURE = {"anatomy", "fingerprint", "plan"}
RUNNING = {  # it goes on
    "balance_loss", "groups", "materialise", "parameters", "penalty", "report", "routing",
}  # fmt: skip
GATHERED = {  # what is in shards is gathered, one by one
    "disabled", "load_state_dict", "merge", "revert", "save", "state_dict", "unmerge",
}  # fmt: skip
ALL = {*BARE, *OPERATED, *MERGED}
NEW = {"apply", "apply, a second time", "Plan.apply", "load", "load_peft", "as_lora"}


class State(NamedTuple):
    """A model is put into it; a word that refusals have; the calls that go on being right."""

    put: Callable[[nn.Module], nn.Module]
    word: str
    right: set[str]
    alone: bool = True  # no processes need to know of each other


def _wrapped(name: str, put: Callable[[nn.Module], nn.Module], alone: bool = False) -> State:
    return State(put, name, {"fingerprint"}, alone)


STATES = {
    "fully_shard": State(_fsdp2, "shards", PURE | RUNNING | GATHERED - {"unmerge"}, False),
    "in FSDP1": State(lambda m: _fsdp1(m).module, "shards", PURE | RUNNING, False),
    "tensor parallel": State(_tensor_parallel, "tensor parallel", PURE | RUNNING | GATHERED, False),
    "in DDP": State(lambda m: _ddp(m).module, "DistributedDataParallel", ALL - NEW, False),
    "replicated": State(_replicated, "DistributedDataParallel", ALL - NEW, False),
    "offloaded": State(_offloaded, "offload", PURE | RUNNING - {"materialise"}),
    "on meta": State(
        lambda m: m.to("meta"),
        "meta",
        PURE
        | RUNNING - {"materialise"}
        | NEW - {"load", "load_peft", "as_lora"}
        | {"activate", "disabled", "mixed", "revert", "state_dict", "train_only", "unmerge"},
    ),
    "made in inference mode": State(
        _in_inference,
        "inference",
        PURE | RUNNING | {"save", "save_peft", "save_pretrained", "state_dict"},
    ),
    "FSDP1": _wrapped("wrapper", _fsdp1),
    "DDP": _wrapped("wrapper", _ddp),
    "DataParallel": _wrapped("wrapper", nn.DataParallel, True),
    "torch.compile": _wrapped("wrapper", lambda m: torch.compile(m, backend="eager"), True),
    "engine": _wrapped("wrapper", Wrapper, True),
}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    HELD.clear()
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    surgery.save(operated(), tmp_path / "good.safetensors")
    surgery.save_peft(operated(), tmp_path / "peft")
    return tmp_path


PAIRS = [(state, call) for state in STATES for call in sorted(ALL)]


@pytest.mark.parametrize(("state", "name"), PAIRS)
def test_right_or_refused(
    state: str, name: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    """A call is right, or raises a SurgeryError that names the state, the model as it was."""
    put, word, right, alone = STATES[state]
    if not alone:
        request.getfixturevalue("process")
    call = {**BARE, **OPERATED, **MERGED}[name]
    made = build() if name in BARE else operated()
    if HELD:  # wrappers of the one before
        HELD.clear()
        gc.collect()
    model = put(surgery.merge(made) if name in MERGED else made)
    before = surgery.fingerprint(model)
    if name in right:
        call(model, folder)
        return
    with pytest.raises(surgery.SurgeryError, match=word) as caught:
        call(model, folder)
    assert caught.value.remedy
    surgery.spec.snapshot.unchanged(before, surgery.fingerprint(model), "a refused call")


@pytest.mark.usefixtures("process")
def test_a_module_in_ddp_inside_of_the_model() -> None:
    """New parameters are refused, and an optimiser for parts that no one would reduce."""
    for call in ("apply", "load", "Plan.apply"):
        with pytest.raises(surgery.OperationError, match="last is wrapped"):
            BARE[call](_holding_ddp(build()), Path("x"))
    model = _holding_ddp(operated())
    with pytest.raises(surgery.OperationError, match="last is wrapped"):
        surgery.parameters(model)
    surgery.revert(model)


@pytest.mark.usefixtures("process")
def test_a_wrapper_of_another_model_is_no_matter() -> None:
    _ddp(build())
    assert surgery.parameters(operated())


def test_weights_that_a_library_keeps_elsewhere_are_seen() -> None:
    """DeepSpeed's ZeRO-3 leaves parameters of no size behind."""
    for call, made in (("apply", build()), ("save", operated())):
        made.first.weight.data = torch.empty(0)
        with pytest.raises(surgery.OperationError, match=r"first\.weight was emptied"):
            {**BARE, **OPERATED}[call](made, Path("x"))


# what is refused falsely by none of them ---------------------------------------------------------


def test_linears_without_features_are_as_they_are_made() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 0))
    surgery.revert(surgery.apply(model, at("0", lora(rank=2))))


def test_lazy_modules_are_run_first() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    with pytest.raises(surgery.OperationError, match=r"1\.weight, 1\.bias are lazy"):
        surgery.apply(model, at("0", lora(rank=2)))
    model(X)
    surgery.revert(surgery.apply(model, at("0", lora(rank=2))))


def test_what_is_operated_first_trains_when_wrapped(process: None) -> None:
    for wrap in (_ddp, _fsdp1, _fsdp2, lambda m: torch.compile(m, backend="eager")):
        model = operated()
        wrapped = wrap(model)
        wrapped(X).sum().backward()
        assert any(p.grad is not None for p in surgery.parameters(model))


@pytest.mark.parametrize("compiled", ["the model", "a module of it", "its forward"])
def test_compiled_and_run_before_it_is_operated(compiled: str) -> None:
    """torch.compile sees hooks that come later, and hooks that go."""
    torch._dynamo.reset()
    model = build()
    run: Any = model
    if compiled == "its forward":
        run = torch.compile(model.forward, backend="eager")
    else:
        (model if compiled == "the model" else model.first).compile(backend="eager")
    base = run(X)
    surgery.apply(model, RULES)
    with torch.no_grad():
        for parameter in surgery.parameters(model):
            parameter.add_(0.1)
    plain = operated()
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(run(X), plain(X))
    assert not torch.allclose(run(X), base)
    surgery.revert(model)
    assert torch.allclose(run(X), base)


def test_only_what_is_offloaded_is_refused() -> None:
    """A rule at modules that stay in memory acts beside others that are offloaded."""
    accelerate = pytest.importorskip("accelerate")
    model = build()
    accelerate.hooks.attach_align_device_hook(model.last, execution_device=CPU, offload=True)
    assert model.last.weight.is_meta
    want = model(X)
    surgery.apply(model, at("first", lora(rank=2)))
    assert torch.equal(model(X), want)
    surgery.state_dict(model)
    surgery.revert(model)
    with pytest.raises(surgery.OperationError, match="offload"):
        surgery.apply(model, at("last", unfreeze))


def test_brought_back_it_is_operated() -> None:
    """The remedy for what is offloaded."""
    accelerate = pytest.importorskip("accelerate")
    model = _offloaded(build())
    accelerate.hooks.remove_hook_from_submodules(model)
    surgery.apply(model, RULES, example=X)


def test_made_anew_outside_of_inference_mode_it_is_operated() -> None:
    """The remedy for what was made there, before and after it was operated."""
    for model, call in ((build(), BARE["apply"]), (operated(), OPERATED["merge"])):
        _in_inference(model)
        for p in model.parameters():
            p.data = p.data.clone()
        call(model, Path("x"))


# an example with memory, and a model without -----------------------------------------------------


@pytest.mark.parametrize("bare", ["model", "example"])
@pytest.mark.parametrize("call", ["apply", "plan", "anatomy"])
def test_example_and_model_have_memory_both_or_neither(bare: str, call: str) -> None:
    model, example = build(), X
    if bare == "model":
        model.to("meta")
    else:
        example = X.to("meta")
    before = surgery.fingerprint(model)
    rules = {} if call == "anatomy" else {"rules": RULES}
    with pytest.raises(surgery.OperationError, match="meta"):
        getattr(surgery, call)(model, **rules, example=example)
    surgery.spec.snapshot.unchanged(before, surgery.fingerprint(model), "a refused example")
    surgery.plan(build().to("meta"), RULES, example=X.to("meta"))


# one operated model in another -----------------------------------------------------------------


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.out = build(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.enc(x))


def chained() -> nn.Sequential:
    return nn.Sequential(build(), nn.Linear(4, 2))


@pytest.mark.parametrize(("make", "inner"), [(Whole, "enc"), (chained, "0")])
def test_a_model_that_holds_an_operated_one_is_not_operated(
    make: Callable[[], nn.Module], inner: str
) -> None:
    model = make()
    tower = model.get_submodule(inner)
    surgery.apply(tower, RULES)
    before, keys = surgery.fingerprint(model), [*model.state_dict()]
    with pytest.raises(surgery.OperationError, match=f'"{inner}"'):
        surgery.apply(model, at(f"{inner}.last", lora(rank=1)))
    assert before == surgery.fingerprint(model)
    assert keys == [*model.state_dict()]
    surgery.revert(tower)
    surgery.apply(model, at(f"{inner}.last", lora(rank=1)))
    assert len(surgery.parameters(model)) == 2


@pytest.mark.parametrize(("make", "inner"), [(Whole, "enc"), (chained, "0")])
def test_a_module_of_an_operated_model_is_not_operated(
    make: Callable[[], nn.Module], inner: str
) -> None:
    model = surgery.apply(make(), at(f"{inner}.last", lora(rank=1)))
    before = surgery.fingerprint(model)
    with pytest.raises(surgery.OperationError, match="larger"):
        surgery.apply(model.get_submodule(inner), RULES)
    assert before == surgery.fingerprint(model)


def test_what_keeps_the_parts_of_another_is_no_operated_model() -> None:
    model = surgery.apply(chained(), at("1", unfreeze))
    with pytest.raises(surgery.OperationError, match="never operated"):
        surgery.parameters(model[0])
    with pytest.raises(surgery.OperationError):
        surgery.apply(model[0], RULES)


@pytest.mark.parametrize(
    "call",
    [
        surgery.parameters,
        surgery.report,
        surgery.revert,
        surgery.merge,
        surgery.state_dict,
        lambda model: _disabled(model, Path()),
    ],
)
def test_calls_that_would_leave_out_an_inner_operation_name_it(call: Callable[..., Any]) -> None:
    model = surgery.apply(Whole(), at("out", unfreeze))
    surgery.apply(model.enc, RULES)  # nothing in enc tells of the whole
    with pytest.raises(surgery.OperationError, match='"enc"'):
        call(model)
    surgery.revert(model.enc)
    assert [p.shape for p in surgery.parameters(model)] == [(2, 4), (2,)]
    surgery.state_dict(model)


def test_towers_of_a_model_are_operated_each_alone() -> None:
    model = nn.ModuleList([build(), build()])
    for tower in model:
        surgery.apply(tower, RULES)
    assert [len(surgery.parameters(tower)) for tower in model] == [4, 4]
    copy.deepcopy(model)
    for tower in model:
        surgery.revert(tower)

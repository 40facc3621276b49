"""What one forward has shown is not believed for ever: parts that stop counting are told."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import surgery
from surgery import GraftError, OperationError, adapter, append, at, lora, parallel, unfreeze
from tests.methods.test_methods import SETS, rules_of
from tests.models import images, tiny_vit

X = torch.randn(2, 5, 8)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x).relu()


def called(layer: Any, x: Tensor) -> Tensor:
    return layer(x)  # type: ignore[no-any-return]


def by_forward(layer: Any, x: Tensor) -> Tensor:
    return checkpoint(layer.forward, x, use_reentrant=False)  # type: ignore[no-any-return]


def fused(layer: Any, x: Tensor) -> Tensor:
    return x + F.linear(x, layer.proj.weight, layer.proj.bias).relu()


def transposed(layer: Any, x: Tensor) -> Tensor:
    return x + (x @ layer.proj.weight.t() + layer.proj.bias).relu()


def left_out(layer: Any, x: Tensor) -> Tensor:
    return x


class Net(nn.Module):
    """Runs its layers as `way` says, which may change."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(depth)), nn.Linear(8, 3)
        self.way: Callable[[Any, Tensor], Tensor] = called
        self.only = range(depth)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = self.way(layer, x) if i in self.only else layer(x)
        out: Tensor = self.head(x)
        return out


def operated(where: str = "layers.*.proj", **named: Any) -> Net:
    part = append(adapter(rank=2), residual=True)
    return surgery.apply(Net(), [at(where, part), at("head", unfreeze)], **named)


@contextlib.contextmanager
def silence() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("way", [by_forward, fused, transposed])
@pytest.mark.parametrize("first", [True, False], ids=["in a first forward", "in a later one"])
def test_going_round_the_hooks_is_told(way: Any, first: bool) -> None:
    model = operated("layers.*" if way is by_forward else "layers.*.proj")
    if first:
        model.way = way
        with pytest.raises(GraftError, match="never ran in a whole forward: the model reads"):
            model(X)
        return
    with silence():
        model(X)
        model(X)
    model.way = way
    with pytest.warns(UserWarning, match=r"3 of 3 sites \(layers\.0.* did not run"):
        model(X)
    with pytest.raises(
        GraftError, match=r"did not run in this forward, as before: the model reads"
    ):
        model(X)
    for call in (surgery.report, surgery.state_dict, surgery.merge):
        with pytest.raises(OperationError, match=r"layers\.0"):
            call(model)
    model.way = called
    with silence():
        model(X)
        surgery.state_dict(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda m, x: m.eval()(x),
        lambda m, x: m(x.repeat(1, 4, 1)),
        lambda m, x: m(x=x),
        lambda m, x: torch.no_grad()(m)(x),
        lambda m, x: _autocast(m, x),
    ],
    ids=["eval", "longer", "by name", "no_grad", "autocast"],
)
def test_a_forward_of_a_new_kind_is_looked_into(change: Any) -> None:
    model = operated()
    model(X)
    model.way = fused
    with pytest.raises(GraftError, match=r"reads the weight of layers\.0\.proj"):
        change(model, X)


def _autocast(model: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x)


def test_one_of_many_is_told_in_the_next_forward() -> None:
    """It might be dropped at random, which is no fault: so the next forward is looked into."""
    model = operated()
    model(X)
    model.way, model.only = fused, range(1)
    model(X)
    with pytest.raises(GraftError, match=r"1 of 3 sites \(layers\.0\.proj\)"):
        model(X)


@pytest.mark.parametrize("proved", [True, False])
def test_layers_that_are_dropped_at_random_are_silent(proved: bool) -> None:
    torch.manual_seed(0)
    model = operated(example=X if proved else None).train()
    model.way = lambda layer, x: x if model.training and torch.rand(()) > 0.6 else layer(x)
    with silence():
        for _ in range(20):
            model(X).square().sum().backward()
        model.eval()(X)
    assert all(p.grad is not None for p in surgery.parameters(model))


def test_a_layer_that_never_comes_is_an_error_in_training_too() -> None:
    model = operated().train()
    model.way, model.only = left_out, range(1)
    for _ in range(58):
        model(X)
    with pytest.raises(GraftError, match="never ran"):
        [model(X) for _ in range(10)]


def test_training_is_proved_by_the_example_too() -> None:
    class Fused(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.way = fused if self.training else called
            return super().forward(x)

    model = Fused().eval()
    before = surgery.fingerprint(model)
    with pytest.raises(GraftError, match="do not run in training: the model reads"):
        surgery.apply(model, at("**.proj", lora(rank=2)), example=X)
    assert surgery.fingerprint(model)["keys"] == before["keys"]
    assert not hasattr(model, "surgery")


def test_a_model_that_needs_more_than_the_example_in_training_is_noted() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    rules = [at("0", parallel(adapter(rank=2))), at("1", unfreeze)]
    surgery.apply(model, rules, example=torch.randn(1, 8))
    assert "not proved in training: ValueError" in str(surgery.report(model))
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_watched_anew(copied: Any) -> None:
    model = operated()
    model(X)
    twin = copied(model)
    twin.way = fused
    with pytest.raises(GraftError, match="reads the weight"):
        twin(X)
    model(X)


def test_a_tied_weight_that_another_module_reads_is_no_bypass() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
            self.head.weight, self.encodes = self.embed.weight, False

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(self.embed(x))
            return h if self.encodes else self.head(h)

    model, x = Tied(), torch.tensor([[1, 2]])
    surgery.apply(model, at("{body,head}", parallel(adapter(rank=2))))
    model(x)
    model.encodes = True
    with silence():
        model.eval()(x)


def test_a_module_that_was_exchanged_is_named_at_once() -> None:
    model = operated()
    model(X)
    model.layers[1].proj = copy.deepcopy(model.layers[1].proj)
    model.layers[1].proj._forward_hooks.clear()
    with pytest.raises(GraftError, match=r"layers\.1\.proj\) stand at modules that are no longer"):
        model(X)
    for call in (surgery.report, surgery.state_dict, surgery.merge):
        with pytest.raises(OperationError, match=r"layers\.1\.proj"):
            call(model)


def test_hooks_that_were_taken_off_are_told() -> None:
    model = operated()
    model.layers[1].proj._forward_hooks.clear()
    with pytest.raises(OperationError, match=r"layers\.1\.proj\) have lost their hooks"):
        surgery.state_dict(model)


def test_what_is_read_besides_is_kept_for_merging() -> None:
    class Besides(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.layers[0].proj.weight.sum()  # type: ignore[operator]

    model = surgery.apply(Besides(), at("**.proj", lora(rank=2)))
    model(X)
    assert model.surgery.default.read_besides == {"layers.0.proj"}


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_forward_that_breaks_off_leaves_torchs_modes_as_they_were(error: Any) -> None:
    model = operated()

    def broken(module: nn.Module, args: Any) -> None:
        raise error

    hook = model.head.register_forward_pre_hook(broken)
    with pytest.raises(error):
        model(X)
    hook.remove()
    if error is KeyError:
        assert _get_current_function_mode_stack() == []
    model(X)
    assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_silent_where_all_is_well(name: str) -> None:
    model: Any = surgery.apply(tiny_vit(), rules_of(name), example=images())
    with silence():
        for x in (images(), images(), images(batch=3)):
            model.train()(x).sum().backward()
            with torch.no_grad():
                model.eval()(x)
        surgery.state_dict(model)


@pytest.mark.parametrize("name", SETS)
def test_every_set_tells_that_its_blocks_are_gone_round(name: str) -> None:
    """Blocks whose forward is called, not they: whatever stands at them counts for nothing."""
    model: Any = surgery.apply(tiny_vit(), rules_of(name))
    model(images())
    sites = {hooked.path for hooked in model.surgery.default.hooked_sites}
    for module in model.blocks.modules():
        module.__class__ = _unhooked(type(module))
    broken = any(path.startswith("blocks.") for path in sites)
    told = pytest.raises((GraftError, UserWarning)) if broken else contextlib.nullcontext()
    with warnings.catch_warnings(), told:
        warnings.simplefilter("error")
        model(images())


def _unhooked(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"__call__": kind.forward})


@pytest.mark.parametrize("rules", ["lora", "adapterx_ffn", "arc", "compacter", "idpt", "tied_lora"])
def test_offloaded_after_it_was_operated(rules: str) -> None:
    """accelerate fetches the weights of modules that are called, and not what a part reads else."""
    accelerate = pytest.importorskip("accelerate")
    model, x = surgery.apply(tiny_vit(), rules).eval(), images()
    with torch.no_grad():
        want = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        if rules in ("lora", "adapterx_ffn"):
            assert torch.equal(model(x), want)
        else:
            with pytest.raises(GraftError, match="meta"):
                model(x)


class Padded(nn.Module):
    """nn.TransformerEncoder leaves padding out where torch fuses it: those rows are zero then."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.enc = nn.TransformerEncoder(layer, 3)
        self.head, self.round = nn.Linear(8, 3), False

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.enc(x, src_key_padding_mask=padding).mean(1)
        return F.linear(x, self.head.weight) if self.round else self.head(x)  # type: ignore[no-any-return]


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("proved", [False, True])
@pytest.mark.parametrize("rules", ["linear_probe", "full", at("head", lora(rank=2))])
def test_a_look_does_not_alter_the_answer(rules: Any, proved: bool, gradients: bool) -> None:
    """Looked into or not, torch takes the same path: its fused encoder leaves padding out."""
    model = Padded().eval()
    with torch.set_grad_enabled(gradients):
        for p in model.parameters():
            p.requires_grad = False
        want = model(X, PADDING)
        surgery.apply(model, rules, example=(X, PADDING) if proved else None)
        if rules == "full":  # whose gradients torch keeps track of, on its other path
            torch.set_grad_enabled(False)
        for _ in range(3):
            assert torch.equal(model(X, PADDING), want)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_where_no_look_is_taken_idle_sites_are_told_all_the_same() -> None:
    model = surgery.apply(Padded(), at("head", lora(rank=2))).eval()
    model.round = True
    with torch.no_grad(), pytest.raises(GraftError, match=r"\(head\) never ran"):
        model(X, PADDING)
    model.round = False
    model(X, PADDING)
    model.round = True
    with torch.no_grad(), pytest.warns(UserWarning, match=r"\(head\) did not run"):
        model(X, PADDING)


def dropping(layer: Any, x: Tensor) -> Tensor:
    return x if torch.rand(()) < 0.5 else layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", [by_forward, fused])
def test_dropped_layers_once_seen_hide_nothing_later(way: Any) -> None:
    torch.manual_seed(0)
    model = operated("layers.*" if way is by_forward else "layers.*.proj").train()
    model.way = dropping
    with silence():
        for _ in range(20):
            model(X).sum().backward()
    model.way = lambda layer, x: x if torch.rand(()) < 0.5 else way(layer, x)
    with pytest.raises(GraftError, match="as before: the model reads"):
        [model(X) for _ in range(8)]


@pytest.mark.parametrize("way", [by_forward, fused])
def test_some_layers_gone_round_while_others_are_dropped_are_found_in_time(way: Any) -> None:
    torch.manual_seed(0)
    model = operated("layers.*" if way is by_forward else "layers.*.proj").train()
    model.way = dropping
    for _ in range(20):
        model(X)
    broken = model.layers[0]
    model.way = lambda layer, x: way(layer, x) if layer is broken else dropping(layer, x)
    with pytest.raises(GraftError, match=r"layers\.0.*: the model reads"):
        [model(X) for _ in range(60)]


def test_skipped_wholly_in_one_kind_of_forward_is_looked_at_again() -> None:
    """Ever more seldom, as long as it is skipped; and one day the model goes round it."""
    model = operated().eval()
    model(X)
    model.way = left_out
    with silence():
        for _ in range(3):
            model(X.repeat(1, 4, 1))
    model.way = fused
    with pytest.raises(GraftError, match="as before: the model reads"):
        [model(X.repeat(1, 4, 1)) for _ in range(8)]


@contextlib.contextmanager
def nothing_told() -> Any:
    """torch's compiler itself has warnings, and swallows them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(did not run|not seen to run)")
        yield


def compiled(module: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend="eager")


def test_a_model_once_compiled_is_watched_when_it_is_called_itself() -> None:
    model = operated("layers.*")
    with torch.no_grad():
        compiled(model)(X)
    model(X).sum().backward()
    model.way = by_forward
    with pytest.warns(UserWarning, match="3 of 3 sites"):
        model(X)
    with pytest.raises(GraftError, match="the model reads"):
        model(X)


@pytest.mark.parametrize("ran", [True, False])
def test_what_is_compiled_elsewhere_hides_no_site(ran: bool) -> None:
    model = operated("layers.*")
    model.head.compile(backend="eager")
    if ran:
        with nothing_told():
            model(X)
    model.way = by_forward
    told: Any = (
        pytest.warns(UserWarning, match="3 of 3 sites")
        if ran
        else pytest.raises(GraftError, match=r"3 of 3 sites.*never ran")
    )
    with told:
        model(X)


@pytest.mark.parametrize("where", ["layers.*", "layers.*.proj"])
def test_sites_in_compiled_layers_are_not_taken_for_idle(where: str) -> None:
    torch._dynamo.reset()
    model = operated(where)
    for layer in model.layers:
        layer.compile(backend="eager")
    with nothing_told():
        for x in (X, X.repeat(1, 3, 1)):
            model.train()(x).sum().backward()
            with torch.no_grad():
                model.eval()(x)
    surgery.state_dict(model)


def test_sites_in_a_compiled_function_are_not_taken_for_idle() -> None:
    model = operated()
    run = compiled(lambda layer, x: layer(x))
    model.way = lambda layer, x: run(layer, x)
    with nothing_told():
        for _ in range(3):
            model(X).sum().backward()


def test_a_compiled_forward_that_goes_round_the_hooks_is_told() -> None:
    model = operated("layers.*")
    model(X)
    model.way = by_forward
    with pytest.warns(UserWarning, match="3 of 3 sites"):
        compiled(model)(X)


def test_trained_round_the_hooks_by_another_method_is_told() -> None:
    """It ran once, and was then trained by a method that calls the layers' forward, or its own."""
    model = operated("layers.*")
    model(X)
    model.way = by_forward
    model.forward(X).sum().backward()
    for call in (surgery.report, surgery.state_dict):
        with pytest.warns(UserWarning, match="no gradient came to any part at 3 of 3 sites"):
            call(model)
    model.zero_grad()
    model.way = called
    model(X).sum().backward()
    with silence():
        surgery.state_dict(model)
        surgery.report(model)


@pytest.mark.parametrize("why", ["frozen", "zeroed", "one is idle"])
def test_parts_without_gradients_by_design_are_silent(why: str) -> None:
    model = operated("layers.*").train()
    model(X)
    if why == "frozen":
        model.surgery.requires_grad_(False)
    if why == "one is idle":
        model.way, model.only = left_out, range(1)
    model(X).sum().backward()
    if why == "zeroed":
        model.zero_grad(set_to_none=True)
    with silence():
        surgery.state_dict(model)


def test_cached_steps_that_call_less_are_silent() -> None:
    """What an encoder gave is kept: cross-attention reads no keys anew from the second step on."""

    class Cache:
        def __init__(self) -> None:
            self.keys: list[Tensor] = []

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, cache: Cache) -> Tensor:
            if not cache.keys:
                cache.keys.append(self.k(x))
            return self.head(self.q(x) @ cache.keys[0].mT @ x)  # type: ignore[no-any-return]

    model = surgery.apply(Decoder(), at("{q,k}", lora(rank=2))).eval()
    with torch.no_grad(), silence():
        for _ in range(3):
            cache = Cache()
            for _ in range(6):
                model(X, cache)


class Experts(nn.Module):
    """Each sample goes to one of its experts, the one that `choice` says."""

    def __init__(self, kind: Any = nn.ModuleList) -> None:
        super().__init__()
        layers = [Layer() for _ in range(4)]
        named = {"a": layers[0], "b": layers[1], "c": layers[2], "d": layers[3]}
        self.experts = kind(layers if kind is nn.ModuleList else named)
        self.head, self.way = nn.Linear(8, 3), called

    def forward(self, x: Tensor, choice: list[int]) -> Tensor:
        experts: list[Any] = list(self.experts.children())
        return self.head(sum(self.way(experts[i], x) for i in choice))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.ModuleDict])
@pytest.mark.parametrize("proved", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_experts_that_get_no_token_are_no_fault(kind: Any, proved: bool, training: bool) -> None:
    rules = [at("experts.*.proj", lora(rank=2)), at("head", unfreeze)]
    model = surgery.apply(Experts(kind), rules, example=(X, [1]) if proved else None)
    assert ("the example does not reach" in str(surgery.report(model))) is proved
    model.train(training)
    with silence():
        for k in range(200):
            model(X, [k % 3]).sum().backward()
            surgery.state_dict(model)


@pytest.mark.parametrize("proved", [False, True])
def test_experts_whose_weights_are_read_are_gone_round(proved: bool) -> None:
    model = Experts()
    broken = model.experts[2]
    model.way = lambda layer, x: (fused if layer is broken else called)(layer, x)
    rules, x = at("experts.*.proj", lora(rank=2)), (X, [1, 2])
    with pytest.raises(GraftError, match=r"experts\.2\.proj.* never ran.*reads"):
        surgery.apply(model, rules, example=x if proved else None).eval()(*x)


@pytest.mark.parametrize("proved", [False, True])
def test_an_optional_rule_need_not_run(proved: bool) -> None:
    rules = [at("layers.*.proj", lora(rank=2)), at("aside", lora(rank=2), optional=True)]
    model: Any = Net()
    model.aside = nn.Linear(8, 8)
    surgery.apply(model, rules, example=X if proved else None)
    with silence():
        for _ in range(80):
            model(X).sum().backward()
        model.eval()(X)


def test_what_never_runs_is_not_told_to_be_called() -> None:
    model: Any = Net()
    model.aside = nn.Linear(8, 8)
    with pytest.raises(GraftError, match=r"(?s)does not come to them.*optional=True") as told:
        surgery.apply(model, at("aside", lora(rank=2)), example=X)
    assert "module that is called" not in str(told.value)

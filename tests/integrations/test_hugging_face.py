"""Transformers' Trainer: what its checkpoints hold, its loss, and going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery
from surgery import activate, at, ffn, head, lora, moa, parallel, qkv, shared, unfreeze
from surgery.integrations.hugging_face import OperatedTrainer, last_whole
from tests.models import hf_bert, hf_llama

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says of its older ways

RULES = [at(qkv, lora(rank=2)), at(ffn, parallel(shared(moa(heads=2, rank=4)))), at(head, unfreeze)]
WORDS = torch.randint(0, 8, (24, 6), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in WORDS]
SAME = [DATA[0]] * 8


class Trainer(OperatedTrainer, transformers.Trainer):
    """As users write it."""


class Whole(Trainer):
    base = True


def base(build: Any = hf_llama) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = build(2)
    return model


def operated(build: Any = hf_llama) -> nn.Module:
    return surgery.apply(base(build), RULES)


def trainer(model: nn.Module, folder: Path, kind: Any = Trainer, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": [],
        "per_device_train_batch_size": 2, "disable_tqdm": True,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **more})
    return kind(model, arguments, train_dataset=DATA, eval_dataset=DATA)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a model is; a Trainer seeds the random numbers."""
    return {k: v for k, v in surgery.fingerprint(model).items() if not k.startswith("random")}


def still(model: nn.Module) -> nn.Module:
    """In training, and nothing is dropped."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return [*one] == [*other] and all(torch.equal(one[key], other[key]) for key in one)


def gone_on(folder: Path, model: nn.Module, kind: Any = Trainer, **more: Any) -> nn.Module:
    """A model that goes on from the checkpoint at half of a run."""
    again = trainer(model, folder, kind, **more)
    again.train(str(folder / "checkpoint-2"))
    return again.model


@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("kind", [Trainer, Whole, transformers.Trainer])
def test_it_goes_on_to_the_bit(kind: Any, more: dict[str, Any], tmp_path: Path) -> None:
    """transformers' own, too: its checkpoints are whole, and read into a model that is operated."""
    model = operated()
    trainer(model, tmp_path, kind, **more).train()
    assert not same(model, operated())
    assert same(gone_on(tmp_path, operated(), kind, **more), model)


def test_a_model_that_is_not_operated_yet_is(tmp_path: Path) -> None:
    model = operated()
    trainer(model, tmp_path).train()
    assert same(gone_on(tmp_path, base()), model)


def test_what_checkpoints_hold(tmp_path: Path) -> None:
    model = operated()
    trainer(model, tmp_path / "alone").train()
    trainer(operated(), tmp_path / "whole", Whole).train()
    alone = tmp_path / "alone" / "checkpoint-4"
    kept = {*load_file(alone / "surgery.default.safetensors")}
    assert kept == {*surgery.state_dict(model)}
    assert not (alone / "model.safetensors").exists()
    assert same(surgery.load(base(), alone), model)
    whole = tmp_path / "whole" / "checkpoint-4"
    assert same(surgery.from_pretrained(whole), model)
    assert same(transformers.LlamaForCausalLM.from_pretrained(whole), base())


def test_the_best_is_brought_back(tmp_path: Path) -> None:
    """Here the first: the loss falls, and the greatest is asked for."""
    best = trainer(
        model := operated(), tmp_path, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    best.train()
    assert best.state.best_global_step == 2
    assert same(model, surgery.load(base(), tmp_path / "checkpoint-2"))
    assert not same(model, surgery.load(base(), tmp_path / "checkpoint-4"))


@pytest.mark.parametrize(("active", "rules"), [("b", RULES), ({"a": 0.3, "b": 0.7}, RULES[:2])])
def test_several_operations_and_which_of_them_act(
    active: Any, rules: list[surgery.Rule], tmp_path: Path
) -> None:
    def two() -> nn.Module:
        model = surgery.apply(base(), rules, name="a")
        activate(model, None)
        surgery.apply(model, rules, name="b", seed=1)
        return activate(surgery.train_only(model, "b"), active)

    model, untrained = two(), two()
    trainer(model, tmp_path).train()
    again = gone_on(tmp_path, two())
    assert same(again, model)
    for name in "ab":
        assert same(activate(again, name), activate(model, name))
    assert not same(model, activate(untrained, "b"))


@pytest.mark.parametrize("build", [hf_llama, hf_bert])
def test_the_penalty_is_a_mean_over_the_batches_of_a_step(build: Any, tmp_path: Path) -> None:
    """Of models that divide their loss by the items of all batches, and of those that do not."""

    class Heavy(Trainer):
        balance = 3.0

    rows = SAME if build is hf_llama else [{**DATA[0], "labels": torch.tensor(1)}] * 8
    run = trainer(
        still(operated(build)), tmp_path, Heavy, max_steps=1, optim="sgd", learning_rate=0.1,
        gradient_accumulation_steps=4, max_grad_norm=0, lr_scheduler_type="constant",
    )  # fmt: skip
    run.train_dataset = rows
    run.train()
    want = still(operated(build))
    batch = {key: torch.stack([row[key] for row in rows[:2]]) for key in rows[0]}
    loss: Tensor = want(**batch).loss + 3.0 * surgery.balance_loss(want)
    loss.backward()
    part = next(p for key, p in want.named_parameters() if key.endswith("embeddings"))
    (trained,) = (p for key, p in run.model.named_parameters() if key.endswith("embeddings"))
    assert part.grad is not None
    torch.testing.assert_close(trained, part - 0.1 * part.grad, atol=1e-7, rtol=1e-4)
    assert (0.1 * part.grad).abs().max() > 1e-4


def test_scores_are_of_the_loss_alone(tmp_path: Path) -> None:
    model = operated()
    run = trainer(model, tmp_path)
    with torch.no_grad():
        want = model.eval()(WORDS, labels=WORDS).loss.item()
    assert run.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)


def test_other_rules_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    trainer(operated(), tmp_path).train()
    other = surgery.apply(base(), at(qkv, lora(rank=3)))
    before = state_of(other)
    with pytest.raises(surgery.FileError):
        trainer(other, tmp_path).train(str(tmp_path / "checkpoint-2"))
    assert state_of(other) == before


def test_what_is_half_written_is_passed_over(tmp_path: Path) -> None:
    assert last_whole(tmp_path) is None
    trainer(model := operated(), tmp_path).train()
    assert last_whole(tmp_path) == str(tmp_path / "checkpoint-4")
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-9])
    assert last_whole(tmp_path) == str(tmp_path / "checkpoint-2")
    again = operated()
    trainer(again, tmp_path).train(resume_from_checkpoint=True)
    assert same(again, model)

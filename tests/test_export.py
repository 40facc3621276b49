"""Models as files for other engines: each rule set by torch.export and ONNX, and TorchScript."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import OperationError, at, merge, moa, parallel, shared
from surgery._export import export
from tests.laws import checks as laws
from tests.laws.checks import raised
from tests.methods.test_methods import MERGE, SETS, rules_of
from tests.models import images, tiny_vit
from tests.test_cli import output_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:No complete tensor found in the group"),  # of torch.export
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:onnx.*"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:onnx.*"),
]
# features far from each other (torch.cdist), and a Fourier transform: torch has no ONNX for them
REFUSED = {"idpt": "_cdist_forward", "c3a": "einsum"}


def operated(name: str) -> nn.Module:
    """One block, or as few as the rule set takes, and parts that have left the identity."""
    torch.manual_seed(0)
    model = tiny_vit(depth=4 if name == "llama_adapter" else 1).eval()
    surgery.apply(model, rules_of(name))
    laws.stir(model)
    return model.eval()


@pytest.mark.parametrize("name", SETS)
def test_every_rule_set_is_exported_or_refused_by_name(name: str, tmp_path: Path) -> None:
    model, path = operated(name), tmp_path / "model.onnx"
    if name not in REFUSED:
        assert export(model, images(), path, "onnx") < 1e-5
        return
    told = str(raised(OperationError, lambda: export(model, images(), path, "onnx")))
    assert REFUSED[name] in told
    assert not list(tmp_path.iterdir())
    assert export(model, images(), tmp_path / "model.pt2", "pt2") < 1e-6


@pytest.mark.parametrize("to", ["onnx", "pt2"])
@pytest.mark.parametrize("top_k", [1, None], ids=["top-1", "dense"])
def test_a_mixture_is_exported(to: str, top_k: int | None, tmp_path: Path) -> None:
    mixture = shared(moa(rank=4, heads=3, top_k=top_k))
    model = surgery.apply(tiny_vit(depth=2), at(surgery.ffn, parallel(mixture)))
    laws.stir(model)
    assert export(model, images(8), tmp_path / "x", to) < 1e-5
    assert [x.name for x in tmp_path.iterdir()] == ["x"]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_what_is_merged_is_exported_and_scripted(tmp_path: Path) -> None:
    model = operated("c3a")
    want = model(images())
    merge(model)
    assert "c3a" in MERGE
    assert export(model, images(), tmp_path / "x", "onnx") < 1e-5
    torch.testing.assert_close(torch.jit.script(model)(images()), want)


class Drawn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(())


class Counted(nn.Module):
    """Its answer depends on how often it was called."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize("model", [Drawn(), Counted()])
@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_another_answer_is_no_file(model: nn.Module, to: str, tmp_path: Path) -> None:
    told = raised(OperationError, lambda: export(model, torch.ones(2, 3), tmp_path / "x", to))
    assert "of the largest number off" in str(told)
    assert not list(tmp_path.iterdir())


def test_what_has_no_batch_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    for one, fact in ((torch.ones(1, 3), "--inputs"), (torch.ones(3), "batch = 3")):
        told = raised(OperationError, lambda x=one: export(model, x, tmp_path / "x", "pt2"))
        assert fact in str(told)
    assert not list(tmp_path.iterdir())


# the command line

OWN = """
import surgery, torch
from tests.models import images, tiny_vit
def build():
    torch.manual_seed(3)
    return tiny_vit(depth=2)
"""


@pytest.mark.parametrize("words", [[], ["--merge"], ["--to", "pt2"]], ids=" ".join)
def test_export_on_the_command_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    torch.manual_seed(3)
    model = surgery.apply(tiny_vit(depth=2), "lora")
    laws.stir(model)
    surgery.save(model, "x.safetensors")
    gives = ["--inputs", "own.py:images"]
    status, out, err = output_of(capsys, "export", "own.py:build", "x.safetensors", *gives, *words)
    assert (status, err) == (0, "")
    written = Path("x.pt2" if "pt2" in words else "x.onnx")
    assert out.startswith(f"{written}: its answers are within ")
    if written.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(written)
        (got,) = session.run(None, {session.get_inputs()[0].name: images(3).numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model.eval()(images(3)))


def test_random_weights_are_not_exported(tmp_path, capsys):
    status, _, err = output_of(capsys, "export", "timm:test_vit", str(tmp_path / "x.safetensors"))
    assert status == 2
    assert "--pretrained" in err

"""The command line: what it prints, what it refuses, and the demo in a short form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from surgery.cli import main
from surgery.demo import digits, glyphs

VIT = "timm:vit_tiny_patch16_224"


def output_of(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of `surgery words...`."""
    try:
        status = main(list(words))
    except SystemExit as stop:  # argparse's
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_plan_counts_on_the_meta_device(capsys):
    status, out, _ = output_of(capsys, "plan", "timm:vit_base_patch16_224", "adapterx_ffn")
    assert status == 0
    assert "148,992" in out
    assert "blocks.*.mlp x12" in out


def test_anatomy_names_every_role_and_its_width(capsys):
    status, out, _ = output_of(capsys, "anatomy", VIT)
    assert status == 0
    for word in ("embed", "block", "norm", "attn", "qkv", "ffn", "head", "blocks.*.mlp", "192"):
        assert word in out


def test_rulesets_are_listed_with_their_papers(capsys):
    status, out, _ = output_of(capsys, "rulesets")
    assert status == 0
    for word in ("adapterx_ffn", "adaptformer", "linear_probe", "Li et al. 2024"):
        assert word in out


def test_models_and_rules_of_ones_own_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "from torch import nn\nfrom surgery import at, unfreeze\n"
        "def build():\n    return nn.Sequential(nn.Linear(8, 2))\n"
        "RULES = at('0', unfreeze)\n"
    )
    status, out, _ = output_of(capsys, "plan", "own.py:build", "own.py:RULES")
    assert status == 0
    assert "18 trainable" in out


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["plan", "timm:vit_tiny_patch16_22", "full"], "Nearest: vit_tiny_patch16_224"),
        (["plan", VIT, "adapterx_ff"], "Nearest: adapterx_ffn"),
        (["plan", "nowhere.at_all:build", "full"], "importing nowhere.at_all failed"),
        (["plan", "torch.nn:Nothing", "full"], "Nothing"),
        (["plan", "torch:zeros", "full"], "torch:zeros"),
        (["plan", "nothing.py:build", "full"], "nothing.py"),
        (["anatomy", "vit_tiny"], "timm:NAME"),
        (["plan"], "required"),
        (["operate"], "invalid choice"),
        (["demo", "--seeds", "0"], "no number from 1 up"),
        (["demo", "--methods", "adapterx_ff"], "Nearest: adapterx_ffn"),
        (["demo", "--out", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_bad_input_is_one_screen_and_no_traceback(words, fact, capsys):
    status, out, err = output_of(capsys, *words)
    assert status == 2
    assert fact in err
    assert "Traceback" not in out + err
    assert len(err.splitlines()) < 12


def test_python_m_surgery_is_surgery():
    command = [sys.executable, "-m", "surgery", "rulesets"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "adapterx_ffn" in done.stdout


# the demo


@pytest.mark.slow
def test_the_demo_compares_saves_loads_draws_and_reverts(tmp_path, capsys):
    methods = ["linear_probe", "adapterx_ffn"]
    status, out, _ = output_of(
        capsys,
        "demo",
        "--seeds",
        "2",
        "--epochs",
        "1",
        "--out",
        str(tmp_path),
        "--methods",
        *methods,
    )
    assert status == 0
    assert "loaded  into a fresh model: outputs equal to the last bit: True" in out
    assert "reverted: every tensor of the backbone equal to the last bit: True" in out
    assert (tmp_path / "loads.png").stat().st_size > 5000
    assert (tmp_path / "adapterx_ffn.safetensors").stat().st_size < 200_000
    assert "20,224  3.00" in out


def test_no_digit_is_both_trained_on_and_judged_by():
    rows = [{img.numpy().tobytes() for img in part.x} for part in digits.digits(0)]
    train, validation, test = rows
    assert (len(train), len(validation), len(test)) == (200, 300, 897)
    assert not train & validation
    assert not (train | validation) & test


def test_seeds_change_what_is_trained_on_and_nothing_else():
    a, b = digits.digits(0), digits.digits(1)
    assert torch.equal(a.test.x, b.test.x)
    assert torch.equal(a.validation.x, b.validation.x)
    assert not torch.equal(a.train.x, b.train.x)


def test_the_backbone_has_seen_no_digit_and_ships_small():
    assert not set(glyphs.load_glyphs().characters) & set("0123456789")
    assert glyphs.PATH.stat().st_size <= 2 * 2**20
    assert glyphs.pretrained(10)(torch.zeros(2, 1, 16, 16)).shape == (2, 10)

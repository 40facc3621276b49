"""python tests/data/lycoris/make.py: a file of each kind by the real LyCORIS, and the answers.

By lycoris-lora 4.1.3, with torch's own kernels; it is needed for this alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.models import TinyUNet, images

HERE = Path(__file__).parent
CASES: dict[str, dict[str, Any]] = {
    "locon": {"algo": "lora"},
    "locon_tucker": {"algo": "lora", "use_tucker": True},
    "rs": {"algo": "lora", "rs_lora": True},
    "dora": {"algo": "lora", "dora_wd": True},
    "dora_columns": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "norms": {"algo": "lora", "train_norm": True},
    "loha": {"algo": "loha"},
    "loha_tucker": {"algo": "loha", "use_tucker": True},
    "loha_dora": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr", "factor": 2},
    "lokr_tucker": {"algo": "lokr", "factor": 2, "use_tucker": True, "rank": 1},
    "lokr_whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr_both": {"algo": "lokr", "factor": 4, "decompose_both": True, "rank": 1},
    "lokr_unbalanced": {"algo": "lokr", "factor": 4, "unbalanced_factorization": True},
    "lokr_dora": {"algo": "lokr", "factor": 2, "dora_wd": True},
    "full": {"algo": "full"},
    "ia3": {"algo": "ia3"},
    "ia3_in": {"algo": "ia3", "train_on_input": True},
    "glora": {"algo": "glora"},
    "oft": {"algo": "diag-oft"},
    "oft_rescaled": {"algo": "diag-oft", "rescaled": True, "constraint": 0.01},
    "boft": {"algo": "boft", "rescaled": True},
}


def fresh() -> TinyUNet:
    torch.manual_seed(0)
    return TinyUNet().eval()


def made(name: str, kind: dict[str, Any]) -> torch.Tensor:
    """Write the file; the answer."""
    from lycoris import LycorisNetwork, create_lycoris

    model, kind = fresh(), dict(kind)
    rank, left_out = kind.pop("rank", 2), [".*conv2"] if name == "glora" else []  # it is grouped
    modules, names = ["ResnetBlock2D", "Transformer2DModel"], ["conv_in", "conv_out"]
    LycorisNetwork.apply_preset(
        {"target_module": modules, "target_name": names, "exclude_name": left_out}
    )
    sizes = {"linear_dim": rank, "linear_alpha": 0.75, "conv_dim": rank, "conv_alpha": 3}
    network = create_lycoris(model, 1.0, **sizes, **kind).eval()
    network.apply_to()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        save_file({k: v.contiguous() for k, v in network.state_dict().items()},
                  HERE / f"{name}.safetensors")  # fmt: skip
        answer: torch.Tensor = model(images(size=8))
    return answer


if __name__ == "__main__":
    os.environ["LYCORIS_BACKEND"] = "torch"
    save_file(
        {name: made(name, kind) for name, kind in CASES.items()}, HERE / "answers.safetensors"
    )

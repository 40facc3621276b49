"""Models of kornia: matching of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, tuple[dict[str, Any]]]


def loftr() -> Built:
    """LoFTR: attention by a kernel, of one picture and of both in turn; networks that read a token
    and its message.

    ffn: {loftr_coarse,loftr_fine}.layers.*.mlp
    qkv: {loftr_coarse,loftr_fine}.layers.*.{q,k,v}_proj
    proj: {loftr_coarse,loftr_fine}.layers.*.merge
    head: any
    prompts: no; tokens of two maps are matched one by one
    """
    from kornia.feature import LoFTR

    coarse = {"d_model": 32, "d_ffn": 32, "nhead": 2, "attention": "linear", "temp_bug_fix": False}
    fine = {"d_model": 16, "d_ffn": 16, "nhead": 2, "attention": "linear"}
    config = {
        "backbone_type": "ResNetFPN",
        "resolution": (8, 2),
        "fine_window_size": 5,
        "fine_concat_coarse_feat": True,
        "resnetfpn": {"initial_dim": 16, "block_dims": [16, 24, 32]},
        "coarse": {**coarse, "layer_names": ["self", "cross"] * 2},
        "match_coarse": {
            "thr": 0.0, "border_rm": 0, "match_type": "dual_softmax", "dsmax_temperature": 0.1,
            "skh_iters": 3, "skh_init_bin_score": 1.0, "skh_prefilter": True,
            "train_coarse_percent": 0.4, "train_pad_num_gt_min": 200,
        },
        "fine": {**fine, "layer_names": ["self", "cross"]},
    }  # fmt: skip
    pair = {"image0": torch.rand(1, 1, 32, 32), "image1": torch.rand(1, 1, 32, 32)}
    return LoFTR(None, config), (pair,)

"""Parts that read tokens as a map are told the map that the model makes, or refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.utils.checkpoint as checkpoint
import transformers as hf
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import surgery
from backbones.point_mae import PointMAE
from surgery import at, attn, ffn, inside, parallel
from surgery.parts import adapter, convpass, domains, scaled
from surgery.parts.conv import Convpass
from surgery.rules.layout import Layout
from tests import models

SIZES = models.hf_sizes(2)


def vit(**changes: Any) -> Any:
    torch.manual_seed(0)
    chosen = {"img_size": (24, 32), "reg_tokens": 4, "dynamic_img_size": True, **changes}
    return models.tiny_vit(**chosen).eval()


def stirred(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in surgery.parameters(model):
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def operated(**changes: Any) -> Any:
    return stirred(surgery.apply(vit(**changes), "convpass"))


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def told(model: nn.Module, x: Tensor) -> list[Any]:
    """How the tokens of each part lie, as it is told in a forward."""
    seen: list[Any] = []
    parts = [m for m in model.modules() if isinstance(m, Convpass)]
    hooks = [p.register_forward_pre_hook(lambda _, args: seen.append(args[1])) for p in parts]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("size", [(24, 32), (32, 24), (8, 64), (24, 24)])
def test_parts_are_told_the_map_of_each_forward(size: tuple[int, int]) -> None:
    grid = size[0] // 8, size[1] // 8
    assert set(told(operated(), images(*size))) == {Layout(grid)}


@pytest.mark.parametrize(
    "make",
    [
        lambda site: nn.Sequential(convpass()(site), nn.Identity()),
        scaled(convpass()),
        domains(convpass(), count=2),
    ],
    ids=["in a module", "scaled", "domains"],
)
def test_parts_inside_others_are_told_too(make: Any) -> None:
    model = surgery.apply(vit(), at(attn, parallel(make)))
    assert {each for each in told(model, images(24, 32)) if each} == {Layout((3, 4))}


def test_what_is_said_otherwise_is_refused() -> None:
    model = surgery.apply(vit(), at(attn, parallel(convpass(prefix=1))))  # 17 is 1 + 4 x 4
    with pytest.raises(surgery.GraftError, match=r"of which the model made 3 x 4.*\nGive prefix=5"):
        model(images(24, 32))
    right = surgery.apply(vit(), at(attn, parallel(convpass(prefix=5))))
    assert set(told(right, images(24, 32))) == {Layout((3, 4))}


def test_dropped_patches_are_told() -> None:
    model = operated(img_size=112, reg_tokens=0, patch_drop_rate=0.75)
    x = images(112, 112)
    model(x)
    with pytest.raises(surgery.GraftError, match=r"50 tokens, where the model made 14 x 14 patc"):
        model.train()(x)  # 1 + 7 x 7
    with surgery.disabled(model), torch.no_grad():
        model(x)
    surgery.revert(model)(x)
    sizes = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
    config = hf.ViTMAEConfig(**SIZES, **sizes, image_size=56, patch_size=8)
    mae = surgery.apply(hf.ViTMAEModel(config).eval(), "convpass")
    with pytest.raises(surgery.GraftError, match="some were dropped"):
        mae(images(56, 56))


@pytest.mark.parametrize("window", [(4, 4), (2, 8), (8, 2)])
def test_windows_are_as_their_table_says(window: tuple[int, int]) -> None:
    sizes = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 3}
    model = SwinTransformer(img_size=64, patch_size=4, window_size=window, **sizes).eval()
    surgery.apply(model, at(attn, parallel(convpass())))
    assert {each.grid for each in told(model, images(64, 64))} == {window}


def test_a_mask_is_no_table_of_a_window() -> None:
    """GPT-NeoX keeps a triangle of booleans in its attention."""
    model = vit()
    for block in model.blocks:
        block.register_buffer("mask", torch.ones(16, 16, dtype=torch.bool).tril())
    surgery.apply(model, "convpass")
    model(images(24, 32))


def test_pyramids_are_followed() -> None:
    config = hf.SwinConfig(
        image_size=(32, 64), patch_size=4, embed_dim=24, depths=[1, 1], num_heads=[2, 2],
        window_size=4,
    )  # fmt: skip
    model = surgery.apply(hf.SwinModel(config).eval(), at(ffn, parallel(convpass())))
    assert [each.grid for each in told(model, images(32, 64))] == [(8, 16), (4, 8)]


def test_sequences_that_come_first_are_turned() -> None:
    """Samples would be mixed otherwise: of 9 samples, as a 3 x 3 map."""
    model: Any = stirred(surgery.apply(models.encoder(batch_first=False).eval(), "convpass"))
    x = torch.randn(9, 9, 24)
    whole, alone = model(x), model(x[:, :1])
    assert torch.allclose(whole[:, :1], alone, atol=1e-5)


def test_a_guess_has_a_note_and_a_proof_has_none() -> None:
    guessed = str(surgery.report(surgery.apply(models.encoder(), "convpass")))
    assert "note: no 2-D convolution tells how tokens lie" in guessed
    assert "no 2-D convolution tells" in str(surgery.plan(models.encoder(), "convpass"))
    x = images(24, 32)
    assert "patches are taken to be the last" in str(surgery.report(operated()))
    proved = surgery.report(surgery.apply(vit(), "convpass", example=x))
    assert "note: patches" not in str(proved)


# carried along ---------------------------------------------------------------------------------


def test_copies_and_pickles_have_maps_of_their_own(tmp_path: Path) -> None:
    model, x = operated(), images(24, 32)
    with torch.no_grad():
        want = model(x)
        torch.save(model, tmp_path / "whole.pt")
        for other in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
            assert torch.equal(other(x), want)
            assert set(told(other, images(32, 24))) == {Layout((4, 3))}
    surgery.revert(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_it_compiles_and_exports_whole() -> None:
    model, x = operated(dynamic_img_size=False), images(24, 32)
    want = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), want, atol=1e-5)
    assert torch.allclose(compiled(x[:1]), want[:1], atol=1e-5)
    exported: Any = torch.export.export(model, (x,), strict=False).module()
    assert torch.allclose(exported(x), want, atol=1e-5)
    torch._dynamo.reset()


def test_compiled_blocks_are_told() -> None:
    model, x = operated(), images(24, 32)
    want = model(x)
    for block in model.blocks:
        block.compile(backend="eager")
    assert torch.allclose(model(x), want, atol=1e-5)
    assert torch.allclose(model(x.mT), stirred(surgery.apply(vit(), "convpass"))(x.mT), atol=1e-5)
    torch._dynamo.reset()


def forward(model: Any, x: Tensor, **checkpointed: Any) -> Tensor:
    x = model.norm_pre(model._pos_embed(model.patch_embed(x))).requires_grad_()
    for block in model.blocks:
        x = checkpoint.checkpoint(block, x, **checkpointed) if checkpointed else block(x)
    return x.square().mean()


def gradients(model: Any, *inputs: Tensor, **checkpointed: Any) -> Iterator[Tensor]:
    model.zero_grad()
    torch.autograd.backward(sum(forward(model, x, **checkpointed) for x in inputs))
    return (p.grad.clone() for p in surgery.parameters(model) if p.grad is not None)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_told_again(reentrant: bool) -> None:
    model, x = operated(), images(24, 32)
    for inputs in ([x], [x.mT], [x, images(40, 32)], [x]):
        pairs = zip(
            gradients(model, *inputs),
            gradients(model, *inputs, use_reentrant=reentrant),
            strict=True,
        )
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in pairs)
        with torch.no_grad():
            model(x.mT)  # another map in between, of as many tokens
    with pytest.raises(surgery.GraftError, match="patches of 3 x 4 and 4 x 3 were made before"):
        gradients(model, x, x.mT, use_reentrant=reentrant)


def test_threads_are_told_their_own() -> None:
    model, wrong = operated(), list[int]()
    inputs = [images(24, 32), images(32, 24), images(16, 48)]
    with torch.no_grad():
        want = [model(x) for x in inputs]

    def serve(k: int) -> None:
        with torch.no_grad():
            for i in range(30):
                j = (i + k) % 3
                if not torch.allclose(model(inputs[j]), want[j], atol=1e-5):
                    wrong.append(j)

    threads = [threading.Thread(target=serve, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convpass", "convpass_att"])
def test_groups_of_points_are_no_map(name: str) -> None:
    sizes = {"num_groups": 9, "group_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = PointMAE(5, **sizes)
    with pytest.raises(
        surgery.RuleError, match=r"pieces of a sequence or a cloud \(encoder\.first"
    ):
        surgery.apply(model, name)
    surgery.apply(model, "idpt", example=torch.randn(2, 64, 3))  # it reads no map


def test_words_of_one_tower_leave_the_other_alone() -> None:
    text = {**SIZES, "vocab_size": 32, "eos_token_id": 2}
    vision = {**SIZES, "image_size": 24, "patch_size": 8}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision)).eval()
    with pytest.raises(surgery.RuleError, match=r"text_model\.encoder.* are words"):
        surgery.apply(model, "convpass")
    surgery.apply(model, at(attn & inside("vision_model"), parallel(convpass())))


@pytest.mark.parametrize("where", ["attn", "ffn"])
@pytest.mark.parametrize("form", ["padding", "causal", "an empty mask"])
def test_masks_are_refused_where_they_hide(where: str, form: str) -> None:
    rules = at({"attn": attn, "ffn": ffn}[where], parallel(convpass()))
    model, x = surgery.apply(models.encoder().eval(), rules), torch.randn(2, 9, 24)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    if form == "an empty mask":
        model(x, src_key_padding_mask=padding)
        return
    padding[:, -1] = True
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    given: Any = {"padding": {"src_key_padding_mask": padding}, "causal": {"mask": causal}}[form]
    with pytest.raises(surgery.GraftError, match=r"src_(key_padding_)?mask hides some from others"):
        model(x, **given)
    with surgery.disabled(model), torch.no_grad():
        model(x, **given)


def test_parts_that_take_each_token_alone_are_not_refused() -> None:
    surgery.apply(models.hf_gpt2(), at(ffn, parallel(adapter(rank=2))), example=models.words_in())


def test_a_part_of_ones_own_in_place_of_attention_may_mix() -> None:
    class Mixing(nn.Module):
        mixes_tokens = True

        def forward(self, x: Tensor, *args: Any, **named: Any) -> Any:
            return x.cumsum(1), None

    surgery.apply(models.hf_gpt2(), at(attn, surgery.replace(lambda site: Mixing())))
    with pytest.raises(surgery.RuleError, match=r"Mixing at .* those are words"):
        surgery.apply(models.hf_gpt2(), at(ffn, parallel(lambda site: Mixing())))


# shown by the example --------------------------------------------------------------------------


def test_patches_that_are_not_last_are_seen_with_an_example() -> None:
    sizes = {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 4}
    model = hf.YolosModel(hf.YolosConfig(**SIZES, **sizes)).eval()
    told = r"of 21 tokens the last 4 x 4 are not the patches, row by row: patch \(\d, \d\) is token"
    with pytest.raises(surgery.GraftError, match=told):
        surgery.apply(model, "convpass", example=images(32, 32))


class Columns(nn.Module):
    """A model that walks its map column by column."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 8, 8)
        self.blocks = models.encoder().layers
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).mT.flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def test_another_order_is_seen_with_an_example() -> None:
    with pytest.raises(surgery.GraftError, match="are not the patches, row by row"):
        surgery.apply(Columns().eval(), "convpass", example=images(24, 24))


def test_blocks_that_start_as_nothing_are_not_taken_for_masked() -> None:
    model = vit(init_values=0.0)
    surgery.apply(model, "convpass", example=images(24, 32))


# models of other forms: what is right, or works, is not refused ----------------------------------


@pytest.mark.parametrize(
    ("name", "size", "grids", "changes"),
    [
        ("twins_svt_small", 64, {(16, 16), (8, 8), (4, 4), (2, 2)}, {"depths": [1, 1, 1, 1]}),
        ("crossvit_9_240", 240, {(20, 20), (14, 14)}, {"depth": [[1, 1, 0]]}),
        ("tnt_s_patch16_224", 64, {(4, 4), None}, {"depth": 1, "img_size": 64}),
        ("samvit_base_patch16", 64, {(4, 4)}, {"depth": 1, "img_size": 64, "embed_dim": 48}),
        ("eva02_tiny_patch14_224", 56, {(4, 4)}, {"depth": 1, "img_size": 56}),
        ("vit_small_patch16_dinov3", 64, {(4, 4)}, {"depth": 1, "img_size": 64}),
    ],
)
def test_models_of_other_forms(name: str, size: int, grids: Any, changes: Any) -> None:
    small = {"num_heads": 2} if "embed_dim" in changes else {}
    model = timm.create_model(name, num_classes=3, **changes, **small).eval()
    x = torch.randn(2, 3, size, size)
    surgery.apply(model, at(attn, parallel(convpass())), example=x)
    seen: list[Any] = []
    for part in (m for m in model.modules() if isinstance(m, Convpass)):
        part.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(x)
    assert {args[1].grid for args in seen if len(args) > 1} <= grids


def test_positions_made_by_a_convolution_are_no_patches() -> None:
    model = timm.create_model("xcit_nano_12_p16_224", img_size=64, depth=1).eval()
    surgery.apply(model, at("blocks.*.attn", parallel(convpass())))
    assert told(model, images(64, 64)) == [Layout((4, 4))]


def test_frames_and_rows_are_no_maps() -> None:
    config = hf.TimesformerConfig(**SIZES, image_size=32, patch_size=8, num_frames=4)
    frames: Any = surgery.apply(hf.TimesformerModel(config).eval(), "convpass")
    with pytest.raises(surgery.GraftError, match="how they lie in it is not known"):
        frames(torch.randn(2, 4, 3, 32, 32))
    nest = timm.create_model("nest_tiny_jx", img_size=128).eval()
    surgery.apply(nest, at("levels.[1].**.attn", parallel(convpass())))
    with pytest.raises(surgery.GraftError, match="maps of the patches would be"):
        nest(images(128, 128))

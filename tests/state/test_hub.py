"""The Hugging Face Hub: its addresses, its cache, what is put there, and the card."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from torch import nn

import surgery
from surgery import at, head, lora, parallel, qkv, unfreeze
from surgery.errors import FileError
from surgery.state.hub import Address, address, file_name
from tests.models import hf_bert, images, tiny_vit, words_in

LORA = [at(qkv, lora(rank=2)), at(head, unfreeze)]
X = images()


def tuned(build: Callable[[], nn.Module], name: str = "default", rules: Any = LORA) -> nn.Module:
    torch.manual_seed(0)
    model = surgery.apply(build().eval(), rules, name=name)
    for p in surgery.parameters(model):
        nn.init.normal_(p)
    return model


def vit() -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit().eval()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a folder into a cache of the Hub that there is no way out of: (folder, repository)."""
    root = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(folder: Path, repository: str, revision: str = "main", commit: str = "a" * 40) -> None:
        home = root / f"models--{repository.replace('/', '--')}"
        (home / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / revision).write_text(commit)
        for i, file in enumerate(folder.iterdir()):
            blob, link = home / "blobs" / f"{commit}{i}", home / "snapshots" / commit / file.name
            for each in (blob, link):
                each.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            link.symlink_to(blob)

    return put


# addresses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf:user/name", ("user/name", "", "")),
        ("hf://user/na.me_-1", ("user/na.me_-1", "", "")),
        ("hf:user/name@v1.0", ("user/name", "v1.0", "")),
        ("hf:user/name@refs/pr/1", ("user/name", "refs/pr/1", "")),
        ("hf:user/name/a.safetensors", ("user/name", "", "a.safetensors")),
        ("hf:user/name@v1/b/a.safetensors", ("user/name", "v1", "b/a.safetensors")),
        ("hf:user/name@refs/pr/1/a.safetensors", ("user/name", "refs/pr/1", "a.safetensors")),
        (Path("hf:user/name@v1/a.safetensors"), ("user/name", "v1", "a.safetensors")),
        (Path("hf://user/name"), ("user/name", "", "")),
    ],
)
def test_an_address_is_repository_revision_and_file(text: Any, parts: tuple[str, ...]) -> None:
    assert address(text, "") == Address(*parts)


@pytest.mark.parametrize(
    "text", ["hf:", "hf:name", "hf:/", "hf:user/name@", "hf:us er/name", "hf:ü/n", "hf:u/n@a@b"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    for call in (surgery.from_pretrained, surgery.inspect):
        with pytest.raises(FileError, match="no address on the Hub"):
            call(text)
    with pytest.raises(FileError, match="no address on the Hub"):
        surgery.save_pretrained(tuned(tiny_vit), text)


def test_a_path_is_none() -> None:
    assert address("a/hf:user", "") is None
    assert address(Path("folder"), "") is None


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/b", "a\\b", "..", "ü", "a\0b", "a b"])
def test_no_name_of_an_operation_leads_out_of_a_folder(name: str) -> None:
    assert Path("/x", file_name(name)).resolve().parent == Path("/x")
    assert "\\" not in file_name(name)


# a repository -----------------------------------------------------------------------------------


def test_what_a_repository_has_is_what_a_folder_has(tmp_path: Path, cache: Any) -> None:
    model = tuned(vit)
    folder = surgery.save_pretrained(model, tmp_path / "folder")
    cache(folder, "user/name")
    for path in (folder, "hf:user/name", "hf:user/name@main", f"hf:user/name@{'a' * 40}"):
        assert torch.equal(surgery.load(vit(), path)(X), model(X))
        assert str(surgery.inspect(path)).partition("\n")[2]
        again = surgery.apply(vit(), LORA, name="mine")
        assert torch.equal(surgery.swap(again, "mine", path)(X), model(X))
    path = "hf:user/name/surgery.default.safetensors"
    assert torch.equal(surgery.load(vit(), path)(X), model(X))
    with pytest.raises(FileError, match="no config"):
        surgery.from_pretrained("hf:user/name")


def test_a_revision_is_another_snapshot(tmp_path: Path, cache: Any) -> None:
    old, new = tuned(vit), tuned(vit, rules=[at(qkv, lora(rank=3))])
    cache(surgery.save_pretrained(old, tmp_path / "old"), "user/name", "v1", "b" * 40)
    cache(surgery.save_pretrained(new, tmp_path / "new"), "user/name")
    assert torch.equal(surgery.load(vit(), "hf:user/name@v1")(X), old(X))
    assert torch.equal(surgery.load(vit(), "hf:user/name")(X), new(X))


def test_a_folder_of_pefts_comes_from_a_repository(tmp_path: Path, cache: Any) -> None:
    model = tuned(vit)
    surgery.save_peft(model, tmp_path / "peft")
    (tmp_path / "peft" / "adapter_model.bin").write_bytes(b"a pickle")
    cache(tmp_path / "peft", "user/peft")
    assert torch.equal(surgery.load_peft(vit(), "hf:user/peft")(X), model(X))
    with pytest.raises(FileError, match="does not give user/none"):
        surgery.load_peft(vit(), "hf:user/none")
    with pytest.raises(FileError, match="this is a file of a repository"):
        surgery.load_peft(vit(), "hf:user/peft/adapter_model.safetensors")


def test_the_command_line_shows_what_a_repository_has(
    tmp_path: Path, cache: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from surgery.cli import main

    cache(surgery.save_pretrained(tuned(vit), tmp_path / "a"), "user/name")
    assert not main(["show", "hf:user/name"])
    assert "lora(rank=2)" in capsys.readouterr().out


def test_of_several_operations_one_is_named(tmp_path: Path, cache: Any) -> None:
    model = tuned(vit, "a/b")
    surgery.activate(model, None)
    surgery.apply(model, "bitfit", name="c")
    folder = surgery.save_pretrained(model, tmp_path / "folder")
    cache(folder, "user/name")
    for path in (folder, "hf:user/name"):
        with pytest.raises(FileError, match="it holds a/b, c, and none that is called 'default'"):
            surgery.load(vit(), path)
        surgery.activate(model, "a/b")
        assert torch.equal(surgery.load(vit(), path, name="a/b")(X), model(X))


@pytest.mark.filterwarnings("ignore")  # of transformers' progress
def test_base_and_operations_come_from_a_repository(tmp_path: Path, cache: Any) -> None:
    model, x = tuned(hf_bert), words_in()
    cache(surgery.save_pretrained(model, tmp_path / "folder"), "user/name")
    again = surgery.from_pretrained("hf:user/name").eval()
    assert torch.equal(again(x).logits, model(x).logits)
    cache(surgery.save_pretrained(model, tmp_path / "alone", base=False), "user/alone")
    again = surgery.load(surgery.revert(again), "hf:user/alone", verify=True)
    assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("hf:user/none", "does not give user/none "),
        ("hf:user/name@v9", "does not give user/name at v9"),
        ("hf:user/name/none.safetensors", "does not give user/name "),
        ("hf:user/name/pytorch_model.bin", "no safetensors file"),
        ("hf:user/name/../../x.safetensors", "no safetensors file"),
    ],
)
def test_what_is_not_there_is_told(path: str, told: str, tmp_path: Path, cache: Any) -> None:
    cache(surgery.save_pretrained(tuned(vit), tmp_path / "folder"), "user/name")
    with pytest.raises(FileError, match=told) as error:
        surgery.load(vit(), path)
    assert len(str(error.value)) < 600


# pushing ----------------------------------------------------------------------------------------


class Recorder:
    """In place of HfApi: what it was asked, and the folder as it was then."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]]

    def __init__(self, copy: Path, fails: str = "") -> None:
        self.calls, self.copy, self.fails = [], copy, fails

    def __call__(self, **given: Any) -> Recorder:
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*given: Any, **named: Any) -> None:
            self.calls.append((name, given, named))
            if name == self.fails:
                raise ConnectionError("no way\nout")
            if name == "upload_folder":
                shutil.copytree(named["folder_path"], self.copy)

        return call


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(tmp_path / "uploaded")
    monkeypatch.setattr(huggingface_hub, "HfApi", recorder)

    def none(*given: Any, **named: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("there is none")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", none)
    return recorder


def test_a_repository_is_made_and_a_folder_uploaded(hub: Recorder) -> None:
    model = tuned(vit)
    assert surgery.save_pretrained(model, "hf:user/name", private=True) == Path("hf:user/name")
    made, uploaded = hub.calls
    assert made == ("create_repo", ("user/name",), {"private": True, "exist_ok": True})
    assert uploaded[2].pop("folder_path")
    said = {"repo_id": "user/name", "revision": None}
    assert uploaded[2] == {**said, "commit_message": "Save by surgery.save_pretrained"}
    names = {file.name for file in hub.copy.iterdir()}
    assert names == {"README.md", "surgery.json", "surgery.default.safetensors"}
    assert 'surgery.load(model, "hf:user/name")' in (hub.copy / "README.md").read_text()
    assert torch.equal(surgery.load(vit(), hub.copy)(X), model(X))


def test_a_branch_is_made(hub: Recorder) -> None:
    surgery.save_pretrained(tuned(vit), "hf:user/name@v2")
    branch = ("create_branch", ("user/name",), {"branch": "v2", "exist_ok": True})
    assert hub.calls[1] == branch
    assert hub.calls[2][2]["revision"] == "v2"


def test_arguments_are_those_of_the_real_api() -> None:
    import inspect

    for name, given in (
        ("create_repo", {"repo_id", "private", "exist_ok"}),
        ("create_branch", {"repo_id", "branch", "exist_ok"}),
        ("upload_folder", {"repo_id", "folder_path", "revision", "commit_message"}),
    ):
        known = inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters
        assert given <= {*known}, name


@pytest.mark.parametrize("fails", ["create_repo", "create_branch", "upload_folder"])
def test_what_the_hub_refuses_is_told(fails: str, hub: Recorder) -> None:
    hub.fails = fails
    with pytest.raises(FileError, match=r"user/name at v2 \(ConnectionError: no way out\)"):
        surgery.save_pretrained(tuned(vit), "hf:user/name@v2")
    assert not hub.copy.exists()


def test_a_file_is_no_place_to_save_a_folder() -> None:
    with pytest.raises(FileError, match="a file of a repository"):
        surgery.save_pretrained(tuned(vit), "hf:user/name/a.safetensors")


def test_the_card_of_a_repository_keeps_what_people_wrote(
    hub: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\ntags: [birds]\n---\n# Birds\n\nBy hand.\n")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *given, **named: str(card))
    surgery.save_pretrained(tuned(vit), "hf:user/name")
    made = ModelCard.load(hub.copy / "README.md")
    assert made.data.license == "mit"
    assert made.data.tags[:2] == ["birds", "surgery"]
    assert "# Birds\n\nBy hand." in made.text


def test_where_the_card_cannot_be_asked_for_nothing_is_put_over_it(
    hub: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **named: Any) -> str:
        raise ConnectionError("no way")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(FileError, match="no way"):
        surgery.save_pretrained(tuned(vit), "hf:user/name")
    assert hub.calls == []


# the card ---------------------------------------------------------------------------------------


def test_the_card_tells_rules_formulae_counts_and_hashes(tmp_path: Path) -> None:
    model = tuned(vit, rules="adapterx_ffn")
    folder = surgery.save_pretrained(model, tmp_path / "birds")
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "surgery"
    assert {"surgery", "adapterx_ffn"} <= {*card.data.tags}
    assert "base_model" not in card.data.to_dict()
    assert str(surgery.report(model)) in card.text
    for rule in surgery.methods.adapterx_ffn():
        assert f"    {rule!r},\n" in card.text
    assert "Li et al. 2024" in card.text
    assert "MixtureOfAdapters: Experts" in card.text
    about = surgery.state.reading.read_header(folder / "surgery.default.safetensors")[0]
    assert about["hash"] in card.text
    assert about["base"] in card.text
    assert str(tmp_path) not in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert 'surgery.load(model, "birds")' in code
    assert len(code.strip().splitlines()) <= 4


def test_the_card_says_where_the_base_came_from(tmp_path: Path) -> None:
    model: Any = tuned(hf_bert)
    for name, known in (
        ("google-bert/bert", True), ("bert", True), (str(tmp_path), False), ("./x", False),
        ("", False), ("a b", False),
    ):  # fmt: skip
        model.config._name_or_path = name
        folder = surgery.save_pretrained(model, tmp_path / f"of {len(name)}", base=False)
        data = ModelCard.load(folder / "README.md").data.to_dict()
        assert data.get("base_model") == (name if known else None)
        assert data.get("base_model_relation") == ("adapter" if known else None)


def test_a_card_that_is_there_is_written_anew_where_it_is_ours(tmp_path: Path) -> None:
    path = surgery.save_pretrained(tuned(vit), tmp_path / "a") / "README.md"
    first = path.read_text()
    surgery.save_pretrained(tuned(vit), tmp_path / "a")
    assert path.read_text() == first
    path.write_text(first.replace("library_name", "license: mit\nlibrary_name") + "\nBy hand.\n")
    rules = [at(qkv, parallel(lora(rank=3)))]
    surgery.save_pretrained(tuned(vit, rules=rules), tmp_path / "a")
    text = path.read_text()
    assert "license: mit" in text
    assert text.endswith("\nBy hand.\n")
    assert "rank=3" in text
    assert "rank=2" not in text


def test_without_the_package_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (
        lambda: surgery.save_pretrained(tuned(vit), tmp_path / "a"),
        lambda: surgery.load(vit(), "hf:user/name"),
        lambda: surgery.from_pretrained("hf:user/name"),
    ):
        with pytest.raises(FileError, match="huggingface_hub is not installed"):
            call()
    assert not (tmp_path / "a").exists()


def test_importing_surgery_does_not_import_it() -> None:
    from tests.test_imports import fresh

    assert fresh("import sys, surgery; print('huggingface_hub' in sys.modules)") == "False"


# other folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "null", '{"operations": 1}', '{"operations": [1]}', "[" * 100_000,
        '{"operations": [["a", "b"]]}', '{"operations": [["a", NaN]]}', '{"operations": [["a"]]}',
        '{"operations": [["a", 1e400]]}', '{"operations": [["\\u001b[2J", 1]]}', "\0",
        '{"operations": [["../a", 1]]}', json.dumps({"operations": [["a" * 300, 1]]}),
        " " * 2**21 + '{"operations": []}',
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_lists_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "surgery.json").write_text(text)
    for call in (
        lambda: surgery.load(vit(), tmp_path),
        lambda: surgery.from_pretrained(tmp_path),
        lambda: surgery.inspect(tmp_path),
    ):
        with pytest.raises(FileError) as error:
            call()
        assert str(error.value).replace("\n", "").isprintable()
        assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "kind", ["pipeline", "Trainer", "AutoModel", "logging", "x.y", 5, None, "BertConfig", "__doc__"]
)
def test_a_config_names_a_model_or_nothing(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "surgery.json").write_text('{"operations": []}')
    text = json.dumps({"architectures": [kind], "auto_map": {"AutoModel": "evil--code.Model"}})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FileError, match="names no class of transformers"):
        surgery.from_pretrained(tmp_path)


def test_a_pickled_base_is_never_read(tmp_path: Path) -> None:
    folder = surgery.save_pretrained(tuned(hf_bert), tmp_path / "a")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(FileError, match="BertForSequenceClassification is not built of it"):
        surgery.from_pretrained(folder)

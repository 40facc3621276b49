"""Where a file of ours is: in a folder here, or on the Hugging Face Hub, "hf:user/name".

A folder, or a repository, has a file for each operation, and `surgery.json`, which lists them.
Nothing but JSON and safetensors is ever fetched. `huggingface_hub` is imported where it is needed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from .._text import first_few
from ..errors import FileError, is_number

LIST = "surgery.json"
CARD = "README.md"
LARGEST = 2**20  # bytes of it
WANTED = ["*.json", "*.safetensors"]
# the hub's own form, hf://user/name@revision/path/in/it; a revision with a slash is one of these
HUB = re.compile(
    r"hf:/*(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(?P<file>.+))?",
    re.ASCII,
)


class Address(NamedTuple):
    """A repository of the Hub, its revision ("": the newest), and a file in it ("": all)."""

    repository: str
    revision: str
    file: str


def address(path: str | os.PathLike[str], call: str) -> Address | None:
    """The address that a path is; None where it is a path here. Raises FileError."""
    text = os.fspath(path)
    if not text.startswith("hf:"):
        return None
    found = HUB.fullmatch(text.replace(os.sep, "/"))
    if found is None:
        fact = "this is no address on the Hub."
        raise FileError(call, fact, 'Write "hf:user/name", "hf:user/name@revision/file".')
    return Address(*(found[name] or "" for name in ("repository", "revision", "file")))


def file_name(operation: str) -> str:
    """Under which name a folder has an operation; no name leads out of the folder.

    >>> file_name("../birds")
    'surgery...%2Fbirds.safetensors'
    """
    return f"surgery.{quote(operation, safe='')}.safetensors"


def file_of(path: str | os.PathLike[str], name: str, call: str) -> Path:
    """The file that a path means: itself, or that of an operation in a folder; fetched first.

    name  of the operation, where there are several; of one it does not matter

    Raises FileError.
    """
    where = address(path, call)
    if where and where.file:
        return _fetched(where, where.file, call)
    if where is None and not os.path.isfile(Path(path) / LIST):
        return Path(path)
    names = [*listed(_fetched(where, LIST, call) if where else Path(path) / LIST, call)]
    if len(names) != 1 and name not in names:
        fact = f"it holds {first_few(names) or 'no operation'}"
        fact += f", and none that is called {name!r}." if name else "."
        raise FileError(call, fact, f'Give name=, or the path of a file: "{file_name("NAME")}".')
    own = file_name(name if name in names else names[0])
    return _fetched(where, own, call) if where else Path(path) / own


def listed(path: Path, call: str) -> dict[str, float]:
    """The operations that a `surgery.json` lists, and how much each acts. Raises FileError."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST)
        pairs = json.loads(data)["operations"]
        found = {str(name): strength for name, strength in pairs}
        whole = all(is_number(s) and abs(s) < 1e6 for s in found.values())
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        fact = f"its {LIST} cannot be read ({error!s:.200})."
        raise FileError(call, fact, "Save the folder again.") from error
    if not whole or not all(name.isprintable() and len(name) < 200 for name in found):
        raise FileError(call, f"its {LIST} lists no operations.", "Save the folder again.")
    return found


def folder_of(path: str | os.PathLike[str], call: str) -> Path:
    """The folder that a path means; all JSON and safetensors of a repository are fetched first."""
    where = address(path, call)
    if where is None:
        return Path(path)
    if where.file:
        raise FileError(call, "this is a file of a repository.", "Give the repository alone.")
    hub, revision = library(call), where.revision or None
    try:
        return Path(
            hub.snapshot_download(
                where.repository, revision=revision, allow_patterns=WANTED, ignore_patterns=["*/*"]
            )
        )
    except Exception as error:  # of several HTTP clients
        raise _unreachable(where, call, error) from error


def _fetched(where: Address, file: str, call: str) -> Path:
    """One file of a repository, from the cache where it is there. Raises FileError."""
    if not file.endswith((".json", ".safetensors")) or ".." in file.split("/"):
        raise FileError(call, f"{file!r:.200} is no safetensors file.", "Nothing else is read.")
    hub, revision = library(call), where.revision or None
    try:
        return Path(hub.hf_hub_download(where.repository, file, revision=revision))
    except Exception as error:  # of several HTTP clients
        raise _unreachable(where, call, error) from error


def _unreachable(where: Address, call: str, error: Exception) -> FileError:
    told = " ".join(f"{type(error).__name__}: {error}".split())
    revision = f" at {where.revision}" if where.revision else ""
    fact = f"the Hub does not give {where.repository}{revision} ({told:.300})."
    return FileError(call, fact, "Look at the name and the revision, and log in: hf auth login.")


def library(call: str) -> Any:
    """`huggingface_hub`. Raises FileError where it is not installed."""
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        fact = "huggingface_hub is not installed."
        raise FileError(call, fact, "pip install huggingface_hub") from error


def pull_card(where: Address, folder: Path, call: str) -> None:
    """Put the card that a repository has, if any, into a folder: people write into them."""
    hub, errors = library(call), importlib.import_module("huggingface_hub.errors")
    none = errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError
    try:
        path = hub.hf_hub_download(where.repository, CARD, revision=where.revision or None)
        shutil.copyfile(path, folder / CARD)
    except none:
        return
    except Exception as error:  # of several HTTP clients
        raise _unreachable(where, call, error) from error


def push(folder: Path, where: Address, private: bool | None, call: str) -> None:
    """Make a repository of a folder, or a commit where it is there. Raises FileError.

    private  of a repository that is new; None: as its owner's are
    """
    api = library(call).HfApi(library_name="surgery")
    try:
        api.create_repo(where.repository, private=private, exist_ok=True)
        if where.revision:
            api.create_branch(where.repository, branch=where.revision, exist_ok=True)
        api.upload_folder(
            repo_id=where.repository,
            folder_path=folder,
            revision=where.revision or None,
            commit_message="Save by surgery.save_pretrained",
        )
    except Exception as error:  # of several HTTP clients
        raise _unreachable(where, call, error) from error

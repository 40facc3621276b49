"""Files that are damaged, or made to do harm: each a clear error, or a load that is right.

Real files of all rule sets that fit a small model, PEFT's folders and folders of ours are changed
(`mutations`), by a seed each, and loaded: `python -m benchmarks hostile --n 20000`. A second
process does it, so that one which hangs, or ends it, is told as such.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery
from surgery import at, head, lora, parallel, qkv, shared, unfreeze, weight
from surgery._table import Table
from surgery.methods import dora, ia3, ln_tuning, loha, lokr, oft, rslora
from surgery.parts import frozen, rows, vera

from . import mutated_texts  # noqa: F401 (kinds of its own)
from .mutations import FOLDER, OURS, PEFT, mutate, tensors_of

SECONDS, MEBIBYTES, CHARACTERS = 2.0, 512, 4000  # what one file may take, and its error
HANGS = 60.0  # seconds after which a process is ended
TO_PEFT: dict[str, Any] = {
    "lora": [at(qkv, lora(rank=2)), at(head, unfreeze)], "rslora": rslora(rank=2), "ia3": ia3(),
    "dora": dora(rank=2), "loha": loha(rank=2), "lokr": lokr(rank=1), "oft": oft(size=4),
    "vera": [at("**.{fc1,fc2}", vera(core=shared(frozen(rank=4))))], "ln": ln_tuning(),
    "convolution": [at(weight("mix.weight"), lora(rank=2)), at("stats", unfreeze)],
    "words": [at(weight("words.weight"), lora(rank=2)), at(qkv, lora(rank=3)), at(head, unfreeze)],
    "rows": [at(weight("words.weight"), parallel(rows([1, 2]))), at(qkv, lora(rank=2))],
    "parameter": [at(weight("**.layers.0.own"), lora(rank=2)), at(qkv, lora(rank=2))],
}  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.own = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj((q @ k.mT / 8**0.5).softmax(-1) @ v)
        return x + self.fc2(self.fc1(self.norm2(x)).relu()) + x @ self.own


class Net(nn.Module):
    """Words, a convolution, a norm with statistics, two blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(12, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.stats = nn.BatchNorm1d(8)
        layers = nn.ModuleList(Block() for _ in range(2))
        self.transformer = nn.ModuleDict({"encoder_of_words": nn.ModuleDict({"layers": layers})})
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.stats(self.mix(x.mT)).mT
        for block in self.transformer.get_submodule("encoder_of_words.layers").children():
            x = block(x)
        y: Tensor = self.head(self.norm(x).mean(1))
        return y


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


class Sample(NamedTuple):
    """A real file, or a folder of files: its format, what it is of, and the bytes of each."""

    format: str
    name: str
    files: dict[str, bytes]


def samples() -> list[Sample]:
    """One of each rule set that fits, in each format that has it."""
    made = []
    for name in surgery.methods.__all__:
        made += [_sample(OURS, name, name, lambda m, f: surgery.save(m, f / "a.safetensors"))]
    made += [_sample(PEFT, name, rules, surgery.save_peft) for name, rules in TO_PEFT.items()]
    for name in ("lora", "adapterx_ffn", "bitfit"):
        made += [_sample(FOLDER, name, name, surgery.save_pretrained)]
    return [sample for sample in made if sample is not None]


def _sample(
    format: str, name: str, rules: Any, save: Callable[[nn.Module, Path], object]
) -> Sample | None:
    with tempfile.TemporaryDirectory() as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = surgery.apply(build(), rules)
        except surgery.SurgeryError:
            return None  # it is for models of another kind
        for parameter in surgery.parameters(model):
            nn.init.normal_(parameter, std=0.1)
        save(model, Path(made))
        files = {file.name: file.read_bytes() for file in Path(made).iterdir()}
    return Sample(format, name, {k: v for k, v in files.items() if k != "README.md"})


# one file --------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What came of one: "refused", "loaded", or what is wrong with that."""

    seed: int
    of: str
    kind: str
    told: str
    seconds: float
    mebibytes: float


class Trial:
    """A model to load files into, one after another."""

    def __init__(self, scratch: Path) -> None:
        self.samples, self.scratch = samples(), scratch
        self.model, self.before = build(), surgery.fingerprint(nn.Module())

    def outcome(self, seed: int) -> Outcome:
        """Load what a seed stands for."""
        rng, folder = Random(seed), self.scratch / "a"
        format = rng.choice([OURS] * 9 + [PEFT] * 9 + [FOLDER] * 2)
        sample = rng.choice([sample for sample in self.samples if sample.format == format])
        folder.mkdir()
        for name, data in sample.files.items():
            (folder / name).write_bytes(data)
        kind = mutate(sample.format, rng, folder)
        path = folder / "a.safetensors" if sample.format == OURS else folder
        start, held = time.process_time(), _reset_peak()
        told = self._load(sample.format, path)
        seconds, peak = time.process_time() - start, _peak() - held
        told = told or self._right(sample.format, path)
        if not told.startswith("BROKEN"):
            told = _too_much(seconds, peak) or told
        shutil.rmtree(folder)
        return Outcome(seed, f"{sample.format}: {sample.name}", kind, told, seconds, peak)

    def _load(self, format: str, path: Path) -> str:
        """Load a file; "": it is loaded."""
        self.before = surgery.fingerprint(self.model)
        try:
            if format == PEFT:
                surgery.load_peft(self.model, path)
            else:
                told = str(surgery.inspect(path))
                surgery.load(self.model, path)
                return "" if told.replace("\n", "").isprintable() else f"BROKEN: {told!r:.200}"
        except surgery.SurgeryError as error:
            return self._seen(error)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.model = build()
            return f"BROKEN: {type(error).__module__}.{type(error).__name__}: {error!s:.200}"
        return ""

    def _seen(self, error: surgery.SurgeryError) -> str:
        """Whether an error is clear, and the model what it was."""
        if surgery.fingerprint(self.model) != self.before:
            self.model = build()
            return "BROKEN: the model is changed after an error"
        text = str(error)
        if not (error.rule and error.fact and error.remedy and len(text) < CHARACTERS):
            return f"BROKEN: an error of {len(text):,} characters"
        if not text.replace("\n", "").isprintable():
            return f"BROKEN: an error that cannot be printed, {text!r:.200}"
        return "refused"

    def _right(self, format: str, path: Path) -> str:
        """Whether what was loaded is what is in the file, and can be taken off."""
        told = "loaded"
        try:
            if format == PEFT:
                told = _as_peft(self.model, path)
            else:
                file = path if path.is_file() else tensors_of(path)
                told = _as_in(surgery.state_dict(self.model), load_file(file)) or told
            self.model(IDS)
        except surgery.SurgeryError:
            pass  # rules that can be carried out, and cannot run
        except Exception as error:
            told = f"BROKEN: loaded, and {type(error).__name__}: {error!s:.200}"
        surgery.revert(self.model)
        if surgery.fingerprint(self.model) != self.before:
            self.model = build()
            told = "BROKEN: the model is changed after a load and a revert"
        return told


def _as_in(held: dict[str, Tensor], file: dict[str, Tensor]) -> str:
    for key, tensor in file.items():
        if key in held and not _same(held[key], tensor):
            return f"BROKEN: {key} is not what is in the file"
    return "" if file.keys() <= held.keys() else "BROKEN: it has more than was loaded"


def _same(one: Tensor, other: Tensor) -> bool:
    bits = [t.detach().contiguous().flatten().view(torch.uint8) for t in (one, other)]
    return one.dtype == other.dtype and torch.equal(*bits)


@torch.no_grad()
def _as_peft(model: nn.Module, folder: Path) -> str:
    """Whether a model answers as PEFT's does, where that loads such a folder."""
    import peft

    with warnings.catch_warnings(record=True) as told, torch.random.fork_rng():
        warnings.simplefilter("always")
        try:
            theirs = peft.PeftModel.from_pretrained(build(), str(folder)).eval()(IDS)
        except Exception:
            return "loaded"  # it is stricter, or knows no such model
    ours = model(IDS)
    if any("missing" in str(each.message) for each in told):
        return "loaded"  # with names of wrappers, which it passes over
    if theirs.isfinite().all() and theirs.abs().max() > 1e4:
        return "loaded"  # rounding is all that is left
    close = torch.allclose(ours, theirs, 1e-3, 1e-3, equal_nan=True)
    return "loaded, as PEFT does" if close else f"BROKEN: {ours[0]} where PEFT gives {theirs[0]}"


# time and memory -------------------------------------------------------------------------------


def _too_much(seconds: float, mebibytes: float) -> str:
    if seconds > SECONDS:
        return f"BROKEN: {seconds:.1f} s"
    return f"BROKEN: {mebibytes:,.0f} MiB" if mebibytes > MEBIBYTES else ""


def _reset_peak() -> float:
    """Let the peak begin here; what is held now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _status(word: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(word)).split()[1]) / 1024


# many ------------------------------------------------------------------------------------------


def _worker(pipe: Connection, seeds: range) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        trial = Trial(Path(scratch))
        for seed in seeds:
            pipe.send(trial.outcome(seed))
        harmed = (Path(scratch) / "HARM").exists()
    pipe.send(harmed)


def outcomes(n: int, start: int = 0) -> Iterator[Outcome]:
    """Those of n seeds; a process that ends, or hangs, is begun anew behind the one that did it."""
    spawn, seed, end = multiprocessing.get_context("spawn"), start, start + n
    while seed < end:
        mine, theirs = spawn.Pipe()
        process = spawn.Process(target=_worker, args=(theirs, range(seed, end)), daemon=True)
        process.start()
        theirs.close()
        try:
            while mine.poll(HANGS):
                told = mine.recv()
                if not isinstance(told, Outcome):
                    if told:
                        yield Outcome(seed, "", "pickles", "BROKEN: code of a file ran", 0.0, 0.0)
                    break
                seed = told.seed + 1
                yield told
            else:
                yield Outcome(seed, "", "", f"BROKEN: it hangs for {HANGS:.0f} s", HANGS, 0.0)
                seed += 1
        except EOFError:
            yield Outcome(seed, "", "", "BROKEN: it ends the process", 0.0, 0.0)
            seed += 1
        process.kill()
        process.join()


def report(n: int = 20_000, start: int = 0) -> list[Table]:
    """What came of n files by kind, what took the most, and what is wrong."""
    found = list(outcomes(n, start))
    kinds = sorted({o.kind for o in found})
    counted = Counter((o.kind, o.told.partition(":")[0]) for o in found)
    columns = ("refused", "loaded", "loaded, as PEFT does", "BROKEN")
    rows: list[tuple[object, ...]] = [
        (kind or "?", *(counted[kind, column] for column in columns)) for kind in kinds
    ]
    rows.append(("all", *(sum(counted[kind, c] for kind in kinds) for c in columns)))
    notes = [_most(found, "seconds", "s"), _most(found, "mebibytes", "MiB")]
    wrong = [(o.seed, o.of, o.kind, o.told) for o in found if o.told.startswith("BROKEN")]
    tables = [Table(f"{n:,} hostile files", ("kind", *columns), rows, notes)]
    return [*tables, Table("Wrong", ("seed", "file", "kind", "what"), wrong)] if wrong else tables


def _most(found: list[Outcome], what: str, unit: str) -> str:
    most = max(found, key=lambda outcome: getattr(outcome, what))
    return f"most {what} {getattr(most, what):.2f} {unit}: seed {most.seed}, {most.of}, {most.kind}"

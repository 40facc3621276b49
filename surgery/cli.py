"""The command line: surgery demo | anatomy | plan | rulesets | survey."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import anatomy, plan, rulesets
from .errors import RuleError, SurgeryError, nearest_names
from .rule import Rules
from .survey import SOURCES

MODEL = "timm:NAME, or package.module:function (or file.py:function) that returns a model"
RULES = "the name of a rule set, or package.module:NAME (or file.py:NAME) of rules of your own"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 2 not, 130 interrupted).

    >>> main(["rulesets"])  # doctest: +ELLIPSIS
    Rule sets
    ...
    0
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (SurgeryError, OSError) as error:
        print(f"surgery {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


def build(name: str) -> nn.Module:
    """The model that the command line names; timm's on the meta device, without weights.

    Raises RuleError where there is no such model, with the nearest names.

    >>> build("torch.nn:Identity")
    Identity()
    """
    kind, _, what = name.partition(":")
    if kind == "timm" and what:
        return _timm(what)
    made = _named(name, "MODEL", MODEL)
    model = _called(made, name) if not isinstance(made, nn.Module) else made
    if not isinstance(model, nn.Module):
        raise RuleError(name, f"it gave a {type(model).__name__}, and no model.", f"Give {MODEL}.")
    return model


def rules_of(name: str) -> Rules:
    """The rules that the command line names.

    >>> rules_of("full")
    'full'
    """
    if ":" not in name:
        return name
    rules: Rules = _named(name, "RULES", RULES)
    return rules


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="surgery", description="Model surgery for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, run: Callable[[Any], None]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        return made

    demo = command("demo", "train and compare methods on real digits, on the CPU", _demo)
    _demo_arguments(demo)
    look = command(
        "anatomy", "show what a model is made of", lambda a: print(anatomy(build(a.model)))
    )
    look.add_argument("model", metavar="MODEL", help=MODEL)
    made = command("plan", "show what rules would do to a model", _plan)
    made.add_argument("model", metavar="MODEL", help=MODEL)
    made.add_argument("rules", metavar="RULES", help=RULES, nargs="?", default="adapterx_ffn")
    command("rulesets", "list the named rule sets", lambda a: print(rulesets()))
    _survey_arguments(command("survey", "try every model of timm, torchvision, ...", _survey))
    return parser


def _demo_arguments(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--seeds", type=_count, default=5, help="runs of each method (default 5)")
    demo.add_argument("--epochs", type=_count, default=None, help="passes over the 200 images")
    demo.add_argument("--methods", nargs="+", metavar="RULES", help="rule sets to compare")
    demo.add_argument("--pretrain", action="store_true", help="make the backbone anew (minutes)")
    demo.add_argument("--out", default="out", help="folder for the adapter and the picture")


def _source(text: str) -> str:
    if text not in SOURCES:
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(SOURCES)}")
    return text


def _survey_arguments(survey: argparse.ArgumentParser) -> None:
    survey.add_argument(
        "sources", nargs="*", metavar="SOURCE", type=_source, help=", ".join(SOURCES)
    )
    survey.add_argument("--only", default="", help='names or patterns: "vit_*,swin_*"')
    survey.add_argument("--meta", action="store_true", help="read and plan; run nothing")
    survey.add_argument("--seconds", type=_count, default=60, help="limit for a model (default 60)")
    survey.add_argument("--workers", type=_count, default=2, help="processes (default 2)")
    survey.add_argument("--out", type=Path, default=None, help="write the table to this .md file")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return int(text)


def _plan(arguments: argparse.Namespace) -> None:
    print(plan(build(arguments.model), rules_of(arguments.rules)))


def _demo(arguments: argparse.Namespace) -> None:
    try:
        from .demo.digits import run
    except ModuleNotFoundError as error:
        raise _missing(error.name or "", "demo") from error
    run(
        methods=arguments.methods,
        seeds=arguments.seeds,
        epochs=arguments.epochs,
        pretrain=arguments.pretrain,
        out=Path(arguments.out),
    )


def _survey(arguments: argparse.Namespace) -> None:
    from .survey import survey

    try:
        survey(
            arguments.sources or list(SOURCES),
            only=arguments.only,
            real=not arguments.meta,
            seconds=arguments.seconds,
            workers=arguments.workers,
            out=arguments.out,
        )
    except ModuleNotFoundError as error:
        raise _missing(error.name or "", "bench") from error


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise _missing("timm", "vision") from error
    if not timm.is_model(name):
        near = nearest_names(name, timm.list_models())
        raise RuleError(
            f"timm:{name}",
            "timm has no model of this name.",
            f"Nearest: {near}."
            if near
            else 'See python -c "import timm; print(timm.list_models())".',
        )
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return model


def _missing(module: str, extra: str) -> RuleError:
    return RuleError(
        f"import {module}",
        f"{module} is not installed.",
        f'Run: pip install "adapterx-surgery[{extra}]"',
    )


def _named(name: str, what: str, help: str) -> Any:
    """The object that `module:attribute` or `file.py:attribute` names."""
    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise RuleError(name, f"this names no {what}.", f"Give {help}.")
    module = _imported(module_name, name)
    if not hasattr(module, attribute):
        near = nearest_names(attribute, [n for n in vars(module) if not n.startswith("_")])
        raise RuleError(
            name,
            f"{module_name} has no {attribute}.",
            f"Nearest: {near}." if near else "Check the spelling.",
        )
    return getattr(module, attribute)


def _imported(module_name: str, name: str) -> Any:
    try:
        if not module_name.endswith(".py"):
            sys.path.insert(0, "")
            return importlib.import_module(module_name)
        spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot read {module_name}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except SurgeryError:
        raise
    except Exception as error:
        raise RuleError(
            name,
            f"importing {module_name} failed: {type(error).__name__}: {error}",
            "Give a module that can be imported from this folder, or a file that ends in .py.",
        ) from error


def _called(made: Any, name: str) -> Any:
    try:
        return made()
    except Exception as error:
        raise RuleError(
            name,
            f"calling it failed: {type(error).__name__}: {error}",
            "Give a function that takes no arguments and returns a model.",
        ) from error


if __name__ == "__main__":
    sys.exit(main())

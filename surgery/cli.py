"""The command line: surgery demo | anatomy | plan | check | show | export | rulesets | survey."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import anatomy, inspect, load, merge, plan, rulesets
from ._resolve import INPUTS, MODEL, RULES, build, inputs_of, missing, rules_of
from .errors import RuleError, SurgeryError
from .survey import SOURCES, is_package


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 broken, 2 not done, 130 interrupted).

    >>> main(["rulesets"])  # doctest: +ELLIPSIS
    Rule sets
    ...
    0
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (SurgeryError, OSError) as error:
        print(f"surgery {arguments.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="surgery", description="Model surgery for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, run: Callable[[Any], int | None]) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=help, description=help)
        subparser.set_defaults(run=run)
        return subparser

    _demo_arguments(command("demo", "train and compare methods on real digits, on the CPU", _demo))
    _model_argument(command("anatomy", "show what a model is made of", _anatomy))
    _plan_arguments(command("plan", "show what rules would do to a model", _plan))
    _check_arguments(command("check", "try the specification suite on a model and rules", _check))
    _file_argument(command("show", "show what is in a file of surgery.save", _show))
    _export_arguments(command("export", "write a model for ONNX, or torch.export", _export))
    command("rulesets", "list the named rule sets", lambda a: print(rulesets()))
    _survey_arguments(command("survey", "try every model of timm, torchvision, ...", _survey))
    return parser


def _demo_arguments(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--points", action="store_true", help="on point clouds instead of digits")
    demo.add_argument("--seeds", type=number, default=3, help="runs of each method (default 3)")
    demo.add_argument("--epochs", type=number, default=None, help="passes over what is trained on")
    demo.add_argument("--methods", nargs="+", metavar="RULES", help="rule sets to compare")
    demo.add_argument("--pretrain", action="store_true", help="make the backbone anew (minutes)")
    demo.add_argument("--out", default="out", help="folder for the adapter and the picture")


def _model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)


def _file_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="as surgery.save wrote it")


def _export_arguments(export: argparse.ArgumentParser) -> None:
    _model_argument(export)
    _file_argument(export)
    export.add_argument("--to", choices=["onnx", "pt2"], default="onnx", help="pt2: torch.export")
    export.add_argument("--out", type=Path, default=None, help="default: FILE.onnx, or FILE.pt2")
    export.add_argument("--inputs", metavar="INPUTS", help=f"{INPUTS}; else guessed", default="")
    export.add_argument("--merge", action="store_true", help="merge the parts into the base first")
    export.add_argument("--pretrained", action="store_true", help="timm's weights, downloaded")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument("rules", metavar="RULES", help=RULES, nargs="?", default="adapterx_ffn")


def _source(text: str) -> str:
    if text not in SOURCES and not is_package(text):
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(SOURCES)}, package:NAME")
    return text


def _survey_arguments(survey: argparse.ArgumentParser) -> None:
    sources = f"{', '.join(SOURCES)}, or package:NAME of a package or a module that builds models"
    survey.add_argument("sources", nargs="*", metavar="SOURCE", type=_source, help=sources)
    survey.add_argument("--only", default="", help='names or patterns: "vit_*,swin_*"')
    survey.add_argument("--meta", action="store_true", help="read and plan; run nothing")
    survey.add_argument("--seconds", type=number, default=60, help="limit for a model (default 60)")
    survey.add_argument("--workers", type=number, default=2, help="processes (default 2)")
    survey.add_argument("--out", type=Path, default=None, help="write the table to this .md file")


def _check_arguments(check: argparse.ArgumentParser) -> None:
    _model_argument(check)
    check.add_argument("--rules", metavar="RULES", help=RULES, default="adapterx_ffn")
    check.add_argument("--inputs", metavar="INPUTS", help=f"{INPUTS}; else guessed", default="")
    check.add_argument("--only", nargs="+", metavar="PROPERTY", default=[], help="these alone")
    check.add_argument(
        "--expect", nargs="+", metavar="PROPERTY=REASON", type=_excuse, default=[],
        help="properties that need not hold here, and why",
    )  # fmt: skip
    check.add_argument("--examples", type=number, default=3, help="of each property (default 3)")
    check.add_argument("--thorough", action="store_true", help="100 examples of each property")


def _excuse(text: str) -> tuple[str, str]:
    name, equals, reason = text.partition("=")
    if not (equals and reason):
        raise argparse.ArgumentTypeError(f"{text!r} gives no reason: write {name}=REASON")
    return name, reason


def number(text: str) -> int:
    """A whole number from 1 up, as the command line takes it."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return int(text)


def _anatomy(arguments: argparse.Namespace) -> None:
    print(anatomy(build(arguments.model)))


def _show(arguments: argparse.Namespace) -> None:
    print(inspect(arguments.file))


def _export(arguments: argparse.Namespace) -> None:
    from ._export import export

    name = arguments.model
    if name.startswith("timm:") and not arguments.pretrained:
        raise RuleError(
            name,
            "it would be made with random weights.",
            "Give --pretrained, or my.py:function that returns the model with its weights.",
        )
    model = load(build(name, "cpu", arguments.pretrained), arguments.file)
    out = arguments.out or arguments.file.with_suffix(f".{arguments.to}")
    inputs = inputs_of(arguments.inputs, model)
    off = export(merge(model) if arguments.merge else model, inputs, out, arguments.to)
    print(f"{out}: its answers are within {off:.1e} of the model's, for batches of any size")


def _plan(arguments: argparse.Namespace) -> None:
    print(plan(build(arguments.model), rules_of(arguments.rules)))


def _demo(arguments: argparse.Namespace) -> None:
    try:
        from .demo import digits, points
    except ModuleNotFoundError as error:
        raise missing(error.name or "", "demo") from error
    (points.run_short if arguments.points else digits.run)(
        methods=arguments.methods,
        seeds=arguments.seeds,
        epochs=arguments.epochs,
        pretrain=arguments.pretrain,
        out=Path(arguments.out),
    )


def _check(arguments: argparse.Namespace) -> int:
    try:
        from .spec import check
    except ModuleNotFoundError as error:
        raise missing(error.name or "", "spec") from error
    model = build(arguments.model, "cpu")
    report = check(
        model,
        rules_of(arguments.rules),
        inputs_of(arguments.inputs, model),
        expected_failures=dict(arguments.expect),
        examples=100 if arguments.thorough else arguments.examples,
        only=arguments.only,
    )
    print(report)
    return 1 if report.broken else 0


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
        raise missing(error.name or "", "bench") from error


if __name__ == "__main__":
    sys.exit(main())

"""The command line: parse, build from the configuration, call, print. No logic of its own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_opd.config import Config, load_as, load_config
from lit_opd.errors import RunError, UserError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 a mistake of the user, 130 interrupted.
    """
    try:
        parsed = _parse(arguments)
        parsed.run(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError("command line", "a command and its arguments", message, "python -m lit_opd --help lists them.")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    # Not argparse's own positionals: it takes only one unbroken run of them, and overrides may stand anywhere.
    parser = _parser()
    parsed, overrides = parser.parse_known_args(arguments)
    for word in overrides:
        if word.startswith("-") or "overrides" not in parsed:
            parser.error(f"unknown argument {word!r}")
    parsed.overrides = overrides
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lit_opd", description="On-policy distillation of language models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    fit = _command(commands, "fit", _fit, "distil the student from the teacher")
    fit.add_argument("--resume", metavar="auto|CHECKPOINT", help="continue the run in output_dir")
    fit.add_argument("--profile", action="store_true", help="record where the time of a few steps goes: a table of "
                     "phases and a chrome trace, in output_dir/profile and in MLflow")  # fmt: skip
    for name, what in (("validate", "measure the student on the validation prompts"),
                       ("test", "the same, reported as test results")):  # fmt: skip
        _command(commands, name, _evaluate, what).add_argument(
            "--checkpoint", metavar="FILE", help="default: the student as configured, untrained"
        )
    export = _command(commands, "export", _export, "write a checkpoint's student as a Hugging Face folder")
    export.add_argument("--checkpoint", metavar="FILE", help="default: the newest of output_dir")
    export.add_argument("--out", metavar="FOLDER", help="default: output_dir/student")
    measure = _command(commands, "measure", _measure, "the gradients of several estimators on the same rollouts")
    measure.add_argument("--json", metavar="FILE", help="write the numbers there too")
    ui = _command(commands, "ui", _ui, "open MLflow's pages on the runs of tracking.uri, at 127.0.0.1")
    ui.add_argument("--port", type=int, default=5000, help="default: 5000")
    compare = _command(commands, "compare", _compare, "make runs that differ in one thing, with several seeds, and say "
                       "which is better")  # fmt: skip
    compare.add_argument(
        "--from-runs", metavar="ID", nargs="+", default=[], help="compare runs that MLflow has, and make none"
    )
    compare.add_argument("--json", metavar="FILE", help="write the report's numbers to a file too")
    audit = _command(commands, "audit", _audit, "look for what would spoil a long run, before it")
    audit.add_argument("--json", metavar="FILE", help="write every finding there too")
    check = commands.add_parser(
        "check", help="hold an estimator to the laws and say whose gradient it has", usage="lit_opd check "
        "NAME|FILE.py:FUNCTION [key=value ...]", description="the laws it holds and the gradient it has, exactly",
    )  # fmt: skip
    check.add_argument("estimator", metavar="NAME|FILE.py:FUNCTION", help="registered, or of your own")
    check.set_defaults(run=_check, overrides=[])
    listing = commands.add_parser("estimators", help="list the registered estimators with their contracts")
    listing.add_argument("--markdown", action="store_true", help="as a Markdown table")
    listing.set_defaults(run=_estimators)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: object, what: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=what, description=what, usage=f"lit_opd {name} --config FILE [options] [key=value ...]"
    )
    parser.add_argument("--config", metavar="FILE", action="append", default=[], help="YAML, may be repeated")
    parser.set_defaults(run=run, stage=name, overrides=[])
    return parser


def _config(parsed: argparse.Namespace) -> Config:
    return load_config(parsed.config, parsed.overrides)


def _fit(parsed: argparse.Namespace) -> None:
    config = _config(parsed)
    from lit_opd.lab.quiet import quiet_libraries
    from lit_opd.lab.summary import print_outcome
    from lit_opd.lab.training import train

    quiet_libraries()
    print_outcome(config, train(config, parsed.resume, parsed.profile))


def _evaluate(parsed: argparse.Namespace) -> None:
    config = _config(parsed)
    from lit_opd.lab.quiet import quiet_libraries
    from lit_opd.lab.summary import print_results
    from lit_opd.lab.training import evaluate

    quiet_libraries()
    title = f"{parsed.stage}: {parsed.checkpoint or config.student.path}"
    print_results(title, evaluate(config, parsed.checkpoint, parsed.stage))


def _export(parsed: argparse.Namespace) -> None:
    config = _config(parsed)
    from lit_opd.lab.export import export_checkpoint
    from lit_opd.lab.folder import RunFolder
    from lit_opd.lab.quiet import quiet_libraries

    quiet_libraries()
    folder = RunFolder(Path(config.output_dir))
    checkpoint = folder.find_checkpoint(parsed.checkpoint)
    print(export_checkpoint(config.student, checkpoint, Path(parsed.out) if parsed.out else folder.student))


def _measure(parsed: argparse.Namespace) -> None:
    config = _config(parsed)
    from lit_opd.lab.measure import measure, print_measurement, record
    from lit_opd.lab.quiet import quiet_libraries
    from lit_opd.tracking import check_tracking

    quiet_libraries()
    check_tracking(config.tracking.uri)
    measurement = measure(config)
    print_measurement(measurement)
    if parsed.json:
        Path(parsed.json).parent.mkdir(parents=True, exist_ok=True)
        Path(parsed.json).write_text(json.dumps(measurement.as_json(), indent=2, allow_nan=False))
    print(f"MLflow: {record(config, measurement)}")
    if measurement.interrupted:
        raise KeyboardInterrupt


def _ui(parsed: argparse.Namespace) -> None:
    config = _config(parsed)
    from lit_opd.lab.ui import serve

    serve(config, parsed.port)


def _compare(parsed: argparse.Namespace) -> None:
    from lit_opd.lab.compare.grid import Comparison, load_comparison, runs_of

    json_file = Path(parsed.json) if parsed.json else None
    # argparse gives an option all the words that follow it, and overrides may stand anywhere.
    ids = [word for word in parsed.from_runs if "=" not in word]
    overrides = [*parsed.overrides, *(word for word in parsed.from_runs if "=" in word)]
    comparison = None if parsed.from_runs else load_comparison(parsed.config, overrides)
    runs = runs_of(comparison) if comparison else []
    from lit_opd.lab.compare.command import compare, compare_recorded
    from lit_opd.lab.quiet import quiet_libraries

    quiet_libraries()
    if comparison:
        compare(comparison, runs, json_file)
    else:
        compare_recorded(load_as(Comparison, parsed.config, overrides), ids, json_file)


def _audit(parsed: argparse.Namespace) -> None:
    config = _config(parsed)
    from lit_opd.lab.audit import audit, check_destination, print_audit, write_json
    from lit_opd.lab.quiet import quiet_libraries

    quiet_libraries()
    check_destination(parsed.json)
    found = audit(config)
    print_audit(found)
    if parsed.json is not None:
        write_json(found, parsed.json)
    found.enforce()


def _check(parsed: argparse.Namespace) -> None:
    keywords = _keywords(parsed.overrides)
    from lit_opd.lab.check import check

    check(parsed.estimator, keywords)


def _keywords(words: Sequence[str]) -> dict[str, Any]:
    for word in words:
        if word.find("=") < 1:
            raise UserError(word, "a keyword of the form key=value", "no '='", "Write e.g. gamma=0.5.")
    try:
        return dict(OmegaConf.to_container(OmegaConf.from_dotlist(list(words))))  # type: ignore[arg-type]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        found = f"{' '.join(words)!r}: {str(error).splitlines()[0]}"
        raise UserError("keywords", "values in YAML", found, "Quote them.") from error


def _estimators(parsed: argparse.Namespace) -> None:
    from lit_opd.lab.catalogue import markdown_table, print_table

    print(markdown_table()) if parsed.markdown else print_table()

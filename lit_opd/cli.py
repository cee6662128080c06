"""Parse the command line, load the configuration, call a command of `commands/`, and tell mistakes in one line.

Slow imports stand where they are used: `--help` waits for none, and a mistake in a file not for torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from os.path import expanduser
from typing import Any, NoReturn

from lit_opd import __version__
from lit_opd.errors import RunError, UserError
from lit_opd.plugins import calling_parts
from lit_opd.stopping import Stopped, heeding
from lit_opd.streams import outlive_readers

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 a mistake of the user, 130, 143 or 129 stopped by
        SIGINT (Ctrl-C), SIGTERM or SIGHUP.
    """
    outlive_readers()
    try:
        with heeding(), calling_parts():
            parsed = _parse(arguments)
            parsed.run(parsed)
    except UserError as error:
        for mistake in error.mistakes:
            print(f"error: {mistake}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        if not stop.told:
            print(stop, file=sys.stderr)
        return stop.exit_code
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
    parser.add_argument("--version", action="version", version=f"lit_opd {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    file: Any = {"metavar": "FILE", "type": expanduser}
    fit = _command(commands, "fit", "running.fit", "distil the student from the teacher")
    fit.add_argument("--resume", metavar="auto|CHECKPOINT", type=expanduser, help="continue the run in output_dir")
    dry = "do everything but the first step, say what was found, and write nothing"
    fit.add_argument("--dry-run", action="store_true", help=dry)
    left = "a table of phases and a chrome trace, in output_dir/profile and in MLflow"
    fit.add_argument("--profile", action="store_true", help=f"record where the time of a few steps goes: {left}")
    validate, test = "measure a run's student on the validation prompts", "the same, reported as test results"
    for name, what in (("validate", validate), ("test", test)):
        evaluate = _command(commands, name, "running.evaluate", what)
        evaluate.add_argument("--checkpoint", **file, help="default: the newest of output_dir")
        evaluate.add_argument("--untrained", action="store_true", help="measure the student as it was before training")
        evaluate.add_argument("--json", **file, dest="json_file", help="write the numbers there too")
        evaluate.set_defaults(stage=name)
    export = _command(commands, "export", "export.export", "write a checkpoint's student as a Hugging Face folder")
    export.add_argument("--checkpoint", **file, help="default: the newest of output_dir")
    export.add_argument("--out", metavar="FOLDER", type=expanduser, help="default: output_dir/student")
    told = "print the configuration that a run would take, with where each value came from"
    _command(commands, "config", "", told).set_defaults(run=_config)
    measure = _command(
        commands, "measure", "experiments.measure", "the gradients of several estimators on the same rollouts"
    )
    ui = _command(commands, "ui", "ui.serve", "open MLflow's pages on the runs of tracking.uri, at 127.0.0.1")
    ui.add_argument("--port", type=int, default=5000, help="default: 5000")
    _command(commands, "sync", "sync.sync", "send MLflow what the run in output_dir could not tell it")
    what = "make runs that differ in one thing, with several seeds, and say which is better"
    compare = _command(commands, "compare", "experiments.compare", what)
    compare.add_argument(
        "--from-runs", metavar="ID", nargs="+", default=[], help="compare runs that MLflow has, and make none"
    )
    table = "compare results that were made elsewhere: columns metric, variant, seed, value, perhaps prompt"
    compare.add_argument("--from-table", metavar="FILE.csv", type=expanduser, help=table)
    compare.add_argument("--better", metavar="lower|higher", help="the good direction of the table's metrics")
    compare.add_argument("--scale", metavar="raw|log", help="on which the table's metrics are compared")
    compare.add_argument("--plan", action="store_true", help="say what so many seeds can tell, and make no run")
    compare.set_defaults(run=_compare)
    plan = _command(commands, "plan", "planning.plan", "what a run needs of a device's memory, before weights load")
    plan.add_argument("--device", metavar="NAME", help="as h100-80gb, default: this machine's accelerator or memory")
    audit = _command(commands, "audit", "experiments.audit", "look for what would spoil a long run, before it")
    written = {measure: "the numbers", compare: "the report's numbers", audit: "every finding", plan: "the bytes"}
    for experiment, what in written.items():
        experiment.add_argument("--json", **file, dest="json_file", help=f"write {what} there too")
    init = commands.add_parser("init", help="write a commented configuration for two models and a file of prompts")
    for name, what in (("student", "a model folder or hub name"), ("teacher", "the same"), ("data", "rows of prompts")):
        init.add_argument(f"--{name}", required=True, metavar="PATH", help=what)
    init.add_argument("--out", **file, required=True, help="the configuration, a new file")
    init.set_defaults(run=_init)
    what = "hold an estimator to the laws and say whose gradient it has"
    told = "the laws it holds and the gradient it has, exactly"
    usage = "lit_opd check NAME|FILE.py:FUNCTION [key=value ...]"
    check = commands.add_parser("check", help=what, usage=usage, description=told)
    check.add_argument("estimator", metavar="NAME|FILE.py:FUNCTION", help="registered, or of your own")
    check.set_defaults(run=_check, overrides=[])
    listing = commands.add_parser("estimators", help="list the registered estimators with their contracts")
    listing.add_argument("--markdown", action="store_true", help="as a Markdown table")
    listing.set_defaults(run=_estimators)
    recipes = commands.add_parser("recipes", help="list the published recipes, or print the file of one")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="of the recipe to print, default: list all")
    recipes.set_defaults(run=_recipes)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, calls: str, what: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=what, description=what, usage=f"lit_opd {name} --config FILE [options] [key=value ...]"
    )
    parser.add_argument("--config", metavar="FILE", action="append", default=[], help="YAML, may be repeated")
    parser.set_defaults(run=_run, calls=calls, overrides=[])
    return parser


def _run(parsed: argparse.Namespace) -> None:
    """Load the configuration, and call the function of `commands/` that the command names, with its options."""
    from lit_opd.config import load_config

    options = {
        name: value for name, value in vars(parsed).items() if name not in ("run", "calls", "config", "overrides")
    }
    config = load_config(parsed.config, parsed.overrides)
    module, function = parsed.calls.split(".")
    getattr(import_module(f"lit_opd.commands.{module}"), function)(config, **options)


def _config(parsed: argparse.Namespace) -> None:
    from lit_opd.commands.configuration import print_configuration

    print_configuration(parsed.config, parsed.overrides)


def _init(parsed: argparse.Namespace) -> None:
    from lit_opd.commands.starting import write_starter

    write_starter(parsed.student, parsed.teacher, parsed.data, parsed.out)


def _compare(parsed: argparse.Namespace) -> None:
    from lit_opd.config import load_as
    from lit_opd.lab.compare.grid import Comparison, load_comparison, runs_of

    # argparse gives an option all the words that follow it, and overrides may stand anywhere.
    ids = [word for word in parsed.from_runs if "=" not in word]
    overrides = [*parsed.overrides, *(word for word in parsed.from_runs if "=" in word)]
    made_elsewhere = bool(parsed.from_runs or parsed.from_table)
    if made_elsewhere:
        comparison, runs = load_as(Comparison, parsed.config, overrides), []
    else:
        comparison = load_comparison(parsed.config, overrides)
        runs = runs_of(comparison)
    from lit_opd.commands import experiments

    if parsed.from_table:
        experiments.compare_table(comparison, parsed.from_table, parsed.better, parsed.scale, parsed.json_file)
    elif parsed.from_runs:
        experiments.compare_recorded(comparison, ids, parsed.json_file)
    elif parsed.plan:
        experiments.plan_comparison(comparison)
    else:
        experiments.compare(comparison, runs, parsed.json_file)


def _check(parsed: argparse.Namespace) -> None:
    from lit_opd.config import parse_overrides

    keywords = parse_overrides(parsed.overrides)
    from lit_opd.commands.check import check

    check(parsed.estimator, keywords)


def _estimators(parsed: argparse.Namespace) -> None:
    from lit_opd.commands.estimators import markdown_table, print_table

    print(markdown_table()) if parsed.markdown else print_table()


def _recipes(parsed: argparse.Namespace) -> None:
    from lit_opd.commands.recipes import print_recipe, print_recipes

    print_recipe(parsed.name) if parsed.name else print_recipes()

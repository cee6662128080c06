"""Make the pictures of the README from real MLflow runs: curves, and the MLflow UI comparing the runs.

Usage: ``python tools/make_pictures.py [--uri sqlite:///mlflow.db] [--experiment quickstart] [--out docs]``

Writes ``<experiment>_curves.png``, by matplotlib, and screenshots of the stock MLflow UI by headless Chromium:
``mlflow_table.png``, ``mlflow_compare.png`` and, of the best run, ``mlflow_completions.png``. They need
``pip install selenium`` and Debian's ``chromium`` and ``chromium-driver``; tests/commands/test_browser.py holds what
they show. The curves show every finished run of it; runs which differ in the seed only share a colour.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from browser import WINDOW, open_pages, wait_for
from matplotlib.axes import Axes
from mlflow import MlflowClient
from mlflow.entities import Run

PANELS = {"reverse_kl": "reverse KL to the teacher (nats/token)", "accuracy": "accuracy (fraction correct)"}
# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow, too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


class Curve(NamedTuple):
    """Values of a metric over optimizer steps, with the ends of their intervals."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uri", default="sqlite:///mlflow.db", help="MLflow tracking URI")
    parser.add_argument("--experiment", default="quickstart", help="experiment whose runs are shown")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pictures")
    arguments = parser.parse_args()
    client, experiment_id, runs = find_runs(arguments.uri, arguments.experiment)
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw_curves(client, runs, arguments.out / f"{arguments.experiment}_curves.png")
    with serve_ui(arguments.uri) as address, open_pages(address) as pages:
        rows = pages.open_table(experiment_id)
        pages.resize(WINDOW[0], min(WINDOW[1], 330 + 32 * len(rows)))  # no empty half below the last run
        pages.photograph(arguments.out / "mlflow_table.png")
        pages.resize(*WINDOW)
        pages.open_charts(experiment_id)
        pages.photograph(arguments.out / "mlflow_compare.png")
        pages.open_artifact(experiment_id, runs[0].info.run_id, "completions.json")
        pages.photograph(arguments.out / "mlflow_completions.png")


def find_runs(uri: str, experiment: str) -> tuple[MlflowClient, str, list[Run]]:
    """Find the finished runs of an experiment, the most accurate first.

    Raises:
        SystemExit: no such database, experiment or runs.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise SystemExit(f"--uri: no database {uri!r}; MLflow would make an empty one.")
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise SystemExit(f"--experiment: {uri} has none named {experiment!r}.")
    runs = client.search_runs([found.experiment_id], "attributes.status = 'FINISHED'")
    runs = [run for run in runs if all(f"val/{name}" in run.data.metrics for name in PANELS)]
    if not runs:
        raise SystemExit(f"--experiment: {experiment!r} has no finished run with val/{' and val/'.join(PANELS)}.")
    return client, found.experiment_id, sorted(runs, key=lambda run: -run.data.metrics["val/accuracy"])


def draw_curves(client: MlflowClient, runs: list[Run], path: Path) -> None:
    """Draw the held-out curves of runs, with 95% intervals and the teacher's own level.

    Args:
        client: of the tracking database.
        runs: in the order of the legend.
        path: of the picture.
    """
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    colours = choose_colours(runs)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 4.3), layout="constrained")
    for ax, (metric, title) in zip(axes, PANELS.items(), strict=True):
        ends = []
        for run in reversed(runs):  # the most accurate run is drawn last, on top
            label = describe(run)
            value = draw_run(ax, read_curve(client, run, metric), colours[label], label)
            ends.append((value, f"{run.data.params['estimator.name']} {value:.3f}", colours[label]))
        levels = [run.data.metrics[f"teacher/{metric}"] for run in runs if f"teacher/{metric}" in run.data.metrics]
        if levels:
            ax.axhline(levels[0], color="0.35", linestyle="--", linewidth=1.3, label="teacher", zorder=1)
        ax.set_title(title, fontsize=10.5)
        ax.set_xlabel("optimizer steps")
        ax.grid(alpha=0.25)
        write_ends(ax, ends)
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    order = [label for label in (*colours, "teacher") if label in handles]
    figure.legend([handles[label] for label in order], order, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Held-out prompts, sampled at temperature 1; bands: 95% intervals over prompts", fontsize=11)
    figure.savefig(path, dpi=200)
    print(f"wrote {path}: {len(runs)} runs")


def draw_run(ax: Axes, curve: Curve, colour: str, label: str) -> float:
    """Draw one curve with its interval; return its last value."""
    ax.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    marker = MARKERS[COLOURS.index(colour)]
    ax.plot(curve.steps, curve.mean, color=colour, marker=marker, markersize=4.5, linewidth=2, label=label)
    return curve.mean[-1]


def describe(run: Run) -> str:
    """Name a run by its estimator, the estimator's keywords and the learning rate, which set its colour."""
    section = "estimator.kwargs"
    found = {key[len(section) + 1 :]: value for key, value in run.data.params.items() if key.startswith(section)}
    parts = [run.data.params["estimator.name"], *(f"{key}={value}" for key, value in sorted(found.items()) if key)]
    return ", ".join([*parts, f"lr {float(run.data.params['optim.lr']):g}"])


def choose_colours(runs: list[Run]) -> dict[str, str]:
    """Choose the colour of every description."""
    labels = dict.fromkeys(describe(run) for run in runs)
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}


def read_curve(client: MlflowClient, run: Run, metric: str) -> Curve:
    """Read a held-out metric from a run's history; of a step logged twice, the later value counts."""
    keys = (f"val/{metric}", f"val_interval/{metric}_low", f"val_interval/{metric}_high")
    histories = [{m.step: m.value for m in client.get_metric_history(run.info.run_id, key)} for key in keys]
    steps = sorted(set.intersection(*map(set, histories)))
    return Curve(steps, *([history[step] for step in steps] for history in histories))


def write_ends(ax: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write a text beside the end of every curve; texts which would overlap stack around their common centre.

    Args:
        ax: with its curves drawn.
        ends: (value, text, colour) of every curve's end.
    """
    bottom, top = ax.get_ylim()
    gap = 0.055 * (top - bottom)
    stacks: list[list[tuple[float, str, str]]] = []
    for end in sorted(ends, key=lambda end: end[0]):
        stacks.append([end])
        while len(stacks) > 1 and heights(stacks[-1], gap)[0] < heights(stacks[-2], gap)[-1] + gap:
            stacks[-2:] = [stacks[-2] + stacks[-1]]
    for stack in stacks:
        for height, (_, text, colour) in zip(heights(stack, gap), stack, strict=True):
            ax.annotate(text, (1, height), (3, 0), ax.get_yaxis_transform(), "offset points", color=colour,
                        va="center", fontsize=9, fontweight="bold", annotation_clip=False)  # fmt: skip


def heights(stack: list[tuple[float, str, str]], gap: float) -> list[float]:
    """Heights of stacked texts, lowest first: a gap apart, around the mean of their values."""
    centre = sum(value for value, _, _ in stack) / len(stack)
    return [centre + gap * (i - (len(stack) - 1) / 2) for i in range(len(stack))]


@contextlib.contextmanager
def serve_ui(uri: str) -> Iterator[str]:
    """Serve the MLflow UI on a free local port, and stop it afterwards.

    Args:
        uri: tracking URI; a server's address is used as it is.

    Yields:
        The address of the UI.
    """
    if uri.startswith("http"):
        yield uri.rstrip("/")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--workers", "1"]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a process group of its own, so that its workers can be stopped with it
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{address}/health"), f"{' '.join(command)} does not answer")
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def answers(address: str) -> bool:
    """Say whether a web server answers there."""
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main()

"""MLflow's own pages in a headless Chromium: opened, waited for, read and photographed.

Needs ``pip install selenium`` and Debian's ``chromium`` and ``chromium-driver``. Known to work with MLflow 3.17.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WINDOW = (1500, 1000)
PATIENCE_S = 240
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-quic", "--disable-component-update", "--disable-sync"),
    # A mouse, as on a desk: else the chart tools, which a mouse brings up, cover the charts.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
)
INSTALL = "pip install selenium && apt-get install chromium chromium-driver"
# Side panels and a banner that take room; absent in some versions of MLflow.
CLUTTER = ("mlflow.assistant.chat_panel.close", "mlflow_header.toggle_sidebar_button",
           "mlflow.experiment_page.shared_view.dismiss")  # fmt: skip
# The pages for training; by default they are those for agents.
TRAINING = "workflowType=machine_learning"
VIEW = f"viewStateShareKey=lit_opd&{TRAINING}"

HEADERS = "return [...document.querySelectorAll('.ag-header-cell')].map(cell => cell.getAttribute('col-id'))"
# {run id: {column: text}}; a row is drawn in two parts, the left of which does not scroll.
ROWS = """const rows = {}, place = row => Number(row.getAttribute('row-index'));
for (const row of [...document.querySelectorAll('.ag-row[row-id]')].sort((a, b) => place(a) - place(b))) {
    const cells = [...row.querySelectorAll('.ag-cell')].map(cell => [cell.getAttribute('col-id'), cell.innerText]);
    rows[row.getAttribute('row-id')] = {...rows[row.getAttribute('row-id')], ...Object.fromEntries(cells)};
}
return rows"""
# {title: {run id: [xs, ys]}} of every chart whose lines are on the page.
CHARTS = """const charts = {};
for (const card of document.querySelectorAll('[data-testid=experiment-view-compare-runs-card]')) {
    const plot = card.querySelector('.js-plotly-plot'), drawn = card.querySelectorAll('.scatterlayer path.js-line');
    const lines = plot && plot.data && drawn.length >= plot.data.length ? plot.data : [];
    charts[card.querySelector('h4').title] = Object.fromEntries(lines.map(line => [line.uuid, [line.x, line.y]]));
}
return charts"""
# Beside a file's name MLflow tells its path on the machine that serves it: no reader of a picture has that machine.
HIDE_PATH = """for (const line of document.querySelectorAll('div[title]')) {
    if (line.innerText.startsWith('Path: ')) { line.parentElement.style.visibility = 'hidden' }
}"""
CELLS = """return [...document.querySelectorAll('[role=row]')].map(
    row => [...row.querySelectorAll('[role=columnheader], [role=cell]')].map(cell => cell.innerText))"""


def missing() -> str | None:
    """What lacks for a browser, and how to get it; None where nothing does."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if importlib.util.find_spec("selenium") is None:
        lacking.append("selenium")
    return f"no {', '.join(lacking)}: {INSTALL}" if lacking else None


@contextlib.contextmanager
def open_pages(address: str) -> Iterator[Pages]:
    """A headless Chromium on the pages of a server, closed afterwards.

    Raises:
        SystemExit: selenium, the browser or its driver is missing.
    """
    lacking = missing()
    if lacking:  # selenium would go and download them
        raise SystemExit(f"Pages need a browser: {lacking}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in FLAGS:
        options.add_argument(flag)
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield Pages(chrome, address)
    finally:
        chrome.quit()


def wait_for(condition: Callable[[], Any], complaint: str) -> Any:
    """Ask every half second until the answer is true; returns it.

    Raises:
        SystemExit: it is not within `PATIENCE_S`.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"{complaint} (waited {PATIENCE_S} s).")
        time.sleep(0.5)
    return answer


class Pages:
    """What a user does on MLflow's pages, and sees there.

    Args:
        chrome: the browser.
        address: of the server.
    """

    def __init__(self, chrome: Any, address: str) -> None:
        self.chrome, self.address = chrome, address
        self.resize(*WINDOW)

    def resize(self, width: int, height: int) -> None:
        """Give the page another size; a window's size would count a frame that is not shown."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def open_table(self, experiment: str) -> dict[str, dict[str, str]]:
        """Open an experiment's runs in the saved view; {run id: {column: text}} of what shows."""
        self._open(f"experiments/{experiment}/runs?{VIEW}")
        return self._settled(lambda: self.run(ROWS) if len(self.run(HEADERS)) > 3 else None, "no table of runs")

    def columns(self) -> list[str]:
        """The columns of the table that show, from left to right."""
        return self.run(HEADERS)

    def select(self, runs: list[str]) -> None:
        """Tick runs in the table."""
        for run in runs:
            self._click(f".ag-row[row-id='{run}'] .ag-selection-checkbox input")

    def compare(self) -> str:
        """Press Compare; the text of the page that it opens."""
        self._click("[data-testid='runs-compare-button']")
        wait_for(lambda: "Show diff only" in self.text(), "Compare opens no comparison")
        return self.text()

    def open_charts(self, experiment: str) -> dict[str, dict[str, list[list[float]]]]:
        """Open an experiment's charts in the saved view; {title: {run id: [xs, ys]}} when all are drawn."""
        self._open(f"experiments/{experiment}/runs?{VIEW}&compareRunsMode=CHART")

        def drawn() -> dict[str, dict[str, list[list[float]]]] | None:
            found = self.run(CHARTS)
            return found if found and all(found.values()) else None

        return self._settled(drawn, "charts are not drawn")

    def open_artifact(self, experiment: str, run: str, name: str) -> list[list[str]]:
        """Open a table among a run's artifacts; its rows, of which the first are the names of the columns."""
        self._open(f"experiments/{experiment}/runs/{run}/artifacts?{TRAINING}")
        file = f"//*[normalize-space(text())='{name}']"
        wait_for(lambda: self.chrome.find_elements("xpath", file), f"no artifact {name}")[0].click()
        return self._settled(lambda: self.run(CELLS), f"{name} is no table")

    def open_models(self, experiment: str) -> str:
        """Open the table of models of an experiment; the text of the page."""
        self._open(f"experiments/{experiment}/models?{TRAINING}")
        return self._settled(lambda: "Source run" in self.text() and self.text(), "no table of models")

    def run(self, script: str) -> Any:
        """Evaluate a script on the page."""
        return self.chrome.execute_script(script)

    def text(self) -> str:
        """All text of the page."""
        return self.run("return document.body.innerText")

    def photograph(self, path: Path) -> None:
        """Write what shows to a PNG file, but for paths of this machine."""
        self.run("document.activeElement.blur()")
        self.run(HIDE_PATH)
        self.chrome.save_screenshot(str(path))

    def _open(self, page: str) -> None:
        self.chrome.get("about:blank")  # or the page would be the one that is open, with other words behind its #
        self.chrome.get(f"{self.address}/#/{page}")

    def _click(self, selector: str) -> None:
        wait_for(lambda: self.chrome.find_elements("css selector", selector), f"no {selector}")[0].click()

    def _settled(self, read: Callable[[], Any], complaint: str) -> Any:
        """What `read` finds once the clutter is gone and two readings a second apart agree."""

        def twice() -> Any:
            closed = [button.click() for name in CLUTTER
                      for button in self.chrome.find_elements("css selector", f"[data-component-id='{name}']")
                      if name != CLUTTER[1] or self._sidebar_is_wide()]  # fmt: skip
            before = None if closed else read()
            if not before:
                return None
            time.sleep(1)
            return before if read() == before else None

        return wait_for(twice, complaint)

    def _sidebar_is_wide(self) -> bool:
        return "Model training" in self.text()

"""Runs the code blocks of a Markdown document, as a reader would, one after another in one folder.

What a fence says after the backticks decides: `bash` and `python` run; `python file=NAME` and `yaml file=NAME` write a
file; `bash server` starts a command, waits until the address it prints answers, and stops it; everything else is only
read. `text output` quotes what a command before it prints: tests/test_docs.py compares. `name=NAME` lets a block be run
alone or left out.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
SERVER_SECONDS = 90


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the words and settings behind it, its code."""

    language: str
    words: tuple[str, ...]
    settings: dict[str, str]
    code: str


def blocks_of(document: Path) -> list[Block]:
    """All fenced blocks of a document, in order."""
    blocks = []
    for language, info, code in FENCE.findall(document.read_text()):
        words = info.split()
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        blocks.append(Block(language, tuple(w for w in words if "=" not in w), settings, code))
    return blocks


def run_block(block: Block, folder: Path) -> None:
    """Run or write one block in a folder.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    if "file" in block.settings:
        (folder / block.settings["file"]).write_text(block.code)
    elif block.language == "bash" and "server" in block.words:
        _run_server(block.code, folder)
    elif block.language == "bash":
        subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], cwd=folder, check=True)
    elif block.language == "python":
        subprocess.run(["python", "-c", block.code], cwd=folder, check=True)


def _run_server(code: str, folder: Path) -> None:
    found = re.search(r"--port (\d+)", code)
    address = f"http://127.0.0.1:{found.group(1) if found else 5000}"
    server = subprocess.Popen(["bash", "-c", code], cwd=folder, start_new_session=True)
    try:
        _wait_for(address, server)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise subprocess.CalledProcessError(server.returncode, server.args)
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise TimeoutError(f"{address} did not answer within {SERVER_SECONDS} seconds")


def main() -> None:
    """Run, or with --print show, the chosen blocks of a document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("document", type=Path)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where to run, default: here")
    parser.add_argument("--only", action="append", help="names of the blocks to run")
    parser.add_argument("--skip", action="append", default=[], help="names of blocks to leave out")
    parser.add_argument("--print", action="store_true", help="print the code instead of running it")
    arguments = parser.parse_args()
    blocks = blocks_of(arguments.document)
    missing = {*(arguments.only or []), *arguments.skip} - {b.settings.get("name") for b in blocks}
    if missing:
        parser.error(f"{arguments.document} has no block named {', '.join(sorted(missing))}")
    for block in blocks:
        name = block.settings.get("name")
        if (arguments.only and name not in arguments.only) or name in arguments.skip:
            continue
        if arguments.print:
            print(block.code, end="")
            continue
        if block.language in ("bash", "python") or "file" in block.settings:
            print(f"--- {block.language} {name or ''}\n{block.code}", flush=True)
            run_block(block, arguments.folder)


if __name__ == "__main__":
    main()

"""MLflow's pages, served for real."""

import json
import signal
import socket
import time
import urllib.error
import urllib.request

import pytest

from lit_opd import load_config
from lit_opd.commands.ui import serve
from lit_opd.errors import UserError


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(address, process):
    """What an address answers, once it does."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer from {address}: {process.communicate(timeout=10)}")


@pytest.mark.slow
def test_the_pages_of_a_store_until_ctrl_c(workspace):
    workspace.client.create_experiment("seen in the browser")
    port = free_port()
    process = workspace.start(*workspace.arguments("ui", "--port", str(port)), python=workspace.python)
    try:
        assert "<title>MLflow</title>" in ask(f"http://127.0.0.1:{port}", process)
        found = ask(f"http://127.0.0.1:{port}/ajax-api/2.0/mlflow/experiments/search?max_results=10", process)
        assert "seen in the browser" in {e["name"] for e in json.loads(found)["experiments"]}
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5)


def test_a_port_that_is_taken_is_told_in_a_line(workspace):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = workspace.run(*workspace.arguments("ui", "--port", port))
    assert done.returncode == 2
    assert (
        done.stderr == f"error: --port: expected a free port, found {port}: Address already in use. Choose another.\n"
    )


def test_a_store_with_a_server_of_its_own_needs_none():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        config = load_config([], [f"tracking.uri=http://127.0.0.1:{server.getsockname()[1]}", "student.path=a",
                                  "teacher.path=b"])  # fmt: skip
        with pytest.raises(UserError, match="expected a store without a server of its own"):
            serve(config, 5000)

"""Serve MLflow's own pages on the runs of a configuration, for this machine alone.

The command line calls it for `ui`, so that nobody has to spell the address of the store.
"""

from __future__ import annotations

import os
import socket
import sys

from lit_opd.config import Config
from lit_opd.errors import UserError
from lit_opd.tracking import check_tracking, need_store

__all__ = ["serve"]


def serve(config: Config, port: int) -> None:
    """Become `mlflow ui` on the configured store and a port of 127.0.0.1, which runs until it is interrupted."""
    uri = need_store(config.tracking.uri, "show its pages")
    if uri.startswith("http"):
        raise UserError("tracking.uri", "a store without a server of its own", repr(uri), f"Open {uri} in a browser.")
    check_tracking(uri)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UserError(
                "--port", "a free port", f"{port}: {getattr(error, 'strerror', error)}", "Choose another."
            ) from error
    print(f"http://127.0.0.1:{port}", flush=True)
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # and no argument, which everybody on the machine can read
    command = ["-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, *command, "--workers", "1"])  # one reader needs one; it starts sooner

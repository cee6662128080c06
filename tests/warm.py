"""Start Python programs in processes that have torch, Lightning, transformers and MLflow imported already.

Importing them takes ten seconds of a command, and the tests run nearly a hundred commands. A server imports them once
and forks a process for every program. `FOLDER/python` stands for the interpreter: it hands its arguments, environment,
folder and standard streams to the server, passes Ctrl-C and SIGTERM on to all processes of the program, and ends as the
program does. Nothing of lit_opd is imported before the fork. Where the client is killed, the server kills the program.
The workers of pytest-xdist share one server. A test that looks at imports or children starts `sys.executable` itself.
"""

import array
import contextlib
import fcntl
import gc
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

PYTHON = sys.executable
LIBRARIES = ("git", "omegaconf", "torch._dynamo", "lightning.pytorch.loggers.mlflow", "matplotlib.backends.backend_agg",
             "mlflow.store.tracking.sqlalchemy_store", "transformers.models.llama.modeling_llama")  # fmt: skip

# It runs once for every program, so it imports nothing that is slow.
CLIENT = """#!{python} -SEs
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
answers = server.makefile("r")
streams = array.array("i", [0, 1, 2])
server.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\\n")
program = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.killpg(program, number))
status = int(answers.readline())
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@contextlib.contextmanager
def shared_server(note: Path) -> Iterator[Path]:
    """Give the folder of a `python` whose server all processes share that name this note; the last to go ends it."""
    turn = note.with_suffix(".turn")
    with note.with_suffix(".users").open("a") as users:
        with in_turn(turn):
            if is_alone(users):
                # Not in the folder of the note: the address of a socket is to have no more than a hundred letters.
                folder = Path(tempfile.mkdtemp())
                note.write_text(f"{start_server(folder)} {folder}")
            fcntl.flock(users, fcntl.LOCK_SH)
            number, _, folder_name = note.read_text().partition(" ")
        yield Path(folder_name)
        with in_turn(turn):
            if is_alone(users):
                os.kill(int(number), signal.SIGKILL)
                shutil.rmtree(folder_name)


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Wait until no other process is in such a block with this file."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_alone(users: TextIO) -> bool:
    """Tell whether no other process uses a server, by the lock that every user holds."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def start_server(folder: Path) -> int:
    """Write the `python` of a folder and start its server, which lives until it is killed; returns its number."""
    address, client = folder / "socket", folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    client.chmod(0o755)
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, __file__, str(address)], stdout=log, stderr=log)
    while not address.exists():
        assert server.poll() is None, (folder / "server.log").read_text()
        time.sleep(0.05)
    return server.pid


def serve(address: str) -> None:
    """Import the libraries, then fork for every client, and return in the processes that became a program."""
    gc.disable()
    # torch would import it, and its bindings print what is left of them when a program ends without collecting it.
    sys.modules["triton"] = None  # type: ignore[assignment]
    for name in LIBRARIES:
        __import__(name)
    del sys.modules["triton"]
    gc.enable()
    gc.freeze()  # or every program that ends spends seconds on collecting what it never touched
    if sys.dont_write_bytecode:  # or every program compiles lit_opd anew; beside the source nothing is written
        sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(address).with_name("compiled"))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that talk to a client
    with socket.socket(socket.AF_UNIX) as listening:
        # The file appears under its name once the server listens.
        listening.bind(f"{address}.new")
        listening.listen()
        os.rename(f"{address}.new", address)
        while True:
            client, _ = listening.accept()
            if not os.fork():
                break
            client.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with client:
        _, ((_, _, streams),), _, _ = client.recvmsg(1, socket.CMSG_SPACE(3 * 4))
        arguments, folder, environment = json.loads(client.makefile().readline())
        program = os.fork()
        if program:
            client.sendall(f"{program}\n".encode())
            threading.Thread(target=kill_with, args=(client, program), daemon=True).start()
            status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
            client.sendall(f"{status}\n".encode())
            os._exit(0)
    become(folder, environment, array.array("i", streams))
    sys.executable = str(Path(address).parent / "python")  # what a program starts is warm as well
    run(arguments)


def kill_with(client: socket.socket, program: int) -> None:
    """Kill a program whose client is gone."""
    if not client.recv(1):
        os.kill(program, signal.SIGKILL)


def become(folder: str, environment: dict[str, str], streams: array.array) -> None:
    """Take over a client's folder, environment and standard streams, in a session of its own."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(arguments: list[str]) -> None:
    """Run `-m MODULE`, `-c CODE` or a file, as the interpreter would; it runs what starts otherwise."""
    first, *rest = arguments
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if first == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif not first.startswith("-"):
        sys.path[0], sys.argv = str(Path(first).resolve().parent), arguments
        runpy.run_path(first, run_name="__main__")
    else:
        os.execv(PYTHON, [PYTHON, *arguments])


if __name__ == "__main__":
    serve(sys.argv[1])

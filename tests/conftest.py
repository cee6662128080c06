"""Settings of the processes that run tests. Their fixtures are in tests/shared_fixtures.py."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

# Without an accelerator kernels are interpreted. Triton reads this when it is imported, which a folder's own
# conftest.py may do before anything here is called.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
# Without an answer huggingface_hub tries again for 45 seconds. It reads this when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config):
    """Load the fixtures, but for the process that only hands tests to workers: imports take it ten seconds."""
    worker = getattr(config, "workerinput", None)
    if worker is None and config.getoption("numprocesses", 0):
        return
    gc.disable()
    config.pluginmanager.import_plugin("shared_fixtures")
    choose_examples()
    if worker:
        share_processors(worker["workercount"])


def pytest_xdist_auto_num_workers(config):
    """One worker more than processors: tests wait for servers, browsers and programs."""
    return os.cpu_count() + 1


def pytest_collection_modifyitems(items):
    """Begin with the files that hold slow tests, or one worker is at such a test when the others are through."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Collect garbage of the tests alone: libraries and tests are a million objects that stay, a second each time."""
    leave_kernels_to_their_tests()
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    """Free what was frozen: Triton's bindings count what is left when the process ends, and print it."""
    gc.unfreeze()
    gc.collect()


def leave_kernels_to_their_tests():
    """Have kernels made to be interpreted, and interpreted where a test asks for `interpreted` alone.

    Every run that a test starts would prove and time them so, which takes seconds.
    """
    if "torch" in sys.modules and importlib.util.find_spec("triton"):
        for file in sorted((Path(__file__).parents[1] / "lit_opd/kernels").glob("[a-z]*.py")):
            importlib.import_module(f"lit_opd.kernels.{file.stem}")
    os.environ.pop("TRITON_INTERPRET", None)


def choose_examples():
    """Draw the same examples for property tests every time, or with `HYPOTHESIS_PROFILE=search` others each time.

    What a search finds becomes an `@example` of that test.
    """
    import hypothesis

    hypothesis.settings.register_profile("gate", derandomize=True, deadline=None)
    hypothesis.settings.register_profile("search", print_blob=True, deadline=None)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))


def share_processors(workers):
    """Share the processors among the workers of pytest-xdist: torch would start as many threads in each."""
    import torch

    threads = max(1, os.cpu_count() // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start
    torch.set_num_threads(threads)

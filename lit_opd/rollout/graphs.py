"""Capture a token's work as a CUDA graph, which starts all its kernels at once.

A captured graph repeats kernels with the addresses and numbers they had: what it reads and writes must stay where it
is, and Python does not run again. `CapturedWriter` keeps to that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CudaRecorder", "Recorder", "Run", "question"]

Run = Callable[[], Tensor]


class _AsksHost(Exception):
    """Raised at an operation that no graph can hold."""


class _Listening(TorchDispatchMode):
    """Ends at an operation that waits for numbers of the device, or brings numbers of the host to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, indices = func.overloadpacket.__name__, args[1] if len(args) > 1 and isinstance(args[1], list) else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices if torch.is_tensor(index))
        shapes = torch.Tag.dynamic_output_shape in func.tags and not (name == "index" and not by_mask)
        # A number of the host is an argument of a kernel. More of them are a tensor, whose copy waits.
        moved = (kwargs or {}).get("device") or args[0].device if name == "_to_copy" else None
        brought = name == "lift_fresh" and args[0].dim() > 0 or moved and moved.type != args[0].device.type
        if shapes or brought or torch.Tag.data_dependent_output in func.tags or name.startswith("index") and by_mask:
            raise _AsksHost(name)
        return func(*args, **(kwargs or {}))


def question(run: Run) -> str | None:
    """Name the first operation of a function that asks the host, which no graph can hold, None where none does."""
    try:
        with _Listening():
            run()
    except _AsksHost as asked:
        return str(asked)
    return None


class Recorder(Protocol):
    """Captures what a function does on a device, so that it can be replayed. All its graphs share their memory."""

    def __init__(self, device: torch.device) -> None: ...

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """Say why nothing can be captured on a device, None where it can."""
        ...

    def warm_up(self, run: Run) -> Tensor:
        """Run a function once, uncaptured, which libraries need before they can be captured."""
        ...

    def capture(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        """Record a function without doing what it does, and return what replays it, and the tensor it then fills."""
        ...


class CudaRecorder:
    """The recorder of CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        # One stream for warming up and capturing, for cuBLAS makes its workspace at the first product on a stream.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """See `Recorder.why_not`."""
        return None if device.type == "cuda" else f"there are no CUDA graphs on {device.type}"

    def warm_up(self, run: Run) -> Tensor:
        """See `Recorder.warm_up`."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            made = run()
        current.wait_stream(self._stream)
        made.record_stream(current)
        return made

    def capture(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        """See `Recorder.capture`."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        try:
            # Other threads may allocate meanwhile: a data loader pins memory, a server's answers arrive.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                made = run()
        finally:
            torch.cuda.set_stream(current)  # torch 2.11 stays on the stream of the capture where that fails
        return graph.replay, made

"""Kernels in Triton for what torch would do in many passes, each beside a plain function that computes the same.

No other room may be imported here. The rooms that compute (`functional`, `models`, `rollout`) call a kernel where its
proof was passed (`lit_opd.fast_paths`).
"""

from __future__ import annotations

import importlib.util
import os

import torch

__all__ = ["why_not"]


def why_not(device: torch.device) -> str | None:
    """Say why no kernel runs on a device, None where kernels run.

    On a CPU they run under `TRITON_INTERPRET=1`, slowly, which tests do.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"kernels do not run on {device.type}"
    return None

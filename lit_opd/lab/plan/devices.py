"""Know the memory of devices: of this one, and by name of those that people rent or own.

`plan` asks before any weight loads, so that a run can be planned on another machine than the one that it will run on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from lit_opd.errors import UserError, suggest

__all__ = ["DEVICES", "Device", "find_device"]

# Memory in GB of 10^9 bytes and bandwidth in GB/s, as the vendors' data sheets state them. What CUDA reports differs by
# up to 6 per cent, to either side: an H100 of 80 GB has 85.0 x 10^9 bytes, an L40S with error correction 47.7 x 10^9.
DEVICES = {
    "b200-180gb": (180, 8000),  # NVIDIA DGX B200 data sheet: 1,440 GB and 64 TB/s of eight
    "h200-141gb": (141, 4800),  # NVIDIA H200 Tensor Core GPU data sheet
    "h100-80gb": (80, 3350),  # NVIDIA H100 Tensor Core GPU data sheet, SXM
    "h100-pcie-80gb": (80, 2000),  # the same, PCIe
    "h100-nvl-94gb": (94, 3900),  # the same, NVL
    "a100-80gb": (80, 2039),  # NVIDIA A100 80GB data sheet, SXM
    "a100-40gb": (40, 1555),  # NVIDIA A100 data sheet
    "l40s-48gb": (48, 864),  # NVIDIA L40S data sheet
    "l4-24gb": (24, 300),  # NVIDIA L4 data sheet
    "a10g-24gb": (24, 600),  # NVIDIA A10 data sheet; Amazon's A10G has the same memory
    "rtx-6000-ada-48gb": (48, 960),  # NVIDIA RTX 6000 Ada data sheet
    "rtx-5090-32gb": (32, 1792),  # NVIDIA GeForce RTX 5090 specifications
    "rtx-4090-24gb": (24, 1008),  # NVIDIA GeForce RTX 4090 specifications
    "rtx-3090-24gb": (24, 936),  # NVIDIA GeForce RTX 3090 specifications
    "mi300x-192gb": (192, 5300),  # AMD Instinct MI300X data sheet
}
# What CUDA's context, its libraries' workspaces and the allocator's gaps take beside tensors.
_CONTEXT, _GAPS = 1.0e9, 0.03


@dataclass(frozen=True)
class Device:
    """A device to plan for.

    Attributes:
        name: of the table, or what this machine calls it.
        memory: bytes.
        bandwidth: bytes a second; None where it is not known.
        accelerated: it is no CPU.
    """

    name: str
    memory: float
    bandwidth: float | None
    accelerated: bool = True

    @property
    def usable(self) -> float:
        """Bytes for tensors: what is left beside the context and the gaps between them."""
        return max(0.0, (self.memory - _CONTEXT) * (1 - _GAPS)) if self.accelerated else self.memory * (1 - _GAPS)


def find_device(name: str | None) -> Device:
    """Find a device by its name, or this machine's accelerator, or its main memory where it has none.

    Raises:
        UserError: an unknown name.
    """
    if name is not None:
        if name.lower() not in DEVICES:
            raise UserError("--device", "a device that is known", repr(name), suggest(name, DEVICES))
        memory, bandwidth = DEVICES[name.lower()]
        return Device(name.lower(), memory * 1e9, bandwidth * 1e9)
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        known = found.name.lower().replace(" ", "-")
        rate = next((rate for key, (_, rate) in DEVICES.items() if key.rpartition("-")[0] in known), None)
        return Device(found.name, found.total_memory, None if rate is None else rate * 1e9)
    return Device("this machine's main memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None, False)

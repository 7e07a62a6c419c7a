"""What every launch shares: programmatic dependent launch (PDL), which the interpreter does not have.

With PDL a kernel may start while the one before it drains. Each of our kernels first waits for its predecessor's
results and then lets its successor start, so a kernel never reads or overwrites what an earlier one still uses: a kernel
that has waited knows that all kernels before it are complete.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .contract import INTERPRETED
from .tuning import Tile

USE_PDL = not INTERPRETED
LAUNCH_OPTIONS = {"launch_pdl": True} if USE_PDL else {}


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Launch on this device's current stream, whichever device is current for the caller."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait for the previous kernel on the stream and let the next one start to wait for this one."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def persistent_programs(num_units: int, tile: Tile, device: torch.device) -> int:
    """Programs of a persistent kernel: as many as the GPU holds at once, and no more than there may be units."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return min(num_units, num_sms * tile.programs_per_sm)

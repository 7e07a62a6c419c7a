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

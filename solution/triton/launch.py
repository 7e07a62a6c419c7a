"""How every kernel is launched: programmatic dependent launch (PDL), and a short way past Triton's launcher.

With PDL a kernel may start while the one before it drains. Each of our kernels first waits for its predecessor's
results and then lets its successor start, so a kernel never reads or overwrites what an earlier one still uses: a
kernel that has waited knows that all kernels before it are complete. The interpreter has no PDL.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .contract import INTERPRETED

USE_PDL = not INTERPRETED
_OPTIONS = {"launch_pdl": True} if USE_PDL else {}
_compiled: dict[tuple, triton.compiler.CompiledKernel] = {}


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Launch on this device's current stream, whichever device is current for the caller."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch(device: torch.device, kernel: triton.JITFunction, grid: tuple[int, ...], *arguments: object,
           num_warps: int, max_registers: int | None = None, **constants: int) -> None:
    """Launch kernel(*arguments, *constants, PDL) on the device's current stream.

    Triton's own launcher examines every argument on every call to pick a specialisation. Here nothing that it looks at
    can change under one key: `check_arguments` demands aligned tensors of fixed dtypes, scratch is aligned, and the
    kernels leave their integers unspecialised. So only the first launch goes through it.

    Args:
        grid: one to three sizes.
        arguments: the kernel's run-time arguments, in order.
        constants: its constexpr parameters but the last, PDL, in order.
    """
    key = (kernel, device, num_warps, max_registers, *constants.values())
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*arguments, *constants.values(), USE_PDL)
        return
    expected = kernel.arg_names[len(arguments):]
    if expected != [*constants, "PDL"]:
        raise ValueError(f"constants: expected {expected[:-1]}, got {list(constants)}")
    compiled = kernel[grid](*arguments, **constants, PDL=USE_PDL, num_warps=num_warps,
                            maxnreg=max_registers, **_OPTIONS)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait for the previous kernel on the stream and let the next one start to wait for this one."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

"""How every kernel is launched: programmatic dependent launch (PDL), and a short way past Triton's launcher.

With PDL a kernel may start while the one before it runs: once all programs of that one have let it (the trigger). Each
of our kernels waits for its predecessor to be complete before it reads what that one writes and before it writes
anything, and none ends without having waited, so a kernel that has waited knows that all before it are complete. Most
let their successor start only after their own wait: then the successor knows, even before its wait, that the kernels
before its predecessor are complete. The interpreter has no PDL.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver

from .contract import INTERPRETED

USE_PDL = not INTERPRETED
_OPTIONS = {"launch_pdl": True} if USE_PDL else {}
_compiled: dict[tuple, triton.compiler.CompiledKernel] = {}


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Launch on this device's current stream, whichever device is current for the caller."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def launch(device: torch.device, kernel: triton.JITFunction, grid: tuple[int, int], *arguments: object,
           num_warps: int, max_registers: int | None = None, **constants: int) -> None:
    """Launch kernel(*arguments, *constants, PDL) on the device's current stream.

    Triton's own launcher examines every argument on every call to pick a specialisation. Here nothing that it looks at
    can change under one key: `check_arguments` demands aligned tensors of fixed dtypes, scratch is aligned, and the
    kernels leave their integers unspecialised. So only the first launch goes through it; later ones call the compiled
    kernel as it would (Triton 3.6), but for its profiling hooks. A pointer may be an address: it costs the host neither
    a tensor nor the launcher's query of it, and the kernel's annotation says what it points to.

    Args:
        grid: two sizes.
        arguments: the kernel's run-time arguments, in order.
        constants: its constexpr parameters but the last, PDL, in order.
    """
    key = (kernel.fn, device, num_warps, max_registers, *constants.values())
    compiled = _compiled.get(key)
    if compiled is not None:
        stream = driver.active.get_current_stream(device.index)
        compiled.run(*grid, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
                     *arguments, *constants.values(), USE_PDL)
        return
    expected = kernel.arg_names[len(arguments):]
    if expected != [*constants, "PDL"]:
        raise ValueError(f"constants: expected {expected[:-1]}, got {list(constants)}")
    compiled = kernel[grid](*arguments, **constants, PDL=USE_PDL, num_warps=num_warps, maxnreg=max_registers,
                            **_OPTIONS)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait for the previous kernel on the stream and let the next one start to wait for this one."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def pdl_trigger(PDL: tl.constexpr):
    """Let the next kernel start before this one has waited: what that one does ahead of its own wait must need nothing
    that this one's predecessors write."""
    if PDL:
        gdc_launch_dependents()

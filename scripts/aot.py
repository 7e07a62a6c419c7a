"""Compile every kernel ahead of time, for GPUs that need not be there, and report what the compiler spent.

The launches are recorded by calling `run()` with tensors that have no storage.

Usage: python -m scripts.aot [--target 90 100] [--json]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, mangle_type

from solution.triton import contract, tuning
from solution.triton import main as main_module

TARGETS = (90, 100)
NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: JITFunction
    arguments: dict[str, object]
    options: dict[str, object]

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rsplit('.', 1)[-1]}.{self.kernel.fn.__name__}"


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one target."""

    registers: int  # per thread
    spill_bytes: int  # stores and loads per thread
    shared_bytes: int  # per program
    num_warps: int
    tensor_core: str  # the instructions that the float8 / float16 products became


def record_launches(num_tokens: int, capability: tuple[int, int]) -> list[Launch]:
    """Return the launches of one call of `run()` with T tokens on a GPU of that capability, in order."""
    inputs = {
        name: torch.empty([num_tokens if size == "T" else size for size in shape], dtype=dtype, device="meta")
        for name, (shape, dtype) in contract.TENSORS.items()
    }
    launches = []

    def record(kernel: JITFunction, *args: object, grid: tuple, warmup: bool, **kwargs: object) -> None:
        names = kernel.arg_names
        arguments = dict(zip(names, args)) | {name: value for name, value in kwargs.items() if name in names}
        launches.append(Launch(kernel, arguments, {k: v for k, v in kwargs.items() if k not in names}))

    gpu = mock.patch.object(main_module, "gpu_properties", lambda device: (132, capability))
    with gpu, mock.patch.object(JITFunction, "run", record):
        main_module.run(**inputs, local_expert_offset=0, routed_scaling_factor=1.0)
    return launches


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile for a compute capability (90, 100) as the launcher would for 16-byte aligned tensors."""
    params = launch.kernel.params
    constexprs = {p.name: launch.arguments[p.name] for p in params if p.is_constexpr}
    signature = {
        p.name: "constexpr" if p.is_constexpr else p.annotation_type or mangle_type(launch.arguments[p.name])
        for p in params
    }
    attrs = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(params) if signature[p.name].startswith("*")}
    source_type = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = source_type(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    ptx = compiled.asm["ptx"]
    log = _ptxas(ptx, capability)
    found = sorted(set(re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", ptx)))
    return Resources(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        shared_bytes=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        tensor_core=" ".join(found),
    )


def _ptxas(ptx: str, capability: int) -> str:
    assembler = NVIDIA_BIN / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name=sm_{capability}a", source, "-o", Path(folder) / "kernel.cubin"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def compile_all(targets: tuple[int, ...] = TARGETS) -> Iterator[tuple[int, int, str, Resources]]:
    """Yield (capability, T, kernel, resources) for every kernel at T = 1 and at each config's last T."""
    for capability in targets:
        for num_tokens in (1, *(config.max_tokens for config in tuning.TABLES[capability // 10])):
            for launch in record_launches(num_tokens, divmod(capability, 10)):
                yield capability, num_tokens, launch.name, compile_launch(launch, capability)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--json", action="store_true", help="print one list of records instead of the table")
    arguments = parser.parse_args()
    progress = track(compile_all(tuple(arguments.target)), "compiling", console=Console(stderr=True))
    records = [
        {"capability": capability, "num_tokens": num_tokens, "kernel": name, **asdict(resources)}
        for capability, num_tokens, name, resources in progress
    ]
    if arguments.json:
        print(json.dumps(records, indent=2))
        return
    table = Table("sm", "T", "kernel", "registers", "spilled B", "shared B", "warps", "products")
    for record in records:
        table.add_row(*map(str, record.values()))
    Console().print(table)


if __name__ == "__main__":
    main()

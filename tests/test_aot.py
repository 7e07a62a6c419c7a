"""Every kernel of every config, compiled ahead of time for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from scripts.pack import ROOT
from solution.triton import tuning

PRODUCTS = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
MAX_SHARED_BYTES = 227 * 1024  # of a program, on both
MAX_REGISTERS_PER_SM = 65_536


@pytest.fixture(scope="module", params=PRODUCTS)
def compiled(request):
    """(compute capability, one record a kernel); in a process of its own, which a compiler error may end."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "scripts.aot", "--target", str(request.param), "--json"]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return request.param, json.loads(finished.stdout)


def test_every_stage_of_every_config(compiled):
    """A launch that the recording misses would go untested."""
    capability, records = compiled
    for row in tuning.TABLES[capability // 10]:
        kernels = {record["kernel"] for record in records if record["num_tokens"] == row.max_tokens}
        gemms = {f"gemm1_swiglu._{row.kernels}_kernel", f"gemm2._{row.kernels}_kernel"}
        if row.fusion:
            gemms = {"fused_gemms._fused_kernel"}
        if row.kernels == "hopper":
            gemms = {"hopper_gemm1._gemm1_kernel", "hopper_gemm2._gemm2_kernel"}
        later = {kernel for kernel in kernels if not kernel.startswith("routing.")}
        assert later == {"finalize._finalize_kernel", *gemms}
        assert {"routing._top_k_kernel", "routing._lists_kernel"} <= kernels


def test_nothing_spills(compiled):
    """Registers that do not fit go through memory in the inner loop."""
    assert [record for record in compiled[1] if record["spill_bytes"]] == []


def test_programs_fit_an_sm(compiled):
    """A program that needs more than an SM has fails at its first launch."""
    for record in compiled[1]:
        assert record["shared_bytes"] <= MAX_SHARED_BYTES, record
        assert record["registers"] * record["num_warps"] * 32 <= MAX_REGISTERS_PER_SM, record


def test_products_use_the_tensor_cores(compiled):
    """Small or odd tiles silently fall back to mma.sync at a fraction of the rate."""
    capability, records = compiled
    for record in records:
        if "gemm" in record["kernel"]:
            assert record["tensor_core"] == PRODUCTS[capability], record

"""The floor of a workload: the time that no implementation can beat on the GPU at hand.

`floor = max(bytes / read bandwidth, FLOPs / fp8 rate)`. Both ceilings are measured, not taken from a data sheet.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from scripts.workloads import KEPT_GROUPS, NUM_EXPERTS, NUM_GROUPS, NUM_LOCAL_EXPERTS, TOP_K
from solution.triton.contract import HIDDEN_SIZE as H
from solution.triton.contract import INTERMEDIATE_SIZE as I  # noqa: E741 - named as in the definition
from solution.triton.contract import SCALE_BLOCK

READ_BYTES = 4 * 2**30  # some 30 times the largest L2 (B200: 126 MB)
READ_BLOCK = 8192  # float32 elements a program: 32 KB, eight 16-byte loads in flight a thread
FP8_DIM = 8192


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of one GPU: bytes/s read from its memory, FLOP/s of a dense fp8 product."""

    read_bytes_per_s: float
    fp8_flops_per_s: float


def measure_ceilings(device: str = "cuda") -> Ceilings:
    """Measure both ceilings (median of 20, about a tenth of a second). Needs 5 GB of free GPU memory."""
    return Ceilings(_read_bandwidth(device), _fp8_rate(device))


def floor_us(num_tokens: int, rows: int, active_experts: int, ceilings: Ceilings) -> float:
    """Floor in microseconds of a call with `rows` (token, local expert) pairs on `active_experts` local experts."""
    memory_s = bytes_moved(num_tokens, active_experts) / ceilings.read_bytes_per_s
    compute_s = flops(rows) / ceilings.fp8_flops_per_s
    return max(memory_s, compute_s) * 1e6


def bytes_moved(num_tokens: int, active_experts: int) -> int:
    """Bytes that have to cross the memory bus: each active expert's fp8 weights and float32 block scales once; for
    each token its fp8 activations, their float32 scales, its float32 logits, and the bfloat16 output written."""
    token = H + 4 * (H // SCALE_BLOCK) + 4 * NUM_EXPERTS + 2 * H
    return weight_bytes(active_experts) + num_tokens * token


def weight_bytes(active_experts: int, matrices: int = 3) -> int:
    """Bytes of `matrices` of the three H x I matrices (up, gate, down) of each active expert, block scales included."""
    return active_experts * matrices * (H * I + 4 * (H // SCALE_BLOCK) * (I // SCALE_BLOCK))


def flops(rows: int, matrices: int = 3) -> int:
    """FLOPs of `rows` (token, local expert) pairs: two for each weight of `matrices` matrices."""
    return rows * matrices * 2 * H * I


def local_rows(routing_logits: torch.Tensor, routing_bias: torch.Tensor, offset: int) -> tuple[int, int]:
    """Count a workload's (token, local expert) pairs and its local experts with at least one of them.

    routing_logits: [T, 256] float32; routing_bias: [256] bfloat16; offset: first global expert of this rank.
    The routing is DeepSeek-V3's: top 4 of 8 groups by the sum of their two best biased scores, then the top 8.
    """
    biased = routing_logits.float().sigmoid() + routing_bias.float()
    grouped = biased.view(-1, NUM_GROUPS, NUM_EXPERTS // NUM_GROUPS)
    groups = _best(grouped.topk(2, dim=-1).values.sum(dim=-1), KEPT_GROUPS)
    kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=biased.device).scatter_(1, groups, True)
    experts = _best(grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1), TOP_K)
    local = experts[(experts >= offset) & (experts < offset + NUM_LOCAL_EXPERTS)]
    return local.numel(), local.unique().numel()


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest scores of each row, the lower index first among equals (topk leaves it open)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


@triton.jit
def sum_tiles_kernel(x_ptr, sums_ptr, BLOCK: tl.constexpr):
    """Grid (numel / BLOCK,). Program i reads x[i * BLOCK : (i + 1) * BLOCK] (float32), stores the sum in sums[i]."""
    pid = tl.program_id(0)
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums_ptr + pid, tl.sum(tl.load(x_ptr + offs)))


def _read_bandwidth(device: str) -> float:
    x = torch.empty(READ_BYTES // 4, dtype=torch.float32, device=device).uniform_()
    sums = torch.empty(x.numel() // READ_BLOCK, dtype=torch.float32, device=device)
    seconds = _median_seconds(lambda: sum_tiles_kernel[(sums.numel(),)](x, sums, BLOCK=READ_BLOCK, num_warps=8))
    return READ_BYTES / seconds


def _fp8_rate(device: str) -> float:
    # Random values: zeros draw less power and so show a rate that no real product reaches.
    a, b = (
        torch.randn(FP8_DIM, FP8_DIM, device=device).clamp_(-2, 2).to(torch.float8_e4m3fn) for _ in range(2)
    )
    one = torch.ones((), dtype=torch.float32, device=device)
    seconds = _median_seconds(
        lambda: torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    )
    return 2 * FP8_DIM**3 / seconds


def _median_seconds(call: Callable[[], object], warmup: int = 3, repeats: int = 20) -> float:
    for _ in range(warmup):
        call()
    torch.cuda.synchronize()
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    for start, end in zip(starts, ends):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends)) / 1e3

"""How long a call keeps the GPU busy on a cold L2: from its first kernel's start to its last kernel's end.

Each call is preceded by a flush that writes 256 MB (as flashinfer-bench does) and by a kernel that spins until the
host has queued the whole call, so that gaps between kernels are the GPU's and not Python's. Start and end come from
CUPTI's activity records. Kernels may overlap, hence a span and not a sum of durations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

FLUSH_BYTES = 256 * 2**20
SPIN_CYCLES = 4_000_000  # about 2 ms at 2 GHz; a call must be launched in less
SPIN_KERNEL = "spin_kernel"  # what torch.cuda._sleep launches


class Activity(NamedTuple):
    """One thing the GPU did, as CUPTI recorded it: kernel or memory operation, times in microseconds."""

    name: str
    start_us: float
    end_us: float


class Call(NamedTuple):
    """One measured call: what the GPU did, by start, and for how many microseconds it was held back before."""

    activities: tuple[Activity, ...]
    spin_us: float

    @property
    def span_us(self) -> float:
        return max(activity.end_us for activity in self.activities) - self.activities[0].start_us


@dataclass(frozen=True)
class Span:
    """Spread of a call's span over the repeats, in microseconds."""

    median_us: float
    min_us: float
    max_us: float


def measure_span(call: Callable[[], object], repeats: int = 20) -> Span:
    """The spread over `repeats` of a call's span; `call` and errors as in `record_calls`."""
    return summarize(record_calls(call, repeats))


def record_calls(call: Callable[[], object], repeats: int = 20) -> list[Call]:
    """Record `call`, which launches its kernels on the current stream of the current CUDA device; late calls are left
    out.

    Raises RuntimeError when the profiler lost records or when most calls were not queued in time, which is also
    what a call that waits for the GPU looks like.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    call()
    torch.cuda.synchronize()
    launch_us = []
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            flush.zero_()
            start = time.perf_counter()
            torch.cuda._sleep(SPIN_CYCLES)
            call()
            launch_us.append((time.perf_counter() - start) * 1e6)
            torch.cuda._sleep(1)
        torch.cuda.synchronize()
    activities = [
        Activity(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    return queued_calls(split_calls(activities, repeats), launch_us)


def split_calls(activities: Sequence[Activity], repeats: int) -> list[Call]:
    """Find each call between the spin kernel before it and the one after it.

    Raises RuntimeError when the two spin kernels of each of the `repeats` calls are not all there, or a call is empty.
    """
    ordered = sorted(activities, key=lambda activity: activity.start_us)
    spins = [i for i, activity in enumerate(ordered) if SPIN_KERNEL in activity.name]
    if len(spins) != 2 * repeats:
        raise RuntimeError(
            f"expected {2 * repeats} spin kernels in the profile, found {len(spins)} among {len(ordered)} activities: "
            "CUPTI is not available to torch.profiler or dropped records"
        )
    calls = []
    for before, after in zip(spins[::2], spins[1::2]):
        own = ordered[before + 1 : after]
        if not own:
            raise RuntimeError("expected kernels between the spin kernels, found none: the call launched nothing")
        calls.append(Call(tuple(own), ordered[before].end_us - ordered[before].start_us))
    return calls


def queued_calls(calls: Sequence[Call], launch_us: Sequence[float]) -> list[Call]:
    """The calls that the host had queued before the GPU was let go; launch_us: host time of each call.

    Raises RuntimeError when they are fewer than half.
    """
    queued = [call for call, launch in zip(calls, launch_us) if launch < call.spin_us]
    if 2 * len(queued) < len(calls):
        raise RuntimeError(
            f"expected calls queued within {statistics.median(call.spin_us for call in calls):.0f} us, they took "
            f"{statistics.median(launch_us):.0f} us on the host: the call waits for the GPU or launches too slowly"
        )
    return queued


def summarize(calls: Sequence[Call]) -> Span:
    """Spread of the span over the calls."""
    spans = [call.span_us for call in calls]
    return Span(statistics.median(spans), min(spans), max(spans))

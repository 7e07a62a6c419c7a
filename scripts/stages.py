"""Where the microseconds of a call go: its span divided among its kernels and the gaps between them.

Kernels overlap, because programmatic dependent launch starts a kernel while the one before it drains. An instant
belongs to the kernel that started first among those that run then: each of ours waits for its predecessor before it
reads or writes anything, so that what runs beside a predecessor is only waiting. An instant at which nothing runs is a
gap, and belongs to the kernel after it. So the rows' own times and gaps add up to the span.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scripts.span import Activity, Call

# Kernel -> stage. Where one name stands for several kernels of a call, their stages in the order of the launches.
STAGES = {
    "_top_k_kernel": ("routing",),
    "_count_kernel": ("routing",),
    "_lists_kernel": ("routing",),
    "_fused_kernel": ("GEMM1 + GEMM2",),
    "_streaming_kernel": ("GEMM1", "GEMM2"),
    "_tiled_kernel": ("GEMM1", "GEMM2"),
    "_gemm1_kernel": ("GEMM1",),
    "_gemm2_kernel": ("GEMM2",),
    "_finalize_kernel": ("finalize",),
}
OTHER = "other"  # what a call runs and the table does not know: a copy, a kernel of PyTorch's
MATRICES = {"GEMM1": 2, "GEMM2": 1, "GEMM1 + GEMM2": 3}  # H x I matrices of an expert that the stage reads


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a call; times in microseconds."""

    kernel: str
    stage: str
    duration_us: float  # from its start to its end
    own_us: float  # the part of it that no earlier kernel was running
    gap_us: float  # before it, nothing ran

    @property
    def overlap_us(self) -> float:
        """How long it ran beside earlier kernels: what its early start hides."""
        return self.duration_us - self.own_us


def kernel_times(calls: Sequence[Call]) -> list[KernelTime]:
    """Mean times over the middle half of the calls by span, a row a kernel, in the order of their starts.

    Raises RuntimeError when the calls did not run the same kernels in the same order.
    """
    sequences = {tuple(activity.name for activity in call.activities) for call in calls}
    if len(sequences) != 1:
        raise RuntimeError(f"expected the same kernels in every call, found {len(sequences)} sequences: {sequences}")
    ordered = sorted(calls, key=lambda call: call.span_us)
    middle = ordered[len(ordered) // 4 : len(ordered) - len(ordered) // 4]
    rows = zip(*(_divide(call.activities) for call in middle))
    return [
        replace(row[0], **{name: statistics.fmean(getattr(time, name) for time in row)
                           for name in ("duration_us", "own_us", "gap_us")})
        for row in rows
    ]


def _divide(activities: Sequence[Activity]) -> list[KernelTime]:
    """The rows of one call, whose activities are ordered by start."""
    rows = []
    launches = Counter()
    busy_until = activities[0].start_us
    for activity in activities:
        stages = STAGES.get(activity.name, ())
        nth = launches[activity.name]
        launches[activity.name] += 1
        rows.append(KernelTime(
            kernel=activity.name,
            stage=stages[nth] if nth < len(stages) else OTHER,
            duration_us=activity.end_us - activity.start_us,
            own_us=max(0.0, activity.end_us - max(activity.start_us, busy_until)),
            gap_us=max(0.0, activity.start_us - busy_until),
        ))
        busy_until = max(busy_until, activity.end_us)
    return rows

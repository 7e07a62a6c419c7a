"""What flashinfer-bench's evaluator says of a solution on one workload, and how near it comes at every tier.

Inputs, reference, build and verdict are flashinfer-bench's own. An element of the output is matched when
`|error| <= atol` or `|error| <= rtol * |reference|`; a workload passes when the matched share reaches the ratio.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from flashinfer_bench.bench.config import BenchmarkConfig
from flashinfer_bench.bench.evaluators import resolve_evaluator
from flashinfer_bench.bench.utils import compute_error_stats
from flashinfer_bench.compile import BuilderRegistry, Runnable
from flashinfer_bench.data import Definition, EvaluationStatus, Solution, Workload


@dataclass(frozen=True)
class Tolerance:
    """Error bounds of one tier: relative, absolute, and the share of elements (0 to 1) that must keep to them."""

    rtol: float
    atol: float
    required_matched_ratio: float


TIERS = {
    "profile": Tolerance(rtol=0.2, atol=0.1, required_matched_ratio=0.85),
    "contest": Tolerance(rtol=0.3, atol=1.0, required_matched_ratio=0.9),  # MLSys 2026 FlashInfer contest
    "strict": Tolerance(rtol=0.01, atol=0.01, required_matched_ratio=0.95),  # flashinfer-bench's defaults
}


@dataclass(frozen=True)
class Outcome:
    """One call of a solution: its inputs in the definition's order, its output, and the verdict on it.

    `output` and `matched` (tier -> matched share) are None when the call raised.
    """

    inputs: list[Any]
    output: torch.Tensor | None
    status: EvaluationStatus
    matched: dict[str, float] | None


def assess(
    definition: Definition, solution: Solution, workload: Workload, root: Path, device: str, tolerance: Tolerance
) -> Outcome:
    """Run a destination-passing `solution` once on seeded inputs of `workload` and compare with the reference.

    `root` is the data set that the workload's safetensors paths are relative to; `device` is "cpu" or "cuda:<n>".
    An exception in the solution is printed to stderr and becomes status RUNTIME_ERROR. Raises BuildError when the
    solution cannot be built.
    """
    torch.manual_seed(0)
    config = _config(tolerance)
    evaluator = resolve_evaluator(definition)
    runnable = BuilderRegistry.get_instance().build(definition, solution)
    outputs: list[torch.Tensor] = []

    def run_and_keep_output(*args: Any) -> None:
        runnable(*args)
        outputs.append(args[-1])

    # The evaluator synchronises with CUDA whatever the device; on the CPU there is nothing to wait for.
    no_cuda = patch.object(torch.cuda, "synchronize", lambda device=None: None)
    with no_cuda if device == "cpu" else nullcontext():
        baseline = evaluator.build_baseline(definition, workload, config, device, root)
        _, failure = evaluator.check_correctness(
            definition=definition,
            sol_runnable=Runnable(run_and_keep_output, runnable.metadata),
            inputs=baseline.inputs,
            ref_outputs=baseline.outputs,
            cfg=config,
            log_path="",
            device=device,
        )
    status = failure.status if failure else EvaluationStatus.PASSED
    output = outputs[0] if outputs else None
    matched = None if output is None else matched_ratios(output, baseline.outputs[0][0])
    return Outcome(baseline.inputs[0], output, status, matched)


def matched_ratios(output: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Share (0 to 1) of matched elements at each tier; 0 at all of them when `output` holds a NaN or an Inf."""
    if not torch.isfinite(output).all():
        return dict.fromkeys(TIERS, 0.0)
    return {name: compute_error_stats(output, reference, _config(tier))[3] for name, tier in TIERS.items()}


def _config(tolerance: Tolerance) -> BenchmarkConfig:
    return BenchmarkConfig(
        num_trials=1,
        profile_baseline=False,
        rtol=tolerance.rtol,
        atol=tolerance.atol,
        required_matched_ratio=tolerance.required_matched_ratio,
    )

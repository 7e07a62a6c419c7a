"""Assemble a flashinfer-bench data set with our solution, or register the solution in an existing one.

    python -m scripts.dataset ROOT    write a data set with the 19 published workloads to ROOT
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from flashinfer_bench.data import (
    Definition,
    RandomInput,
    SafetensorsInput,
    ScalarInput,
    Solution,
    Trace,
    TraceSet,
    Workload,
    save_json_file,
)
from rich.console import Console
from rich.progress import track

from scripts.pack import DEFINITION_JSON, load_definition, pack
from scripts.workloads import PUBLISHED, ROUTED_SCALING_FACTOR, PublishedWorkload, router_tensors

MARKER = ".assembled"  # in a root that this script wrote, and may therefore delete and write again


def assemble(root: Path, solution: Solution, workloads: Sequence[PublishedWorkload]) -> Path:
    """Write a data set with our definition, `solution` and `workloads` to `root`, from scratch, and return `root`.

    `root` must be missing, empty or an earlier result of this function, which is deleted, traces included;
    FileExistsError if it is anything else.
    """
    if root.exists():
        if any(root.iterdir()) and not (root / MARKER).exists():
            raise FileExistsError(f"{root}: expected no folder, an empty or an assembled one, found other files")
        shutil.rmtree(root)
    root.mkdir(parents=True)
    (root / MARKER).write_text("Written by scripts/dataset.py, which may delete this folder and write it again.\n")
    definition = load_definition()
    trace_set = TraceSet(root=root, definitions={definition.name: definition})
    _save_definition(root, definition)
    save_json_file(solution, solution_path(root, solution, definition))
    entries = track(workloads, description="router tensors", console=Console(stderr=True), transient=True)
    trace_set.add_workload_traces([_workload_trace(trace_set, definition, entry) for entry in entries])
    return root


def register(root: Path, solution: Solution) -> Path:
    """Add `solution` to the data set at `root`, or replace our earlier one, and return the path of its file.

    Our definition is added only if the data set has none of that name; nothing else is touched. FileNotFoundError if
    `root` is not a folder; ValueError if a file of it is malformed or it holds a solution of that name elsewhere.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected the folder of a flashinfer-bench data set")
    trace_set = TraceSet.from_path(str(root))
    ours = load_definition()
    definition = trace_set.definitions.get(ours.name, ours)
    path = solution_path(root, solution, definition)
    if trace_set.get_solution(solution.name) and not path.exists():
        raise ValueError(f"{root}: expected solution {solution.name} at {path.relative_to(root)}, found it elsewhere")
    if ours.name not in trace_set.definitions:
        _save_definition(root, ours)
    save_json_file(solution, path)
    return path


def solution_path(root: Path, solution: Solution, definition: Definition) -> Path:
    """Where a data set at `root` keeps `solution`: solutions/<author>/<op>/<definition>/<name>.json."""
    return root / "solutions" / solution.author / definition.op_type / definition.name / f"{solution.name}.json"


def _save_definition(root: Path, definition: Definition) -> None:
    folder = root / "definitions" / definition.op_type
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(DEFINITION_JSON, folder)


def _workload_trace(trace_set: TraceSet, definition: Definition, workload: PublishedWorkload) -> Trace:
    """Router tensors from a safetensors blob, both scalars given, everything else random."""
    tensors = router_tensors(workload)
    blob = trace_set.add_workload_blob_tensor(definition.name, workload.uuid, tensors)
    inputs = {name: RandomInput() for name in definition.inputs}
    inputs |= {name: SafetensorsInput(path=blob, tensor_key=name) for name in tensors}
    inputs["local_expert_offset"] = ScalarInput(value=workload.local_expert_offset)
    inputs["routed_scaling_factor"] = ScalarInput(value=ROUTED_SCALING_FACTOR)
    axes = {"seq_len": workload.num_tokens}
    return Trace(definition=definition.name, workload=Workload(axes=axes, inputs=inputs, uuid=workload.uuid))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.dataset", description="Assemble the benchmark's data set.")
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder to write: missing, empty or assembled before")
    arguments = parser.parse_args(argv)
    try:
        root = assemble(arguments.root, pack(), PUBLISHED)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{root}: {len(PUBLISHED)} workloads; run flashinfer-bench run --local {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

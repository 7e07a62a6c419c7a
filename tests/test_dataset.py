"""The 19 workloads and the data sets that hold them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flashinfer_bench.bench.utils import load_safetensors
from flashinfer_bench.data import (
    BuildSpec,
    Solution,
    SourceFile,
    TraceSet,
    load_json_file,
    save_json_file,
)

from scripts import dataset
from scripts.pack import DEFINITION_JSON, DEFINITION_NAME, load_definition
from scripts.workloads import PUBLISHED, router_tensors, small_workloads

# The published workloads by the start of their uuid: T, local_expert_offset, active local experts.
TABLE = {
    "e05c6c03": (1, 32, 5),
    "b8f4f012": (7, 192, 12),
    "8cba5890": (14, 0, 19),
    "2e69caee": (15, 32, 9),
    "a7c2bcfd": (16, 224, 20),
    "6230e838": (32, 32, 30),
    "f7d6ac7c": (52, 160, 24),
    "fc378037": (53, 32, 30),
    "76010cb4": (54, 128, 31),
    "81955b1e": (55, 128, 31),
    "4822167c": (56, 64, 32),
    "74d7ff04": (57, 96, 31),
    "e626d3e6": (58, 64, 32),
    "eedc63b2": (59, 160, 27),
    "5eadab1e": (62, 96, 24),
    "8f1ff9f1": (80, 96, 32),
    "1a4c6ba1": (901, 96, 32),
    "58a34f27": (11948, 128, 32),
    "5e8dc11c": (14107, 32, 32),
}
ROUTER_SHA256 = "452037329da70f1ef0932ca4904340cf23a10cd26107feaa6445889774f59772"


def a_solution(name: str = "ours", content: str = "def run(): ...\n", author: str = "us") -> Solution:
    return Solution(
        name=name,
        definition=DEFINITION_NAME,
        author=author,
        spec=BuildSpec(language="triton", target_hardware=["cuda"], entry_point="main.py::run"),
        sources=[SourceFile(path="main.py", content=content)],
    )


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def route():
    """The reference's own routing."""
    namespace: dict = {}
    exec(load_definition().reference, namespace)
    return namespace["route"]


@pytest.fixture(scope="module")
def published_root(tmp_path_factory) -> Path:
    return dataset.assemble(tmp_path_factory.mktemp("data") / "root", a_solution(), PUBLISHED)


@pytest.fixture
def small_root(tmp_path) -> Path:
    return dataset.assemble(tmp_path / "root", a_solution(), small_workloads())


def rows_per_local_expert(route, tensors: dict[str, torch.Tensor], offset: int) -> torch.Tensor:
    experts, _ = route(tensors["routing_logits"], tensors["routing_bias"], 2.5)
    local = experts[(experts >= offset) & (experts < offset + 32)] - offset
    return torch.bincount(local, minlength=32)


def test_table_is_the_published_one():
    """Which 19 workloads are run, by uuid, is the benchmark's choice and not ours."""
    assert {w.uuid[:8]: (w.num_tokens, w.local_expert_offset, w.active_experts) for w in PUBLISHED} == TABLE
    assert list(PUBLISHED) == sorted(PUBLISHED, key=lambda w: w.num_tokens)


def test_router_tensors_have_the_same_bytes_everywhere():
    """Results of two machines compare only if both ran the same routing."""
    digest = hashlib.sha256()
    for workload in PUBLISHED:
        tensors = router_tensors(workload)
        digest.update(tensors["routing_logits"].numpy().tobytes())
        digest.update(tensors["routing_bias"].view(torch.int16).numpy().tobytes())
    assert digest.hexdigest() == ROUTER_SHA256


@pytest.mark.parametrize("workload", [*PUBLISHED, *small_workloads()], ids=lambda w: f"T{w.num_tokens}")
def test_routing_is_as_listed(route, workload):
    """The floor of a workload is computed from its active experts and rows, which the reference must see too."""
    tensors = router_tensors(workload)
    rows = rows_per_local_expert(route, tensors, workload.local_expert_offset)
    assert (rows > 0).sum() == workload.active_experts
    assert rows.sum() == workload.num_rows


def test_decisions_have_a_margin():
    """No routing decision hangs on the last bit of a sigmoid: scores of chosen and other experts are far apart."""
    for workload in (PUBLISHED[0], PUBLISHED[10], small_workloads()[1]):
        tensors = router_tensors(workload)
        sb = torch.sigmoid(tensors["routing_logits"]) + tensors["routing_bias"].float()
        ordered = sb.sort(dim=1, descending=True).values
        assert (ordered[:, 7] - ordered[:, 8]).min() > 0.3
        groups = sb.view(-1, 8, 32).topk(2, dim=2).values.sum(2)
        chosen = (tensors["routing_logits"] > 0).view(-1, 8, 32).any(2)
        assert chosen.sum(1).max() <= 4
        assert groups[chosen].min() - groups[~chosen].max() > 0.1


def test_rows_are_uneven_as_in_real_routing(route):
    """A schedule measured on even experts would look better than it is."""
    for workload in PUBLISHED[-2:]:
        rows = rows_per_local_expert(route, router_tensors(workload), workload.local_expert_offset).float()
        assert rows.max() > 1.5 * rows.mean()
        assert rows.min() < 0.5 * rows.mean()


@pytest.mark.parametrize("change", [{"active_experts": 33}, {"num_rows": 4}, {"num_rows": 100}, {"active_experts": 0}])
def test_impossible_workloads_are_refused(change):
    """A mistyped row of the table must not become a routing of other numbers."""
    with pytest.raises(ValueError, match="active_experts .* num_rows"):
        router_tensors(replace(PUBLISHED[1], **change))


def test_published_data_set_loads(published_root):
    """flashinfer-bench finds the definition, the solution and 19 workloads whose every input is given."""
    trace_set = TraceSet.from_path(str(published_root))
    assert list(trace_set.definitions) == [DEFINITION_NAME]
    definition = trace_set.definitions[DEFINITION_NAME]
    assert definition == load_definition()
    assert [solution.name for solution in trace_set.solutions[DEFINITION_NAME]] == ["ours"]
    assert not trace_set.traces
    loaded = [trace.workload for trace in trace_set.workloads[DEFINITION_NAME]]
    assert [workload.uuid for workload in loaded] == [workload.uuid for workload in PUBLISHED]
    for workload, published in zip(loaded, PUBLISHED):
        assert workload.axes == {"seq_len": published.num_tokens}
        assert list(workload.inputs) == list(definition.inputs)
        assert workload.inputs["local_expert_offset"].value == published.local_expert_offset
        assert workload.inputs["routed_scaling_factor"].value == 2.5
        tensors = load_safetensors(definition, workload, published_root)
        expected = router_tensors(published)
        assert set(tensors) == set(expected)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        others = definition.inputs.keys() - tensors.keys() - {"local_expert_offset", "routed_scaling_factor"}
        assert {workload.inputs[name].type for name in others} == {"random"}


def test_solution_lies_where_the_layout_says(published_root):
    """The path is part of the data set's format: author, op type, definition."""
    path = published_root / "solutions" / "us" / "moe" / DEFINITION_NAME / "ours.json"
    assert load_json_file(Solution, path).model_dump() == a_solution().model_dump()
    assert (published_root / "definitions" / "moe" / DEFINITION_JSON.name).read_bytes() == DEFINITION_JSON.read_bytes()


def test_assembling_again_replaces_everything(small_root):
    """Old traces must not be counted as results of a new run, and the bytes are the same each time."""
    before = files(small_root)
    trace = small_root / "traces" / "moe" / "old.jsonl"
    trace.parent.mkdir(parents=True)
    trace.write_text("")
    dataset.assemble(small_root, a_solution(), small_workloads())
    assert files(small_root) == before


def test_assembling_never_deletes_foreign_files(tmp_path):
    """A mistyped ROOT costs nobody their data."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="found other files"):
        dataset.assemble(tmp_path, a_solution(), small_workloads())
    assert files(tmp_path) == {"thesis.tex": b"years of work"}
    assert dataset.main([str(tmp_path)]) == 1


def test_registering_leaves_foreign_files_alone(small_root):
    """The published data set keeps its own definition, workloads, solutions and traces; only our file is added."""
    definition = load_definition().model_copy(update={"description": "theirs"})
    save_json_file(definition, small_root / "definitions" / "theirs" / "other_name.json")
    (small_root / "definitions" / "moe" / DEFINITION_JSON.name).unlink()
    before = files(small_root)

    path = dataset.register(small_root, a_solution("new"))

    after = files(small_root)
    added = str(path.relative_to(small_root))
    assert added == f"solutions/us/moe/{DEFINITION_NAME}/new.json"
    assert after.pop(added)
    assert after == before
    names = [solution.name for solution in TraceSet.from_path(str(small_root)).solutions[DEFINITION_NAME]]
    assert sorted(names) == ["new", "ours"]


def test_registering_again_updates_our_solution(small_root):
    """A second run measures the new sources, not the registered old ones."""
    path = dataset.register(small_root, a_solution(content="x = 2\n"))
    assert load_json_file(Solution, path).sources[0].content == "x = 2\n"
    assert len(TraceSet.from_path(str(small_root)).solutions[DEFINITION_NAME]) == 1


def test_registering_adds_a_missing_definition(tmp_path):
    """A data set of other operations gets the contract too."""
    dataset.register(tmp_path, a_solution())
    assert TraceSet.from_path(str(tmp_path)).definitions == {DEFINITION_NAME: load_definition()}


def test_registering_refuses_a_name_taken_elsewhere(small_root):
    """Two solutions of one name make the whole data set unloadable."""
    before = files(small_root)
    with pytest.raises(ValueError, match="found it elsewhere"):
        dataset.register(small_root, a_solution(author="them"))
    assert files(small_root) == before


def test_registering_refuses_a_missing_root(tmp_path):
    """flashinfer-bench would create the folder of a mistyped FIB_DATASET_PATH and run nothing."""
    with pytest.raises(FileNotFoundError, match="flashinfer-bench data set"):
        dataset.register(tmp_path / "nowhere", a_solution())
    assert not (tmp_path / "nowhere").exists()

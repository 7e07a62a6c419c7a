"""solution.json is what the sources say, in the contest kit's form, and flashinfer-bench can load it."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys

import pytest
from flashinfer_bench.agents import pack_solution_from_files
from flashinfer_bench.compile import BuilderRegistry
from flashinfer_bench.compile.builders import TritonBuilder
from flashinfer_bench.data import BuildSpec, Solution, load_json_file

from scripts import pack

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture
def solution_json(tmp_path, monkeypatch):
    """A current solution.json in a folder of its own, which the command line then works on."""
    path = tmp_path / "solution.json"
    path.write_text(pack.to_json(pack.pack()), encoding="utf-8")
    monkeypatch.setattr(pack, "SOLUTION_JSON", path)
    return path


def test_checked_in_solution_is_current():
    """What is submitted is what was tested."""
    assert pack.stale_files(pack.pack(), pack.SOLUTION_JSON) == []


def test_starter_kit_packs_the_same_bytes():
    """The contest's own packer reads language, entry point, name, definition and author, and leaves the rest alone."""
    config = tomllib.loads((pack.ROOT / "config.toml").read_text(encoding="utf-8"))
    spec = BuildSpec(
        language=config["build"]["language"], target_hardware=["cuda"], entry_point=config["build"]["entry_point"]
    )
    folder = pack.ROOT / "solution" / config["build"]["language"]
    kit = pack_solution_from_files(
        path=str(folder),
        spec=spec,
        name=config["solution"]["name"],
        definition=config["solution"]["definition"],
        author=config["solution"]["author"],
    )
    assert kit.model_dump_json(indent=2) == pack.SOLUTION_JSON.read_text(encoding="utf-8")


def test_solution_is_for_our_definition():
    """The name in config.toml, the definition's file name and the name inside it are three places to keep equal."""
    assert pack.pack().definition == pack.load_definition().name == pack.DEFINITION_NAME


def test_flashinfer_bench_builds_it(tmp_path, monkeypatch):
    """Its builder imports the sources as a package of their own and wants the definition's inputs, then the output."""
    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path))
    definition, registry = pack.load_definition(), BuilderRegistry([TritonBuilder()])
    runnable = registry.build(definition, load_json_file(Solution, pack.SOLUTION_JSON))
    assert runnable.metadata.destination_passing_style
    entry = getattr(sys.modules[runnable.metadata.misc["module_name"]], runnable.metadata.misc["entry_symbol"])
    assert list(inspect.signature(entry).parameters) == [*definition.inputs, *definition.outputs]
    for late in ("hopper_gemm1", "hopper_gemm2"):  # imported by the first call that needs them
        assert callable(getattr(importlib.import_module(f"{entry.__module__.rpartition('.')[0]}.{late}"), late))
    registry.cleanup()


def test_gluon_is_imported_where_it_is_needed():
    """Its API differs between Triton versions: a GPU whose kernels do not use it must not depend on it."""
    program = "import sys, solution.triton.main; print([name for name in sys.modules if 'experimental.gluon' in name])"
    finished = subprocess.run([sys.executable, "-c", program], cwd=pack.ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"


def test_writing_and_checking(solution_json, capsys):
    """The written file passes the check and is exactly the packed solution."""
    solution_json.unlink()
    assert pack.main([]) == 0
    assert solution_json.read_text(encoding="utf-8") == pack.to_json(pack.pack())
    assert pack.main(["--check"]) == 0


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda data: data["sources"][0].update(content="changed"), "solution/triton/"),
        (lambda data: data["sources"].append({"path": "gone.py", "content": "x = 1\n"}), "solution/triton/gone.py"),
        (lambda data: data.update(author="someone else"), "config.toml"),
        (lambda data: data["spec"].update(destination_passing_style=False), "config.toml"),
        (lambda data: data.update(unknown=1), "solution.json"),
    ],
)
def test_check_names_what_is_stale(solution_json, capsys, change, named):
    """A stale package is refused; flashinfer-bench's own equality looks at neither author nor calling style."""
    data = json.loads(solution_json.read_text(encoding="utf-8"))
    change(data)
    solution_json.write_text(json.dumps(data, indent=2), encoding="utf-8")
    assert pack.main(["--check"]) == 1
    assert f"stale: {named}" in capsys.readouterr().err
    assert json.loads(solution_json.read_text(encoding="utf-8")) == data


def test_check_without_solution_json(solution_json, capsys):
    """A missing file is stale, not an exception."""
    solution_json.unlink()
    assert pack.main(["--check"]) == 1
    assert "stale: solution.json" in capsys.readouterr().err


def test_broken_solution_json_is_reported_and_can_be_replaced(solution_json, capsys):
    """Half a file, as after an interrupted write, fails the check with a message and is no obstacle to packing."""
    solution_json.write_text("{", encoding="utf-8")
    assert pack.main(["--check"]) == 1
    assert "error" in capsys.readouterr().err
    assert pack.main([]) == 0
    assert pack.main(["--check"]) == 0


def test_incomplete_config_is_named(tmp_path, monkeypatch, capsys):
    """A missing entry of config.toml is said by name."""
    text = (pack.ROOT / "config.toml").read_text(encoding="utf-8")
    (tmp_path / "config.toml").write_text(text.replace("author", "writer"), encoding="utf-8")
    monkeypatch.setattr(pack, "ROOT", tmp_path)
    assert pack.main([]) == 1
    assert "'author' is missing" in capsys.readouterr().err


def test_missing_sources_are_named(tmp_path, monkeypatch, solution_json, capsys):
    """Without sources nothing is written."""
    before = solution_json.read_bytes()
    monkeypatch.setattr(pack, "SOLUTION_DIR", tmp_path / "nowhere")
    assert pack.main([]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert solution_json.read_bytes() == before

"""Pack config.toml and solution/triton into solution.json, as the contest starter kit's packer does.

    python -m scripts.pack            write solution.json
    python -m scripts.pack --check    exit 1 and name what differs if solution.json is stale
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flashinfer_bench.agents import pack_solution_from_files
from flashinfer_bench.data import BuildSpec, Definition, Solution, load_json_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
SOLUTION_DIR = ROOT / "solution" / "triton"
SOLUTION_JSON = ROOT / "solution.json"
DEFINITION_NAME = "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048"
DEFINITION_JSON = ROOT / "definitions" / "moe" / f"{DEFINITION_NAME}.json"


def load_definition() -> Definition:
    """The benchmark's contract from definitions/moe; pydantic.ValidationError if the file is malformed."""
    return load_json_file(Definition, DEFINITION_JSON)


def pack() -> Solution:
    """The solution that config.toml describes, with the top-level files of solution/triton as its sources.

    Raises ValueError if config.toml lacks an entry, if solution/triton is missing or empty, or if the entry point's
    file is not in it.
    """
    config = tomllib.loads((ROOT / "config.toml").read_text(encoding="utf-8"))
    try:
        name, definition, author = (config["solution"][key] for key in ("name", "definition", "author"))
        language, entry_point, destination_passing_style = (
            config["build"][key] for key in ("language", "entry_point", "destination_passing_style")
        )
    except KeyError as missing:
        raise ValueError(
            "config.toml: expected [solution] name, definition, author and [build] language, entry_point, "
            f"destination_passing_style; {missing} is missing"
        ) from None
    spec = BuildSpec(
        language=language,
        target_hardware=["cuda"],
        entry_point=entry_point,
        destination_passing_style=destination_passing_style,
    )
    return pack_solution_from_files(str(SOLUTION_DIR), spec, name=name, definition=definition, author=author)


def to_json(solution: Solution) -> str:
    """The text of solution.json, byte for byte what the starter kit's packer writes."""
    return solution.model_dump_json(indent=2)


def stale_files(solution: Solution, solution_json: Path) -> list[str]:
    """Names of the files whose content solution_json does not hold as `solution` does; empty if it is current."""
    if not solution_json.exists():
        return [solution_json.name]
    text = solution_json.read_text(encoding="utf-8")
    if text == to_json(solution):
        return []
    packed = Solution.model_validate_json(text)
    old = {source.path: source.content for source in packed.sources}
    new = {source.path: source.content for source in solution.sources}
    stale = sorted(f"solution/triton/{path}" for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    if packed.model_dump(exclude={"sources"}) != solution.model_dump(exclude={"sources"}):
        stale.append("config.toml")
    return stale or [solution_json.name]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.pack", description="Pack the solution into solution.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if solution.json is stale")
    arguments = parser.parse_args(argv)
    try:
        solution = pack()
        stale = stale_files(solution, SOLUTION_JSON) if arguments.check else []
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not arguments.check:
        SOLUTION_JSON.write_text(to_json(solution), encoding="utf-8")
        print(f"{SOLUTION_JSON.name}: {solution.name}, {len(solution.sources)} files")
    for name in stale:
        print(f"{SOLUTION_JSON.name} is stale: {name} differs; run python -m scripts.pack", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a caller may pass: every rejected input of every argument, and that nothing has happened when it is rejected."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from solution.triton import contract, main
from solution.triton.contract import TENSORS, check_arguments

TOKENS = 2
SCALARS = {"local_expert_offset": 32, "routed_scaling_factor": 2.5}
ORDER = [*list(TENSORS)[:-1], *SCALARS, "output"]


def arguments(num_tokens: int, device: torch.device | str) -> dict[str, object]:
    """Valid arguments in run's order; on the CPU their 1.4 GB are reserved and never touched."""
    tensors = {
        name: torch.empty(shape_of(name, num_tokens), dtype=dtype, device=device)
        for name, (_, dtype) in TENSORS.items()
    }
    return {name: (tensors | SCALARS)[name] for name in ORDER}


def shape_of(name: str, num_tokens: int = TOKENS) -> list[int]:
    return [num_tokens if size == "T" else size for size in TENSORS[name][0]]


@pytest.fixture
def rejected(device, monkeypatch):
    """Calls run() with one argument replaced; checks that it raises before a launch or a write; gives the message."""
    valid = arguments(TOKENS, device)
    valid["output"].fill_(7)

    def launched(*args: object, **kwargs: object) -> None:
        raise AssertionError("run() went on to routing")

    monkeypatch.setattr(main, "route", launched)

    def call(error: type[Exception], name: str, value: object) -> str:
        with pytest.raises(error) as caught:
            main.run(**valid | {name: value})
        assert (valid["output"] == 7).all()
        return str(caught.value)

    return call


def test_valid_arguments_are_accepted(device):
    """The rejections below are of one change to arguments that pass; numpy's scalars are numbers too."""
    valid = arguments(TOKENS, device)
    assert check_arguments(valid) == TOKENS
    for scalars in ({"local_expert_offset": np.int32(-8)}, {"routed_scaling_factor": np.float32(1)},
                    {"routed_scaling_factor": 1}):
        assert check_arguments(valid | scalars) == TOKENS


@pytest.mark.parametrize("value, got", [(None, "None"), ([1.0], "list"), (np.zeros(2), "ndarray")])
@pytest.mark.parametrize("name", TENSORS)
def test_tensor_of_another_type(rejected, name, value, got):
    """A TypeError names the argument and what came."""
    assert rejected(TypeError, name, value) == f"{name}: expected a torch.Tensor, got {got}"


@pytest.mark.parametrize("value, got", [(None, "None"), (True, "bool"), ("32", "str"), (torch.tensor(32), "Tensor"),
                                        (32.0, "float"), (np.bool_(True), "bool")])
def test_offset_of_another_type(rejected, value, got):
    """An offset that is no integer would be truncated by the launch."""
    message = rejected(TypeError, "local_expert_offset", value)
    assert message.startswith("local_expert_offset: expected an int, got ") and got in message


@pytest.mark.parametrize("value, got", [(None, "None"), (False, "bool"), ("2.5", "str"), (1j, "complex"),
                                        (torch.tensor(2.5), "Tensor")])
def test_factor_of_another_type(rejected, value, got):
    """As for the offset."""
    assert rejected(TypeError, "routed_scaling_factor", value) == f"routed_scaling_factor: expected a float, got {got}"


@pytest.mark.parametrize("name", TENSORS)
def test_dtype(rejected, device, name):
    """Bytes read as another type would be numbers all the same."""
    expected = TENSORS[name][1]
    wrong = torch.float16 if expected != torch.float8_e4m3fn else torch.float8_e5m2
    tensor = torch.empty(shape_of(name), dtype=wrong, device=device)
    assert rejected(ValueError, name, tensor) == f"{name}: expected dtype {expected}, got {wrong}"


@pytest.mark.parametrize("name", TENSORS)
def test_size_of_each_dimension(rejected, device, name):
    """A tensor that is one short in any dimension would be read past its end."""
    shape, dtype = TENSORS[name]
    for axis, size in enumerate(shape):
        if size == "T" and name == "hidden_states":
            continue  # T is what hidden_states says, see test_number_of_tokens
        wrong = shape_of(name)
        wrong[axis] -= 1
        message = rejected(ValueError, name, torch.empty(wrong, dtype=dtype, device=device))
        assert message == f"{name}: expected shape {shape_of(name)}, got {wrong}"


@pytest.mark.parametrize("name", TENSORS)
def test_number_of_dimensions(rejected, device, name):
    """The message is about the argument that is wrong, hidden_states too, though T comes from it."""
    dtype = TENSORS[name][1]
    for wrong in ([], [TOKENS], [TOKENS, 1, 1, 1]):
        message = rejected(ValueError, name, torch.empty(wrong, dtype=dtype, device=device))
        assert message.startswith(f"{name}: expected shape [") and message.endswith(f"got {wrong}")


def test_number_of_tokens(rejected, device):
    """hidden_states says what T is; the first argument with another T is named."""
    shape, dtype = TENSORS["hidden_states"]
    message = rejected(ValueError, "hidden_states", torch.empty(TOKENS + 1, shape[1], dtype=dtype, device=device))
    assert message == "routing_logits: expected shape [3, 256], got [2, 256]"


@pytest.mark.parametrize("name", TENSORS)
def test_memory_layout(rejected, device, name):
    """Kernels compute addresses from shapes, so a strided view would be read wrongly."""
    shape, dtype = shape_of(name), TENSORS[name][1]
    wrong = torch.empty(1, dtype=dtype, device=device).expand(shape)
    message = rejected(ValueError, name, wrong)
    assert message == f"{name}: expected a contiguous tensor, got strides {wrong.stride()}"


@pytest.mark.parametrize("name", TENSORS)
def test_alignment(rejected, device, name):
    """Loads of 16 bytes and tensor descriptors fault at other addresses; a slice of a larger tensor can have one."""
    shape, dtype = shape_of(name), TENSORS[name][1]
    wrong = torch.empty(math.prod(shape) + 1, dtype=dtype, device=device)[1:].view(shape)
    message = rejected(ValueError, name, wrong)
    assert message == f"{name}: expected data at a multiple of 16 bytes, got address {wrong.data_ptr():#x}"


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "hidden_states"])
def test_device(rejected, device, name):
    """One tensor elsewhere would be an illegal address."""
    tensor = torch.empty(shape_of(name), dtype=TENSORS[name][1], device="meta")
    message = rejected(ValueError, name, tensor)
    assert message.startswith(f"{name}: expected device {device}") and message.endswith("got meta")


def test_too_many_tokens():
    """T is bounded, and the bound itself is allowed."""
    assert check_arguments(arguments(65_536, "meta")) == 65_536
    with pytest.raises(ValueError, match="^hidden_states: expected at most 65536 tokens, got 65537$"):
        main.run(**arguments(65_537, "meta"))


def test_all_tensors_on_an_unsupported_device():
    """Valid in every other way: the error says what would be supported."""
    with pytest.raises(RuntimeError, match=r"^tensors are on meta: .* Hopper .* or Blackwell .* TRITON_INTERPRET=1"):
        main.run(**arguments(TOKENS, "meta"))


@pytest.mark.parametrize("major, supported", [(8, False), (9, True), (10, True), (12, False)])
def test_gpu_generation(monkeypatch, major, supported):
    """A GPU without a table of tile shapes is refused by name; nothing else depends on the machine's own GPU."""
    gpu_properties = contract.gpu_properties.__wrapped__  # without its cache
    properties = SimpleNamespace(name="NVIDIA X", major=major, minor=0, multi_processor_count=148)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    if supported:
        assert gpu_properties(torch.device("cuda", 0)) == (148, (major, 0))
    else:
        with pytest.raises(RuntimeError, match=rf"^NVIDIA X has compute capability {major}.0: supported are Hopper"):
            gpu_properties(torch.device("cuda", 0))


def test_cpu_needs_the_interpreter(monkeypatch):
    """Compiled kernels cannot run on a CPU; in the interpreter it stands in for one Hopper SM."""
    gpu_properties = contract.gpu_properties.__wrapped__  # without its cache
    monkeypatch.setattr(contract, "INTERPRETED", True)
    assert gpu_properties(torch.device("cpu")) == (1, (10, 0))
    monkeypatch.setattr(contract, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="^tensors are on cpu: "):
        gpu_properties(torch.device("cpu"))

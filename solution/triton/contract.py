"""The operation's geometry and the checks on what a caller passes, made before anything is launched or written."""

from __future__ import annotations

import functools
import numbers

import torch
import triton

NUM_EXPERTS = 256  # experts of the whole model
NUM_LOCAL_EXPERTS = 32  # E: experts of this rank
NUM_GROUPS = 8  # groups of 32 experts
TOP_GROUPS = 4
TOP_K = 8
HIDDEN_SIZE = 7168  # H
INTERMEDIATE_SIZE = 2048  # I
SCALE_BLOCK = 128  # one scale per 128 values of K (activations), per 128x128 (weights)
MAX_TOKENS = 65_536
ALIGNMENT = 16  # bytes: vector loads and TMA need it; what PyTorch allocates has it

INTERPRETED = bool(triton.knobs.runtime.interpret)

_H, _I, _E = HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_LOCAL_EXPERTS
TENSORS = {
    "routing_logits": (("T", NUM_EXPERTS), torch.float32),
    "routing_bias": ((NUM_EXPERTS,), torch.bfloat16),
    "hidden_states": (("T", _H), torch.float8_e4m3fn),
    "hidden_states_scale": ((_H // SCALE_BLOCK, "T"), torch.float32),
    "gemm1_weights": ((_E, 2 * _I, _H), torch.float8_e4m3fn),
    "gemm1_weights_scale": ((_E, 2 * _I // SCALE_BLOCK, _H // SCALE_BLOCK), torch.float32),
    "gemm2_weights": ((_E, _H, _I), torch.float8_e4m3fn),
    "gemm2_weights_scale": ((_E, _H // SCALE_BLOCK, _I // SCALE_BLOCK), torch.float32),
    "output": (("T", _H), torch.bfloat16),
}
SUPPORTED_GPUS = {9: "Hopper (compute capability 9.0)", 10: "Blackwell (compute capability 10.x)"}


def check_arguments(arguments: dict[str, object]) -> int:
    """Return T after checking `run`'s arguments by name.

    Raises:
        TypeError: an argument is of the wrong Python type, None included.
        ValueError: a tensor has the wrong dtype, shape, device or memory layout, or T exceeds `MAX_TOKENS`.
    """
    for name in TENSORS:
        if not isinstance(arguments[name], torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {_type_name(arguments[name])}")
    _check_number("local_expert_offset", arguments["local_expert_offset"], numbers.Integral, "an int")
    _check_number("routed_scaling_factor", arguments["routed_scaling_factor"], numbers.Real, "a float")

    hidden_states = arguments["hidden_states"]
    if hidden_states.dim() != 2:
        raise ValueError(f"hidden_states: expected shape [T, {_H}], got {_shape(hidden_states.shape)}")
    num_tokens = hidden_states.shape[0]
    device = hidden_states.device
    for name, shape, dtype in _expected(num_tokens):
        tensor = arguments[name]
        if not (tensor.dtype is dtype and tensor.shape == shape and tensor.device == device
                and tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0):
            raise ValueError(f"{name}: expected {_difference(tensor, shape, dtype, device)}")
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"hidden_states: expected at most {MAX_TOKENS} tokens, got {num_tokens}")
    return num_tokens


@functools.lru_cache(maxsize=1024)  # 7 us to make
def _expected(num_tokens: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor."""
    return [(name, tuple(num_tokens if size == "T" else size for size in shape), dtype)
            for name, (shape, dtype) in TENSORS.items()]


def _difference(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    """What was expected and what came, of the first property that is not as it should be."""
    if tensor.dtype != dtype:
        return f"dtype {dtype}, got {tensor.dtype}"
    if tensor.shape != shape:
        return f"shape {_shape(shape)}, got {_shape(tensor.shape)}"
    if tensor.device != device:
        return f"device {device} (that of hidden_states), got {tensor.device}"
    if not tensor.is_contiguous():
        return f"a contiguous tensor, got strides {tensor.stride()}"
    return f"data at a multiple of {ALIGNMENT} bytes, got address {tensor.data_ptr():#x}"


def _check_number(name: str, value: object, kind: type, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {_type_name(value)}")


@functools.lru_cache  # a device's do not change
def gpu_properties(device: torch.device) -> tuple[int, tuple[int, int]]:
    """Return (SM count, compute capability) of a supported device.

    The interpreter stands in for one Blackwell SM: that table has no Gluon kernels, which it cannot run.

    Raises:
        RuntimeError: the device is not supported.
    """
    if device.type == "cpu" and INTERPRETED:
        return 1, (10, 0)
    supported = " or ".join(SUPPORTED_GPUS.values())
    if device.type != "cuda":
        raise RuntimeError(f"tensors are on {device}: this solution runs on an NVIDIA {supported} GPU, "
                           "or on the CPU under TRITON_INTERPRET=1")
    properties = torch.cuda.get_device_properties(device)
    if properties.major not in SUPPORTED_GPUS:
        raise RuntimeError(f"{properties.name} has compute capability {properties.major}.{properties.minor}: "
                           f"supported are {supported}")
    return properties.multi_processor_count, (properties.major, properties.minor)


def _type_name(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _shape(shape: tuple) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"

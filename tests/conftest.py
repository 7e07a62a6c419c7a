"""Where the tests run: on the GPU where there is one, otherwise on the CPU in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


def pytest_configure(config: pytest.Config) -> None:
    # numpy speaks of what a GPU does silently: exp overflows to inf, on which sigmoid and SiLU rely, and NaN stays NaN.
    config.addinivalue_line("filterwarnings", "ignore:(overflow|invalid value) encountered in:RuntimeWarning")
    config.addinivalue_line("filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning")
    # The interpreter's own loops over a run-time range.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(scope="session")
def device() -> torch.device:
    from solution.triton.contract import INTERPRETED

    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty as it may be at its worst: NaN in every float, and integers that look like indices."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).fill_(0x7F)
        elif tensor.dtype == torch.float32:
            tensor.view(torch.int32).fill_(0x7FFFFFFF)  # NaN, and NaN when cut into float16 or float8
        else:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 5)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="session")
def full_weights(device: torch.device) -> dict[str, torch.Tensor]:
    """The four weight arguments at full geometry: 1.4 GB, so one copy serves all tests."""
    from solution.triton import contract
    from tests import cases

    return cases.weights(contract.HIDDEN_SIZE, contract.INTERMEDIATE_SIZE, device)

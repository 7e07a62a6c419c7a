"""Inputs for the kernel tests: seeded, the same on every machine, moved to the device last."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import torch

from solution.triton import contract, tuning
from solution.triton.contract import NUM_EXPERTS, NUM_LOCAL_EXPERTS, SCALE_BLOCK, TOP_K
from solution.triton.workspace import Workspace, allocate
from tests import reference

# The SM count of a config in a test: few enough that a persistent program takes several units.
NUM_SMS = 3
CLEAR_GAP = 4e-6  # in float32 a group's score (at most 8 here) is exact to 1e-6, whoever computes the exponential


def _configs() -> list[tuning.Config]:
    """Rows of the tables that differ in more than their regime: all in the interpreter, the GPU's own on a GPU."""
    majors = tuning.TABLES if contract.INTERPRETED else [torch.cuda.get_device_capability()[0]]
    rows = [row for major in majors for row in tuning.TABLES[major]]
    if contract.INTERPRETED:
        rows = [row for row in rows if row.kernels != "hopper"]  # Gluon does not run there
    return list({replace(row, max_tokens=0): replace(row, num_sms=NUM_SMS) for row in rows}.values())


CONFIGS = _configs()
STREAMING = next(config for config in CONFIGS if config.streaming)
TILED = next(config for config in CONFIGS if not config.streaming)  # on Hopper the warp-specialised one

# A reduced geometry that every config's tiles and unrolled loops divide, with H and I different. A row of scales is a
# multiple of 16 bytes, as TMA wants it, and so are 512 values.
H = 512 * math.lcm(*(config.gemm1.unroll for config in CONFIGS))
I = 256 * math.lcm(*(config.gemm2.unroll for config in CONFIGS))


def config_id(config: tuning.Config) -> str:
    return f"{config.kernels}-{config.block_m}x{config.gemm1.block_n}x{config.gemm2.block_n}-T{config.max_tokens}"


def reduced_tensors() -> dict[str, tuple[tuple, torch.dtype]]:
    """contract.TENSORS for the reduced geometry."""
    hidden_blocks, intermediate_blocks = H // SCALE_BLOCK, I // SCALE_BLOCK
    shapes = {
        "hidden_states": ("T", H),
        "hidden_states_scale": (hidden_blocks, "T"),
        "gemm1_weights": (NUM_LOCAL_EXPERTS, 2 * I, H),
        "gemm1_weights_scale": (NUM_LOCAL_EXPERTS, 2 * intermediate_blocks, hidden_blocks),
        "gemm2_weights": (NUM_LOCAL_EXPERTS, H, I),
        "gemm2_weights_scale": (NUM_LOCAL_EXPERTS, hidden_blocks, intermediate_blocks),
        "output": ("T", H),
    }
    return {name: (shapes.get(name, shape), dtype) for name, (shape, dtype) in contract.TENSORS.items()}


def random_float8(seed: int, *shape: int) -> torch.Tensor:
    """float8_e4m3fn of random bits, |value| < 2, subnormals and -0 included; of three dimensions, the first only
    rolls one random matrix, which makes 1.4 GB of different experts in a second."""
    size = math.prod(shape[-2:])
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**63), 2**63 - 1, (size // 8,), generator=generator)
    matrix = words.view(torch.uint8) & 0xBF
    values = torch.zeros(shape, dtype=torch.uint8)
    for i, slab in enumerate(values.view(-1, size)):
        slab.copy_(matrix.roll(977 * i))
    return values.view(torch.float8_e4m3fn)


def random_scales(seed: int, *shape: int) -> torch.Tensor:
    """Signed float32 scales from 1/8 to 8: with a wrong index the result is wrong at first sight."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(2, shape, generator=generator) * 2.0 - 1.0
    return sign * torch.exp2(torch.rand(shape, generator=generator) * 6 - 3)


def activations(num_tokens: int, hidden_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The two hidden-state arguments."""
    return {
        "hidden_states": random_float8(1, num_tokens, hidden_size).to(device),
        "hidden_states_scale": random_scales(2, hidden_size // SCALE_BLOCK, num_tokens).to(device),
    }


def weights(hidden_size: int, intermediate_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The four weight arguments, every expert different."""
    E = NUM_LOCAL_EXPERTS
    hidden_blocks, intermediate_blocks = hidden_size // SCALE_BLOCK, intermediate_size // SCALE_BLOCK
    return {
        "gemm1_weights": random_float8(3, E, 2 * intermediate_size, hidden_size).to(device),
        "gemm1_weights_scale": random_scales(4, E, 2 * intermediate_blocks, hidden_blocks).to(device),
        "gemm2_weights": random_float8(5, E, hidden_size, intermediate_size).to(device),
        "gemm2_weights_scale": random_scales(6, E, hidden_blocks, intermediate_blocks).to(device),
    }


def router(
    num_tokens: int,
    device: torch.device,
    popularity: torch.Tensor | None = None,  # [256], added to every token's logits
    bias: torch.Tensor | None = None,  # [256]
    seed: int = 7,
) -> dict[str, torch.Tensor]:
    """The two router arguments: normal logits whose routing no rounding of the sigmoid can change."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens + num_tokens // 25 + 4, NUM_EXPERTS, generator=generator)
    if popularity is not None:
        logits += popularity
    bias = torch.zeros(NUM_EXPERTS) if bias is None else bias
    bias = bias.to(torch.bfloat16)
    logits = logits[reference.decision_gap(logits, bias) > CLEAR_GAP][:num_tokens]
    assert len(logits) == num_tokens, "more than one token in 25 was too close to call"
    return {"routing_logits": logits.to(device), "routing_bias": bias.to(device)}


def assigned(rows_per_expert: dict[int, int], num_tokens: int) -> torch.Tensor:
    """local_ids [T, 8] int64, -1 = none: expert e on rows_per_expert[e] random tokens, in random slots."""
    generator = torch.Generator().manual_seed(8)
    ids = torch.full((num_tokens, TOP_K), -1)
    for expert, rows in rows_per_expert.items():
        used = (ids >= 0).sum(1)
        tokens = (used + torch.rand(num_tokens, generator=generator)).argsort()[:rows]
        assert len(tokens) == rows and (used[tokens] < TOP_K).all(), "more rows than T tokens can have"
        ids[tokens, used[tokens]] = expert
    return ids.gather(1, torch.rand(ids.shape, generator=generator).argsort(1))


def distributions(block_m: int) -> dict[str, torch.Tensor]:
    """local_ids of the regimes that a grouped GEMM meets."""
    return {
        "tile boundaries": assigned({0: 1, 3: block_m - 1, 4: block_m, 31: block_m + 1}, block_m + 5),
        "half tiles": assigned({1: block_m // 2, 2: block_m // 2 + 1, 30: block_m + block_m // 2}, 2 * block_m),
        "one hot expert": assigned({7: 2 * block_m + 3}, 2 * block_m + 3),
        "many experts": assigned({e: 1 + e % 3 for e in range(0, NUM_LOCAL_EXPERTS, 2)}, 13),
        "one token": assigned({e: 1 for e in range(24, 32)}, 1),
        "no local expert": assigned({}, 3),
    }


DISTRIBUTIONS = list(distributions(16))


def workspace(ids: torch.Tensor, weights: torch.Tensor, hidden_size: int, intermediate_size: int,
              config: tuning.Config, device: torch.device) -> Workspace:
    """Scratch that holds the lists of local_ids [T, 8] and weights [T, 8], and otherwise what torch.empty gives."""
    ws = allocate(len(ids), hidden_size, intermediate_size, config, device)
    groups = intermediate_size // SCALE_BLOCK
    lists = reference.routing_lists(ids.to(device), weights.to(device), config, groups)
    for field in fields(lists):
        getattr(ws, field.name).copy_(getattr(lists, field.name))
    return ws


def fill_intermediate(ws: Workspace) -> None:
    """What GEMM1 may leave for the rows in use: scaled values up to the format's largest, NaN in the others."""
    generator = torch.Generator().manual_seed(9)
    shape = ws.intermediate.shape
    unused = torch.ones(shape[0], dtype=torch.bool)
    unused[reference.used_rows(ws).cpu()] = False
    if ws.intermediate.dtype == torch.float16:
        values = ((torch.rand(shape, generator=generator) * 2 - 1) * 32768).half()
        values[unused] = float("nan")
    else:
        codes = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        codes[codes & 0x7F == 0x7F] = 0x7E
        codes[unused] = 0x7F
        values = codes.view(torch.float8_e4m3fn)
    scale = random_scales(10, *ws.intermediate_scale.shape).abs()
    scale[:, unused] = float("nan")
    ws.intermediate.copy_(values)
    ws.intermediate_scale.copy_(scale)


def signature(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, so that a comparison is bitwise and NaN equals NaN."""
    return tensor.contiguous().view(torch.uint8)

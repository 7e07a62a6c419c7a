"""The operation in plain torch, one function a stage, float64 where rounding matters, with bounds on what the kernels
may differ by."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from solution.triton.contract import INTERPRETED, NUM_GROUPS, NUM_LOCAL_EXPERTS, SCALE_BLOCK, TOP_GROUPS, TOP_K
from solution.triton.tuning import Config
from solution.triton.workspace import Workspace, max_rows, max_tiles

# Error of a product of scaled 128-wide blocks, relative to the sum of its terms' magnitudes. In float32 each of 128
# additions and of K / 128 promotions (56 at most) rounds by 2^-24: 184 * 2^-24 < 2^-16. Hopper's float8 tensor cores
# align the 32 terms of an instruction, and the running sum, to the largest and cut them after 13 bits; a cut of 2^-13
# of the largest for each of 33 addends in 4 instructions would be 2^-6, if the largest were the sum. It is a part of
# it, and cuts add up like a random walk: sqrt(132) * 2^-13 is below 2^-9. Seen on an H100: a little over 2^-11.
PRODUCT_ERROR = 2**-16 if INTERPRETED else 2**-9
# Half a unit in the last place of a normal number, relative to it, and of a subnormal one, absolute.
HALF_ULP = {torch.float16: (2**-11, 2**-25), torch.float8_e4m3fn: (2**-4, 2**-10)}
LARGEST = {torch.float16: 32768.0, torch.float8_e4m3fn: 448.0}  # what a row's channel group is scaled to
# The interpreter cuts float32 off where the GPU rounds to bfloat16.
BFLOAT16_ERROR = 2**-7 if INTERPRETED else 2**-8


@dataclass(frozen=True)
class Expected:
    """A result in float64 and how far from it a kernel may be."""

    value: torch.Tensor
    bound: torch.Tensor


def assert_within(actual: torch.Tensor, expected: Expected) -> None:
    """Every |actual - value| <= bound; otherwise fail with the element that is furthest out."""
    error = (actual.double() - expected.value).abs()
    bad = ~(error <= expected.bound)  # NaN is bad
    if not bad.any():
        return
    excess = torch.where(bad, (error / expected.bound).nan_to_num(nan=float("inf")), 0)
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{int(bad.sum())} of {bad.numel()} elements out of bounds, the first in rows "
        f"{bad.nonzero()[:, 0].unique().tolist()[:20]}; worst at {list(worst)}: got {float(actual[worst])}, "
        f"expected {float(expected.value[worst])} +- {float(expected.bound[worst])}"
    )


def route(logits: torch.Tensor, bias: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Global experts [T, 8] int64, best first, ties to the lower index, and their scaled weights [T, 8] float64."""
    _, ranked, _ = _ranked(logits, bias)
    experts = ranked[:, :TOP_K]
    chosen = torch.sigmoid(logits.double()).gather(1, experts)
    return experts, chosen / (chosen.sum(1, keepdim=True) + 1e-20) * factor


def decision_gap(logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[T]: the least difference that decides a token's groups or the order of its experts."""
    biased, ranked, scores = _ranked(logits, bias)
    scores = scores.sort(dim=1, descending=True).values
    group_gap = scores[:, TOP_GROUPS - 1] - scores[:, TOP_GROUPS]
    best = biased.gather(1, ranked[:, : TOP_K + 1])
    return torch.minimum(group_gap, (best[:, :-1] - best[:, 1:]).amin(1))


def _ranked(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sigmoid + bias [T, 256] float32, the experts of the kept groups first and best first, the groups' scores."""
    biased = torch.sigmoid(logits.double()).float() + bias.float()
    grouped = biased.view(len(logits), NUM_GROUPS, -1)
    scores = grouped.sort(dim=2, descending=True).values[:, :, :2].sum(2)
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :TOP_GROUPS]
    dropped = torch.ones_like(scores, dtype=torch.bool).scatter_(1, kept, False)
    candidates = grouped.masked_fill(dropped[:, :, None], float("-inf")).flatten(1)
    return biased, candidates.sort(dim=1, descending=True, stable=True).indices, scores


def local_ids(experts: torch.Tensor, local_expert_offset: int) -> torch.Tensor:
    """Local expert of each slot, -1 where it is not local."""
    local = experts - local_expert_offset
    return torch.where((local >= 0) & (local < NUM_LOCAL_EXPERTS), local, -1)


@dataclass(frozen=True)
class Lists:
    """What routing leaves in the workspace for the later stages, named and shaped as there."""

    topk_weights: torch.Tensor
    expert_masks: torch.Tensor
    token_rows: torch.Tensor
    row_tokens: torch.Tensor
    first_tiles: torch.Tensor
    tile_experts: torch.Tensor
    tile_starts: torch.Tensor
    tile_ends: torch.Tensor
    num_tiles: torch.Tensor
    arrivals: torch.Tensor
    stored: torch.Tensor
    ticket: torch.Tensor
    gemm2_ticket: torch.Tensor


def routing_lists(ids: torch.Tensor, weights: torch.Tensor, config: Config, num_channel_groups: int) -> Lists:
    """The lists of local expert ids [T, 8] (-1 = none) and weights [T, 8]; 5 in what a kernel must not rely on."""
    num_tokens, device = len(ids), ids.device
    tokens, slots = (ids >= 0).nonzero(as_tuple=True)
    experts = ids[tokens, slots]
    order = (experts * num_tokens + tokens).argsort()
    counts = experts.bincount(minlength=NUM_LOCAL_EXPERTS)
    aligned = -(-counts // config.row_alignment) * config.row_alignment
    starts = aligned.cumsum(0) - aligned
    gaps = starts - (counts.cumsum(0) - counts)  # before each expert's rows, compared with rows side by side
    rows = torch.arange(len(order), device=device) + gaps[experts[order]]
    token_rows = torch.full_like(ids, -1)
    token_rows[tokens[order], slots[order]] = rows
    row_tokens = torch.full((max_rows(num_tokens, config.row_alignment),), 5, device=device)
    row_tokens[rows] = tokens[order]

    tiles = [
        (expert, first, min(first + config.block_m, start + count))
        for expert, (start, count) in enumerate(zip(starts.tolist(), counts.tolist()))
        for first in range(start, start + count, config.block_m)
    ]
    tiles_per_expert = -(-counts // config.block_m)
    first_tiles = torch.cat([tiles_per_expert.new_zeros(1), tiles_per_expert.cumsum(0)]).int()
    padding = max_tiles(num_tokens, config.block_m) - len(tiles)
    padded = torch.tensor(tiles + [(5, 5, 5)] * padding, dtype=torch.int32)
    tile_experts, tile_starts, tile_ends = (column.to(device, copy=True) for column in padded.T.contiguous())
    counted_tiles = len(tiles) + padding if config.streaming else 0
    masks = torch.where(ids >= 0, 2 ** ids.clamp(min=0), 0).sum(1)
    return Lists(
        topk_weights=weights.float(),
        expert_masks=torch.where(masks < 2**31, masks, masks - 2**32).int(),
        token_rows=token_rows.int(),
        row_tokens=row_tokens.int(),
        first_tiles=first_tiles,
        tile_experts=tile_experts,
        tile_starts=tile_starts,
        tile_ends=tile_ends,
        num_tiles=torch.tensor([len(tiles)], dtype=torch.int32, device=device),
        arrivals=torch.zeros(counted_tiles, num_channel_groups, dtype=torch.int32, device=device),
        stored=torch.zeros(counted_tiles, dtype=torch.int32, device=device),
        ticket=torch.zeros(1, dtype=torch.int32, device=device),
        gemm2_ticket=torch.zeros(1, dtype=torch.int32, device=device),
    )


def used_rows(routing: Lists | Workspace) -> torch.Tensor:
    """[rows] int64: the rows in use, ascending: all before the last one, but for gaps where experts are aligned."""
    return routing.token_rows[routing.token_rows >= 0].long().sort().values


def row_experts(routing: Lists | Workspace) -> torch.Tensor:
    """[rows] int64: the local expert of every row in use, ascending, read off the tiles."""
    num_tiles = int(routing.num_tiles)
    rows_per_tile = (routing.tile_ends - routing.tile_starts)[:num_tiles]
    return routing.tile_experts[:num_tiles].long().repeat_interleave(rows_per_tile)


def dequantised(values: torch.Tensor, scale: torch.Tensor, rows_per_scale: int) -> torch.Tensor:
    """values [R, C] times one scale [R / rows_per_scale, C / 128] per block, float64."""
    rows, columns = values.shape
    blocks = values.double().view(rows // rows_per_scale, rows_per_scale, columns // SCALE_BLOCK, SCALE_BLOCK)
    return (blocks * scale.double()[:, None, :, None]).view(rows, columns)


def grouped_product(a: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor) -> Expected:
    """a [R, K] float64 times the transposed [N, K] weights of every row's expert."""
    value = torch.zeros(len(a), weights.shape[1], dtype=torch.float64, device=a.device)
    magnitude = torch.zeros_like(value)
    for expert in experts.unique().tolist():
        rows = experts == expert
        w = dequantised(weights[expert], scale[expert], SCALE_BLOCK)
        value[rows] = a[rows] @ w.T
        magnitude[rows] = a[rows].abs() @ w.abs_().T
    return Expected(value, magnitude * PRODUCT_ERROR)


def gemm1_swiglu(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    weights: torch.Tensor,
    weights_scale: torch.Tensor,
    row_tokens: torch.Tensor,
    experts: torch.Tensor,
    dtype: torch.dtype,
) -> Expected:
    """silu(gate) * up of every row, as values of `dtype` times a row's scale of each channel group.

    |silu| <= |gate| and |silu'| <= 1.1 carry the products' errors through; exp, division and two multiplications add
    2^-16 relative (an error of 2^-23 in the exponent of exp(-gate) grows by |gate| <= 104, where it underflows).
    """
    tokens = row_tokens.long()
    a = dequantised(hidden_states[tokens], hidden_states_scale.T[tokens], 1)
    product = grouped_product(a, experts, weights, weights_scale)
    (up, gate), (up_error, gate_error) = product.value.chunk(2, 1), product.bound.chunk(2, 1)
    silu = gate * torch.sigmoid(gate)
    value = silu * up
    before = silu.abs() * up_error + 1.1 * gate_error * (up.abs() + up_error) + 2**-16 * value.abs()
    relative, absolute = HALF_ULP[dtype]
    groups = (value.abs() + before).unflatten(1, (-1, SCALE_BLOCK)).amax(2).repeat_interleave(SCALE_BLOCK, 1)
    rounding = relative * (value.abs() + before) + absolute / LARGEST[dtype] * groups
    return Expected(value, before + rounding + 1e-30)  # the kernel takes a group's largest to be 1e-30 at least


def gemm2(
    values: torch.Tensor,
    scale: torch.Tensor,
    weights: torch.Tensor,
    weights_scale: torch.Tensor,
    experts: torch.Tensor,
    dtype: torch.dtype,
) -> Expected:
    """The down projection of an intermediate [R, I] and its scale [I / 128, R], rounded to `dtype`."""
    product = grouped_product(dequantised(values, scale.T, 1), experts, weights, weights_scale)
    if dtype == torch.float32:
        return product
    return Expected(product.value, product.bound + 2**-8 * (product.value.abs() + product.bound))


def finalize(expert_rows: torch.Tensor, topk_weights: torch.Tensor, token_rows: torch.Tensor) -> Expected:
    """The weighted sum [T, H] of each token's rows: 8 float32 roundings of its terms and one to bfloat16."""
    terms = expert_rows.double()[token_rows.clamp(min=0).long()] * topk_weights.double()[:, :, None]
    terms = torch.where((token_rows >= 0)[:, :, None], terms, 0)
    value = terms.sum(1)
    before = terms.abs().sum(1) * TOP_K * 2**-24
    return Expected(value, before + BFLOAT16_ERROR * (value.abs() + before))


def moe(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
) -> torch.Tensor:
    """The whole operation in float64, [T, H]."""
    experts, weights = route(routing_logits, routing_bias, routed_scaling_factor)
    tokens, slots = (local_ids(experts, local_expert_offset) >= 0).nonzero(as_tuple=True)
    row_experts = experts[tokens, slots] - local_expert_offset
    a = dequantised(hidden_states[tokens], hidden_states_scale.T[tokens], 1)
    up, gate = grouped_product(a, row_experts, gemm1_weights, gemm1_weights_scale).value.chunk(2, 1)
    rows = grouped_product(gate * torch.sigmoid(gate) * up, row_experts, gemm2_weights, gemm2_weights_scale).value
    output = torch.zeros(hidden_states.shape, dtype=torch.float64, device=hidden_states.device)
    return output.index_add_(0, tokens, rows * weights[tokens, slots, None])

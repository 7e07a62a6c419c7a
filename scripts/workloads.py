"""The 19 published workloads of the benchmark, with router tensors synthesised to match them.

The published tensors themselves are not part of this repository. What is kept of each workload is what decides its
cost: T, the rank's expert offset, how many local experts are active and how many rows they get.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

NUM_EXPERTS, NUM_LOCAL_EXPERTS = 256, 32
NUM_GROUPS, KEPT_GROUPS, TOP_K = 8, 4, 8
ROUTED_SCALING_FACTOR = 2.5  # in every published workload
MAX_TICKETS = 8  # an expert's popularity is 1 to 8: rows per expert differ as much as 8 to 1
SWEEP_OFFSET = 32  # local_expert_offset of the sweep's workloads: one whole group is local
DRAW_SEED = 12  # with it the very first token has local experts
SPREADS = {  # how the rows are divided among the 32 local experts, as weights
    "equal": [1] * NUM_LOCAL_EXPERTS,
    "Zipf": [1 / rank for rank in range(1, NUM_LOCAL_EXPERTS + 1)],
    "one hot expert": [NUM_LOCAL_EXPERTS - 1, *[1] * (NUM_LOCAL_EXPERTS - 1)],  # it has half of the rows
}


@dataclass(frozen=True)
class PublishedWorkload:
    """One workload of the benchmark.

    uuid: its name in the published data set, and the seed of its router tensors.
    num_tokens: T.
    local_expert_offset: global index of the rank's first expert.
    active_experts: local experts with at least one row, estimated from published B200 latencies.
    num_rows: (token, local expert) pairs. Where a routing of that T was measured, its rows; elsewhere 1.6 to 3.6 per
        token, the more the more experts are active.
    """

    uuid: str
    num_tokens: int
    local_expert_offset: int
    active_experts: int
    num_rows: int


PUBLISHED = (
    PublishedWorkload("e05c6c03-5603-4a1c-b34c-dcce0ecaeea4", 1, 32, 5, 5),
    PublishedWorkload("b8f4f012-a32e-4356-b4e1-7665b3d598af", 7, 192, 12, 18),
    PublishedWorkload("8cba5890-4288-448a-93b8-42c14c6b9420", 14, 0, 19, 48),
    PublishedWorkload("2e69caee-ae5c-473b-aa99-5dc6659829d4", 15, 32, 9, 24),
    PublishedWorkload("a7c2bcfd-a2f4-479e-8d32-200115df89cf", 16, 224, 20, 67),
    PublishedWorkload("6230e838-67ca-41dd-a9d6-6f36b7676c6b", 32, 32, 30, 105),
    PublishedWorkload("f7d6ac7c-24ec-47e4-aefc-4863a5e3e1d9", 52, 160, 24, 104),
    PublishedWorkload("fc378037-e8fa-4305-b00f-4af47933fd53", 53, 32, 30, 175),
    PublishedWorkload("76010cb4-f73c-4145-8365-8642a2ce99de", 54, 128, 31, 188),
    PublishedWorkload("81955b1e-086f-49c1-9f40-a18a5aaf509d", 55, 128, 31, 192),
    PublishedWorkload("4822167c-dae5-4bb1-bb53-e4adb256245b", 56, 64, 32, 201),
    PublishedWorkload("74d7ff04-0365-4cf8-a824-ce61b7131dea", 57, 96, 31, 186),
    PublishedWorkload("e626d3e6-6c29-4fd8-bb7c-5b09eec61702", 58, 64, 32, 207),
    PublishedWorkload("eedc63b2-c03b-4cf2-8d16-1f46566e3af7", 59, 160, 27, 134),
    PublishedWorkload("5eadab1e-a0e3-4966-b0fd-1115cd77497c", 62, 96, 24, 110),
    PublishedWorkload("8f1ff9f1-6747-41d1-a1d8-2868cdacf893", 80, 96, 32, 151),
    PublishedWorkload("1a4c6ba1-3cd2-4d7d-b716-84f2d52b69fc", 901, 96, 32, 743),
    PublishedWorkload("58a34f27-7995-4155-8b46-f60a7225e20e", 11948, 128, 32, 10838),
    PublishedWorkload("5e8dc11c-f2a9-42d5-8dce-9419cbf34d5d", 14107, 32, 32, 10821),
)


def small_workloads() -> tuple[PublishedWorkload, ...]:
    """Three workloads of T = 1, 3, 7 for machines without a GPU; two have offsets that no published workload has."""
    return tuple(
        PublishedWorkload(str(uuid.uuid5(uuid.NAMESPACE_OID, f"small T={T}")), T, offset, active, rows)
        for T, offset, active, rows in ((1, 32, 3, 3), (3, 17, 5, 7), (7, -8, 8, 14))
    )


def router_tensors(workload: PublishedWorkload) -> dict[str, torch.Tensor]:
    """routing_logits [T, 256] float32 and routing_bias [256] bfloat16 that route as `workload` says.

    Each token's 8 experts are drawn first, in at most 4 groups; their logits are then uniform in [0.5, 4.5), all
    others in [-6, -2), and the bias in [-1/16, 1/16). A chosen expert has sigmoid + bias > 0.55 and any other one
    between -0.07 and 0.19, so that a group with a chosen expert scores above 0.48, one without below 0.38, and the
    routing is as drawn. Same bytes everywhere: Philox's raw integers, integer comparisons, and floats that are exact.

    Raises ValueError if no routing has the workload's numbers of active experts and rows.
    """
    random_raw = np.random.Philox(key=uuid.UUID(workload.uuid).int).random_raw  # uint64, fixed across numpy versions
    return _tensors(draw_experts(workload, random_raw), random_raw)


def spread_router(rows_per_expert: Sequence[int], num_tokens: int) -> dict[str, torch.Tensor]:
    """Router tensors as `router_tensors` makes them, for a rank at SWEEP_OFFSET whose local experts, in a random
    order, get exactly these numbers of rows, on random tokens.

    Raises ValueError if num_tokens tokens cannot have these rows.
    """
    rows = np.asarray(rows_per_expert)
    num_rows = int(rows.sum())
    # Routing by groups sends a token either past a rank or to about two of its experts.
    num_visitors = min(num_tokens, max(-(-num_rows // 2), int(rows.max())))
    if len(rows) > NUM_LOCAL_EXPERTS or rows.max() > num_visitors or num_rows > num_visitors * TOP_K:
        raise ValueError(
            f"rows_per_expert: expected at most {NUM_LOCAL_EXPERTS} experts with at most T = {num_tokens} rows each "
            f"and {TOP_K} T in all, got {rows.tolist()}"
        )
    random_raw = np.random.Philox(key=num_tokens).random_raw
    local = np.arange(SWEEP_OFFSET, SWEEP_OFFSET + NUM_LOCAL_EXPERTS)
    experts = local[ranks(random_raw(len(local)))[: len(rows)]]
    # Rows are dealt to the visitors in turn, expert after expert, so that no expert meets a token twice.
    visitors = ranks(random_raw(num_tokens))[:num_visitors]
    chosen = np.zeros((num_tokens, NUM_EXPERTS), dtype=bool)
    chosen[visitors[np.arange(num_rows) % num_visitors], np.repeat(experts, rows)] = True
    return _tensors(_with_remote_experts(chosen, local, random_raw), random_raw)


def spread_rows(weights: Sequence[float], num_rows: int) -> list[int]:
    """num_rows divided in proportion to the weights, each share rounded so that the sum is exact."""
    ends = np.rint(np.cumsum(weights) / np.sum(weights) * num_rows).astype(int)
    return np.diff(ends, prepend=0).tolist()


def drawn_router(num_tokens: int) -> dict[str, torch.Tensor]:
    """Router tensors without a preference, for a rank at SWEEP_OFFSET: independent uniform logits, so that an eighth of
    the pairs is local.

    Fewer tokens are the first of more: from one T to the next, rows and active experts only grow.
    """
    random_raw = np.random.Philox(key=DRAW_SEED).random_raw
    logits = (random_raw((num_tokens, NUM_EXPERTS)) >> np.uint64(44)).astype(np.float64) / 2**18 - 2
    return {
        "routing_logits": torch.from_numpy(logits.astype(np.float32)),
        "routing_bias": torch.zeros(NUM_EXPERTS, dtype=torch.bfloat16),
    }


def _tensors(chosen: np.ndarray, random_raw: Callable[..., np.ndarray]) -> dict[str, torch.Tensor]:
    """The router tensors of `router_tensors` for chosen [T, 256] bool."""
    fraction = (random_raw(chosen.shape) >> np.uint64(44)).astype(np.float64) / 2**20
    logits = np.where(chosen, 0.5, -6.0) + 4 * fraction
    bias = ((random_raw(NUM_EXPERTS) >> np.uint64(57)).astype(np.float64) - 64) / 2**10
    return {
        "routing_logits": torch.from_numpy(logits.astype(np.float32)),
        "routing_bias": torch.from_numpy(bias).to(torch.bfloat16),
    }


def draw_experts(workload: PublishedWorkload, random_raw: Callable[..., np.ndarray]) -> np.ndarray:
    """chosen [T, 256] bool: 8 experts of each token, `active_experts` local ones in `num_rows` pairs."""
    T, num_active, num_rows = workload.num_tokens, workload.active_experts, workload.num_rows
    offset = workload.local_expert_offset
    local = np.arange(max(offset, 0), min(offset + NUM_LOCAL_EXPERTS, NUM_EXPERTS))
    most_per_token = min(TOP_K, num_active)
    if not (1 <= num_active <= len(local) and num_active <= num_rows <= T * most_per_token):
        raise ValueError(
            f"workload {workload.uuid}: expected 1 <= active_experts <= {len(local)} and active_experts <= num_rows "
            f"<= {T * most_per_token}, got active_experts {num_active} and num_rows {num_rows}"
        )
    active = local[ranks(random_raw(len(local)))[:num_active]]

    # Routing by groups sends a token either past a rank or to about two of its experts.
    num_visitors = min(T, max(-(-num_rows // 2), -(-num_rows // most_per_token)))
    visitors = ranks(random_raw(T))[:num_visitors]
    slots = ranks(random_raw(num_visitors * most_per_token))[:num_rows]
    token_of_row = visitors[slots // most_per_token]
    rows_per_token = np.bincount(token_of_row, minlength=T)[:, None]

    # A raffle: the best of an expert's tickets counts, so a token picks it in proportion to their number. The first
    # rows are dealt out beforehand, one to each active expert, so that none stays empty.
    tickets = 1 + (random_raw(num_active) % np.uint64(MAX_TICKETS)).astype(np.int64)
    first_ticket = np.cumsum(tickets) - tickets
    prize = np.maximum.reduceat(random_raw((T, int(tickets.sum()))), first_ticket, axis=1)
    prize[token_of_row[:num_active], np.arange(num_active)] = np.iinfo(np.uint64).max
    chosen = np.zeros((T, NUM_EXPERTS), dtype=bool)
    chosen[:, active] = ranks(~prize) < rows_per_token
    return _with_remote_experts(chosen, local, random_raw)


def _with_remote_experts(chosen: np.ndarray, local: np.ndarray, random_raw: Callable[..., np.ndarray]) -> np.ndarray:
    """chosen [T, 256] bool with each token's experts filled up to 8, from groups without local experts."""
    T = len(chosen)
    local_groups = np.unique(local // (NUM_EXPERTS // NUM_GROUPS))
    group_key = random_raw((T, NUM_GROUPS))
    group_key[:, local_groups] = np.iinfo(np.uint64).max
    remote = np.repeat(ranks(group_key) < KEPT_GROUPS - len(local_groups), NUM_EXPERTS // NUM_GROUPS, axis=1)
    expert_key = np.where(remote, random_raw((T, NUM_EXPERTS)), np.iinfo(np.uint64).max)
    return chosen | (ranks(expert_key) < TOP_K - chosen.sum(axis=1, keepdims=True))


def ranks(keys: np.ndarray) -> np.ndarray:
    """Rank of each key along the last axis, 0 the smallest; of random keys, a random permutation."""
    return keys.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")

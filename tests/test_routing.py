"""Routing against plain torch: indices exactly, weights to rounding, and the lists that the GEMMs walk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from solution.triton import routing as stage
from solution.triton.contract import INTERPRETED, NUM_EXPERTS, NUM_LOCAL_EXPERTS, SCALE_BLOCK, TOP_K
from solution.triton.tuning import Config
from solution.triton.workspace import Workspace, allocate, max_rows, max_tiles
from tests import cases, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

FACTOR = 2.5
NUM_CHANNEL_GROUPS = 3
# Around the routing kernels' blocks of tokens.
TOKENS = [1, 3, 4, 5, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000]
DRAW_TOKENS = 400 if INTERPRETED else 20_000  # a token takes 10 ms in the interpreter
OFFSETS = [0, 17, 224, 250, -8, -32, 256, 2**40, -(2**40)]


def config_of(block_m: int) -> Config:
    """Tiles of 128 rows are the Hopper kernels', whose experts are aligned."""
    return replace(cases.STREAMING, block_m=block_m, kernels="hopper" if block_m == 128 else "streaming")


def route(logits: torch.Tensor, bias: torch.Tensor, offset: int, block_m: int) -> Workspace:
    """The workspace after a call."""
    config = config_of(block_m)
    ws = allocate(len(logits), SCALE_BLOCK, NUM_CHANNEL_GROUPS * SCALE_BLOCK, config, logits.device)
    stage.route(logits, bias, offset, FACTOR, ws, config)
    return ws


def check(routing: Workspace, logits: torch.Tensor, bias: torch.Tensor, offset: int, block_m: int) -> None:
    """Routing's every field against the reference's. In float32, sigmoids, sum, division and scaling cost 2^-19."""
    experts, weights = reference.route(logits, bias, FACTOR)
    ids = reference.local_ids(experts, offset)
    expected = reference.routing_lists(ids, weights, config_of(block_m), NUM_CHANNEL_GROUPS)
    rows, num_tiles = reference.used_rows(expected), int(expected.num_tiles)
    assert int(routing.num_tiles) == num_tiles <= routing.max_tiles == max_tiles(len(logits), block_m)
    assert torch.equal(routing.token_rows, expected.token_rows)
    assert torch.equal(routing.row_tokens[rows], expected.row_tokens[rows])
    assert torch.equal(routing.first_tiles, expected.first_tiles)
    for name in ("tile_experts", "tile_starts", "tile_ends"):
        assert torch.equal(getattr(routing, name)[:num_tiles], getattr(expected, name)[:num_tiles]), name
    assert torch.equal(routing.expert_masks, expected.expert_masks)
    for name in ("arrivals", "stored", "ticket", "gemm2_ticket"):
        assert torch.equal(getattr(routing, name), getattr(expected, name)), name
    reference.assert_within(routing.topk_weights, reference.Expected(weights, weights * 2**-19 + 1e-30))


def check_invariants(routing: Workspace, block_m: int) -> None:
    """What the GEMMs rely on, read off the lists alone."""
    num_tiles = int(routing.num_tiles)
    experts, starts, ends = (
        getattr(routing, name)[:num_tiles].long() for name in ("tile_experts", "tile_starts", "tile_ends")
    )
    used = reference.used_rows(routing)
    rows = torch.cat([torch.arange(a, b) for a, b in zip(starts.tolist(), ends.tolist())] or [torch.arange(0)])
    assert torch.equal(rows, used.cpu()), "tiles hold every row once"
    first_of_expert = experts.diff(prepend=experts.new_tensor([-1])) != 0
    assert (starts[first_of_expert] % config_of(block_m).row_alignment == 0).all()
    assert (ends <= routing.max_rows).all()
    assert ((ends - starts >= 1) & (ends - starts <= block_m)).all()
    assert (experts.diff() >= 0).all() and ((experts >= 0) & (experts < NUM_LOCAL_EXPERTS)).all()
    keys = reference.row_experts(routing) * len(routing.token_rows) + routing.row_tokens[used]
    assert (keys.diff() > 0).all(), "rows are sorted by expert, then by token"
    placed = routing.token_rows[routing.token_rows >= 0].long()
    assert len(placed.unique()) == len(placed), "each row has one slot"
    tokens = (routing.token_rows >= 0).nonzero()[:, 0]
    assert torch.equal(routing.row_tokens[placed].long(), tokens), "a token's rows are its own"


def draw(name: str, num_tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Router arguments of one kind.

    Tied kinds only hold numbers on which float32 arithmetic is exact, so that equals are equal for everyone: sigmoids
    0, 0.5 and 1, at logits -200, 0 and 200, and biases that are small multiples of 1/64.
    """
    generator = torch.Generator().manual_seed(13)
    popularity = torch.randn(NUM_EXPERTS, generator=generator)
    if name == "random":
        return cases.router(num_tokens, device)
    if name == "skewed":
        return cases.router(num_tokens, device, popularity=2 * popularity)
    if name == "biased":
        return cases.router(num_tokens, device, bias=popularity)
    levels = {"tied": [-200.0, 0.0, 200.0], "all equal": [0.0], "tied and biased": [0.0, 200.0]}[name]
    logits = torch.tensor(levels)[torch.randint(len(levels), (num_tokens, NUM_EXPERTS), generator=generator)]
    bias = torch.randint(-4, 5, (NUM_EXPERTS,), generator=generator) / 64 * (name == "tied and biased")
    return {"routing_logits": logits.to(device), "routing_bias": bias.to(device, torch.bfloat16)}


@pytest.mark.parametrize("name", ["random", "skewed", "biased", "tied", "tied and biased", "all equal"])
def test_choice_is_exact(device, name):
    """Groups, experts, their order and ties (to the lower index) are the definition's for every token."""
    num_tokens = 5 if name == "all equal" else DRAW_TOKENS
    inputs = draw(name, num_tokens, device)
    offset = {"tied": 0, "all equal": 3}.get(name, 32)  # ties gather at low indices
    routing = route(*inputs.values(), offset, 16)
    assert (routing.token_rows >= 0).any()
    check(routing, *inputs.values(), offset, 16)
    check_invariants(routing, 16)


@pytest.mark.parametrize("num_tokens", TOKENS if INTERPRETED else [*TOKENS, 8191, 8193, 32_769, 65_536])
def test_number_of_tokens(device, num_tokens):
    """Blocks of tokens that are full, one short and one over, tied throughout; rows of most tokens are local."""
    inputs = draw("tied and biased", num_tokens, device)
    inputs["routing_bias"][64:96] += 0.25
    for block_m in (64, 128):
        routing = route(*inputs.values(), 64, block_m)
        check(routing, *inputs.values(), 64, block_m)
        check_invariants(routing, block_m)


@pytest.mark.parametrize("offset", OFFSETS)
def test_offset(device, offset):
    """Experts outside 0..255 do not exist, however far outside the offset itself is."""
    inputs = draw("random", 40, device)
    routing = route(*inputs.values(), offset, 16)
    check(routing, *inputs.values(), offset, 16)
    assert (int(routing.num_tiles) > 0) == (-32 < offset < 256)


def test_one_hot_expert(device):
    """All tokens share one local expert, whose tiles are as many as they can be; the other 31 are empty."""
    inputs = draw("random", 150, device)
    inputs["routing_logits"][:, 40] = 8
    inputs["routing_bias"][41:72] = -4
    inputs["routing_bias"][40] = 2
    routing = route(*inputs.values(), 40, 16)
    check(routing, *inputs.values(), 40, 16)
    assert (routing.token_rows[:, 0] >= 0).all() and (routing.token_rows[:, 1:] == -1).all()


def test_as_many_tiles_as_there_can_be(device):
    """Four tokens on 32 experts, a row each: the list is full to its last entry."""
    logits = torch.full((4, NUM_EXPERTS), -4.0)
    for token in range(4):
        logits[token, 64 + token : 96 : 4] = 4 - torch.arange(8) / 8
    inputs = [logits.to(device), torch.zeros(NUM_EXPERTS, dtype=torch.bfloat16, device=device)]
    routing = route(*inputs, 64, 16)
    assert int(routing.num_tiles) == routing.max_tiles == 32
    check(routing, *inputs, 64, 16)


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_bound_on_tiles(block_m):
    """No distribution of rows needs more tiles than are allocated: tried is the one that wastes most."""
    for num_tokens in [*range(1, 300), 901, 14_107, 65_536]:
        rows = num_tokens * TOP_K
        active = min(NUM_LOCAL_EXPERTS, rows)
        rest = rows - active  # one row opens a tile for each expert; each further block_m rows open one more
        room = active * ((num_tokens - 1) // block_m)  # an expert has at most T rows
        assert active + min(rest // block_m, room) <= max_tiles(num_tokens, block_m) <= rows


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 100, 65_536])
def test_bound_on_rows(num_tokens):
    """No distribution of rows needs more than are allocated: tried is one row on all experts but one."""
    slots = num_tokens * TOP_K
    counts = torch.ones(min(NUM_LOCAL_EXPERTS, slots), dtype=torch.long)
    counts[0] += slots - len(counts)
    assert max_rows(num_tokens, 1) == slots
    bound = max_rows(num_tokens, 64)
    assert int((-(-counts // 64) * 64).sum()) <= bound <= slots + 63 * NUM_LOCAL_EXPERTS and bound % 64 == 0


def test_excluded_experts(device):
    """A bias of -inf excludes an expert as long as eight others are left in the kept groups."""
    inputs = draw("random", 50, device)
    inputs["routing_bias"][::2] = float("-inf")
    for offset in (0, 96):
        routing = route(*inputs.values(), offset, 16)
        check(routing, *inputs.values(), offset, 16)
        assert (reference.row_experts(routing) % 2 == 1).all()


def chosen_experts(logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[T, 8] global experts, collected from the eight ranks that hold 32 of them each; a slot nobody has is -1."""
    chosen = torch.full((len(logits), TOP_K), -1, device=logits.device)
    for offset in range(0, NUM_EXPERTS, NUM_LOCAL_EXPERTS):
        routing = route(logits, bias, offset, 16)
        check_invariants(routing, 16)
        here = routing.token_rows >= 0
        assert (chosen[here] == -1).all(), "a slot belongs to one rank"
        position = torch.searchsorted(reference.used_rows(routing), routing.token_rows[here].long())
        chosen[here] = reference.row_experts(routing)[position] + offset
    return chosen


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["logits", "bias"])
def test_no_value_breaks_the_lists(device, value, where):
    """NaN and infinities, few or everywhere, give eight different experts in range, and other tokens their own."""
    inputs = draw("random", 8, device)
    experts, _ = reference.route(*inputs.values(), FACTOR)
    if where == "logits":
        logits = inputs["routing_logits"]
        logits[1, 5] = logits[2, ::3] = logits[3] = logits[4, :32] = logits[5, 40:] = value
    else:
        inputs["routing_bias"][3:250] = value
    chosen = chosen_experts(*inputs.values())
    assert (chosen >= 0).all()
    assert all(len(set(row)) == TOP_K for row in chosen.tolist())
    if where == "logits":
        assert torch.equal(chosen[[0, 6, 7]], experts[[0, 6, 7]])


def test_same_bits_every_time(device):
    """Two calls agree to the bit."""
    inputs = draw("random", 70, device)
    first, second = (route(*inputs.values(), 64, 16) for _ in range(2))
    assert torch.equal(first.token_rows, second.token_rows)
    assert torch.equal(cases.signature(first.topk_weights), cases.signature(second.topk_weights))

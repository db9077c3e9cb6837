"""`route`, `swiglu` and `latent_rows`: every instruction set against plain loops and the model.

Letters: T tokens, D hidden, E experts, G groups, H heads, N no-rope dims, P rope dims, C latent.
"""

import math

import pytest
import torch
from helpers import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_kernel import DTYPE, ISA, needs_kernel
from torch import Tensor

from dvpa.engine.layers import Router
from dvpa.model.attention import DvpaRMSNorm, rotate
from dvpa.model.experts import DvpaMLP
from dvpa.model.router import DvpaRouter, TierPlan
from dvpa_kernels import RouterTable, latent_rows, route, swiglu
from dvpa_kernels.attention import latent_rows_torch
from dvpa_kernels.cpu.attention import latent_rows_cpu
from dvpa_kernels.cpu.dense import swiglu_cpu
from dvpa_kernels.cpu.router import route_cpu
from dvpa_kernels.dense import swiglu_torch
from dvpa_kernels.router import route_torch

TABLE = RouterTable((4, 8, 16), (2, 3, 5), (1, 1, 3), (1.4, 1.7, 2.2), 4, True)


def random_table(data: st.DataObject) -> RouterTable:
    """Tiers that grow, limited to some of their groups or not."""
    sizes = sorted(data.draw(st.sets(st.integers(2, 9), min_size=1, max_size=3)))
    size, is_striped = data.draw(st.integers(2, 9)), data.draw(st.booleans())
    # Striped: `size` groups, of which the tiers have so many experts each; else so many groups.
    kept = tuple(data.draw(st.integers(1, size if is_striped else count)) for count in sizes)
    members = sizes if is_striped else [size] * len(sizes)
    return RouterTable(
        pool_sizes=tuple(count * size for count in sizes),
        top_k=tuple(
            data.draw(st.integers(1, min(groups * count, 8)))
            for groups, count in zip(kept, members, strict=True)
        ),
        topk_group=kept,
        scaling=tuple(0.5 + tier for tier in range(len(sizes))),
        group_size=1 if is_striped else size,
        norm_topk_prob=data.draw(st.booleans()),
        softmax=data.draw(st.booleans()),
        best_of_group=data.draw(st.sampled_from([1, 2])),
        stripes=size if is_striped else 0,
    )


def operands(
    table: RouterTable, tokens: int, hidden: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, router weight, biases and tiers, some of them none."""
    g = torch.Generator().manual_seed(seed)
    tiers, experts = len(table.pool_sizes), table.pool_sizes[-1]
    weight = torch.randn(experts, hidden, generator=g) / hidden**0.5
    bias = 0.3 * torch.randn(tiers, experts, generator=g)
    x = torch.randn(tokens, hidden, generator=g)
    return x.to(dtype), weight.to(dtype), bias, torch.randint(-1, tiers, (tokens,), generator=g)


def choose(
    scores: list[float], bias: list[float], table: RouterTable, tier: int
) -> tuple[list[int], list[float]]:
    """One token's experts and weights, by sorting."""
    pool = table.pool_sizes[tier]
    choice = torch.tensor(scores[:pool]) + torch.tensor(bias[:pool])  # in fp32, as the kernel adds
    groups: dict[int, list[int]] = {}
    for expert in range(pool):
        group = expert % table.stripes if table.stripes else expert // table.group_size
        groups.setdefault(group, []).append(expert)
    best = {
        group: float(choice[members].sort(descending=True).values[: table.best_of_group].sum())
        for group, members in groups.items()
    }
    kept = sorted(best, key=lambda group: (-best[group], group))[: table.topk_group[tier]]
    allowed = [expert for group in kept for expert in groups[group]]
    order = sorted(allowed, key=lambda expert: (-float(choice[expert]), expert))
    chosen = order[: table.top_k[tier]]
    total = sum(scores[expert] for expert in chosen) if table.norm_topk_prob else 1.0
    return chosen, [scores[expert] / total * table.scaling[tier] for expert in chosen]


def assert_routed(
    index: Tensor,
    weight: Tensor,
    x: Tensor,
    given: tuple[Tensor, Tensor, Tensor],
    table: RouterTable,
) -> None:
    """Every token against `choose`, with scores in fp64."""
    router, bias, tiers = given
    logits = x.double() @ router.double().T
    for t, tier in enumerate(tiers.tolist()):
        pool = logits[t, : table.pool_sizes[tier]]
        scores = pool.softmax(-1) if table.softmax else pool.sigmoid()
        expected, weights = ([], []) if tier < 0 else choose(
            scores.tolist(), bias[tier].tolist(), table, tier
        )  # fmt: skip
        count = len(expected)
        assert index[t, count:].eq(len(router)).all()
        assert weight[t, count:].eq(0).all()
        assert index[t, :count].tolist() == expected
        # fp32 sums of up to 128 products against fp64: a few units in the last place.
        exact = torch.tensor(weights, dtype=torch.float64)
        torch.testing.assert_close(weight[t, :count].double(), exact, rtol=2e-6, atol=1e-7)


@ISA
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_table(isa: str, data: st.DataObject) -> None:
    table = random_table(data)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tokens, hidden = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 80))
    x, *given_ = operands(table, tokens, hidden, dtype, data.draw(st.integers(0, 99)))
    highest = int(given_[2].max())
    chosen = route_cpu(x, *given_, table, highest, isa=isa, threads=data.draw(st.integers(1, 3)))
    assert chosen is not None
    assert chosen[0].shape == (tokens, max(table.top_k[: highest + 1], default=0))
    assert_routed(*chosen, x, (given_[0], given_[1], given_[2]), table)


@ISA
def test_of_equals_the_lower_index_goes_first(isa: str) -> None:
    """Scores from a handful of values: ties of experts and of groups."""
    g = torch.Generator().manual_seed(0)
    tokens, experts = 200, 16
    bias = torch.randint(-2, 3, (3, experts), generator=g) / 4
    tiers = torch.randint(0, 3, (tokens,), generator=g)
    x = torch.zeros(tokens, 8)  # every score is a half: the bias alone decides, without rounding
    chosen = route_cpu(x, torch.randn(experts, 8), bias, tiers, TABLE, 2, isa=isa)
    assert chosen is not None
    assert_routed(*chosen, x, (torch.zeros(experts, 8), bias, tiers), TABLE)
    constant = route_cpu(x, torch.zeros(16, 8), torch.zeros(3, 16), tiers, TABLE, 2, isa=isa)
    assert constant is not None
    for tier, row in zip(tiers.tolist(), constant[0].tolist(), strict=True):
        assert row == [*range(TABLE.top_k[tier]), *[16] * (5 - TABLE.top_k[tier])]


STRIPED = [
    {"name": "base", "experts_per_group": 2, "top_k": 2, "topk_group": 1,
     "routed_scaling_factor": 1.41},
    {"name": "middle", "experts_per_group": 3, "top_k": 3, "topk_group": 2,
     "routed_scaling_factor": 1.7},
    {"name": "top", "experts_per_group": 4, "top_k": 5, "topk_group": 3,
     "routed_scaling_factor": 2.2},
]  # fmt: skip


@ISA
@DTYPE
@pytest.mark.parametrize("is_striped", [False, True], ids=["prefix", "striped"])
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_it_is_the_model_s_router(
    dtype: torch.dtype, isa: str, is_striped: bool, scoring: str
) -> None:
    method = "noaux_tc" if scoring == "sigmoid" else "group_limited_greedy"
    pools = {"pool": "striped", "tiers": STRIPED} if is_striped else {}
    config = tiny_config(scoring_func=scoring, topk_method=method, **pools)
    router = DvpaRouter(config).to(dtype)
    x, weight, bias, tiers = operands(TABLE, 50, config.hidden_size, dtype)
    with torch.no_grad():
        router.weight.copy_(weight)
        router.tier_bias.copy_(bias)
        expected = router(x, TierPlan(tiers, 2))
    table = Router(router).table
    chosen = route_cpu(x, weight, bias, tiers, table, 2, isa=isa)
    assert chosen is not None
    for index, weights in (chosen, route_torch(x, weight, bias, tiers, table, 2)):
        assert torch.equal(index, expected.topk_index)
        torch.testing.assert_close(weights, expected.topk_weight, rtol=3e-6, atol=1e-7)


@ISA
@DTYPE
def test_neither_threads_nor_the_rest_of_the_batch_change_a_bit(
    dtype: torch.dtype, isa: str
) -> None:
    x, *given_ = operands(TABLE, 150, 2500, dtype)
    weight, bias, tiers = given_
    index, weights = route_cpu(x, weight, bias, tiers, TABLE, 2, isa=isa, threads=1) or ()
    for threads in (2, 7):
        again = route_cpu(x, weight, bias, tiers, TABLE, 2, isa=isa, threads=threads)
        assert again is not None
        assert torch.equal(again[0], index)
        assert torch.equal(again[1], weights)
    for first, last in ((0, 1), (3, 9), (60, 70), (100, 150)):
        part = slice(first, last)
        again = route_cpu(x[part], weight, bias, tiers[part], TABLE, 2, isa=isa)
        assert again is not None
        assert torch.equal(again[0], index[part])
        assert torch.equal(again[1], weights[part])
    base = tiers == 0  # the rows of one tier alone: fewer slots, the same in them
    lone = route(x[base], weight, bias, tiers[base], TABLE)[0]
    assert lone.shape[1] == 2
    assert torch.equal(lone, route(x, weight, bias, tiers, TABLE)[0][base, :2])


@ISA
def test_nan_chooses_experts_that_exist(isa: str) -> None:
    x, *given_ = operands(TABLE, 6, 12, torch.float32)
    x[1], x[4, 0] = math.nan, math.inf
    chosen = route_cpu(x, given_[0], given_[1], torch.full((6,), 2), TABLE, 2, isa=isa)
    assert chosen is not None
    assert all(len(set(row)) == 5 and max(row) < 16 for row in chosen[0].tolist())
    assert chosen[1][1].isnan().all()
    assert chosen[1][[0, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": (2, 3)}, r"top_k: \(2, 3\) must have one entry for each tier"),
        ({"pool_sizes": (4, 8, 15)}, "pool_sizes: 15 must be a multiple of group_size 4"),
        ({"topk_group": (1, 0, 3)}, "topk_group: 0 must be at least 1"),
        ({"top_k": (2, 5, 5)}, r"top_k: 5 must be in 1 \.\. 4"),
        ({"top_k": (0, 3, 5)}, r"top_k: 0 must be in 1 \.\. 4"),
        ({"group_size": 1, "top_k": (1, 1, 1)}, "where groups have one expert"),
    ],
)
def test_a_table_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterTable(**{**vars(TABLE), **changes})  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias, tiers = operands(TABLE, 5, 12, torch.float32)
    for message, given_ in {
        r"hidden, weight: shapes \(5, 11\), \(16, 12\)": (x[:, 1:], weight, bias, tiers),
        r"tier_bias: torch.float32 \(2, 16\) must be": (x, weight, bias[1:], tiers),
        "tier_bias: torch.float16": (x, weight, bias.half(), tiers),
        r"pools \(4, 8, 16\) must be within 15": (x, weight[1:], bias[:, 1:], tiers),
        r"tiers: torch.int32 \(5,\) must be torch.int64 \(5,\)": (x, weight, bias, tiers.int()),
        "weight: dtype torch.float16": (x, weight.half(), bias, tiers),
        r"weight: strides \(1, 16\)": (x, weight.T.contiguous().T, bias, tiers),
        "max_tier: 3 must be at most 2": (x, weight, bias, tiers + 9 - tiers - 6),
    }.items():
        with pytest.raises(ValueError, match=message):
            route(*given_, TABLE)


@needs_kernel
def test_a_tier_above_the_highest_is_refused() -> None:
    x, weight, bias, _ = operands(TABLE, 2, 12, torch.float32)
    with pytest.raises(ValueError, match="tiers: every entry must be below 2"):
        route(x, weight, bias, torch.tensor([0, 2]), TABLE, max_tier=1)


@ISA
@DTYPE
@pytest.mark.parametrize(("tokens", "hidden", "width"), [(1, 33, 70), (7, 16, 5), (40, 64, 600)])
def test_swiglu_is_the_model_s_mlp(
    tokens: int, hidden: int, width: int, dtype: torch.dtype, isa: str
) -> None:
    g = torch.Generator().manual_seed(width)
    mlp = DvpaMLP(tiny_config(hidden_size=hidden), width).to(dtype)
    x = torch.randn(tokens, hidden, generator=g).to(dtype)
    gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).detach()
    down = mlp.down_proj.weight.detach()
    y = swiglu_cpu(x, gate_up, down, isa=isa, threads=1)
    assert y is not None
    with torch.no_grad():
        bound = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        for got in (y, swiglu_torch(x, gate_up, down)):
            assert (got - mlp(x)).norm() <= bound * mlp(x).norm()
    assert torch.equal(y, swiglu_cpu(x, gate_up, down, isa=isa, threads=3))  # type: ignore[arg-type]
    assert torch.equal(y[-1:], swiglu_cpu(x[-1:], gate_up, down, isa=isa))  # type: ignore[arg-type]


def test_swiglu_refuses_what_does_not_fit() -> None:
    x, gate_up, down = torch.zeros(3, 8), torch.zeros(12, 8), torch.zeros(8, 6)
    assert swiglu(x, gate_up, down).shape == (3, 8)
    for message, given_ in {
        r"shapes \(12, 8\), \(8, 5\)": (x, gate_up, down[:, 1:]),
        r"x: shape \(3, 7\)": (x[:, 1:], gate_up, down),
        "w_down: strides": (x, gate_up, down.T.contiguous().T),
        "w_down: torch.float16": (x, gate_up, down.half()),
    }.items():
        with pytest.raises(ValueError, match=message):
            swiglu(*given_)


Rows = tuple[Tensor, Tensor, Tensor, float, Tensor, Tensor]


def row_operands(heads: int, nope: int, rope: int, latent: int, dtype: torch.dtype) -> Rows:
    """Query and row are slices of one projection."""
    g = torch.Generator().manual_seed(rope)
    query, tokens = heads * (nope + rope), 9
    projected = torch.randn(tokens, query + latent + rope, generator=g).to(dtype)
    angle = torch.randn(tokens, rope // 2, generator=g).repeat(1, 2)
    norm = (1 + 0.3 * torch.randn(latent, generator=g)).to(dtype)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return projected[:, :query], projected[:, query:], norm, 1e-6, cos, sin


@ISA
@DTYPE
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "nope", "rope", "latent"), [(1, 3, 2, 5), (4, 12, 16, 40), (3, 64, 130, 512)]
)
def test_latent_rows_are_the_model_s(
    heads: int, nope: int, rope: int, latent: int, interleaved: bool, dtype: torch.dtype, isa: str
) -> None:
    given_ = row_operands(heads, nope, rope, latent, dtype)
    query, row, norm, eps, cos, sin = given_
    slots = torch.tensor([11, 0, 5, 3, 7, 2, 8, 1, 9])
    caches = [torch.full((4, 3, latent + rope), math.nan, dtype=dtype) for _ in range(2)]
    sizes = (slots, heads, nope)
    out = latent_rows_cpu(*given_, interleaved, caches[0], *sizes, isa=isa, threads=1)
    by_torch = latent_rows_torch(*given_, interleaved, caches[1], *sizes)
    module = DvpaRMSNorm(latent, eps).to(dtype)
    with torch.no_grad():
        module.weight.copy_(norm)
        latents = module(row[:, :latent])
    query_THX = query.reshape(9, heads, -1)
    turned = rotate(query_THX[..., nope:], cos[:, None], sin[:, None], interleaved)
    for queries, cache in ((out, caches[0]), (by_torch, caches[1])):
        assert queries is not None
        assert torch.equal(queries[..., :nope], query_THX[..., :nope])
        assert torch.equal(queries[..., nope:], turned)  # every bit: the same roundings
        written = cache.view(12, -1)[slots]
        assert torch.equal(written[:, latent:], rotate(row[:, latent:], cos, sin, interleaved))
        torch.testing.assert_close(
            written[:, :latent], latents, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
        )
        assert cache.view(12, -1)[[4, 6, 10]].isnan().all()


def test_latent_rows_refuses_what_does_not_fit() -> None:
    query, row, norm, eps, cos, sin = row_operands(2, 4, 6, 8, torch.float32)
    cache, slots = torch.zeros(3, 4, 14), torch.arange(9)
    rest = (cache, slots, 2, 4)
    latent_rows(query, row, norm, eps, cos, sin, True, *rest)
    for message, given_ in {
        r"query: shape \(9, 19\) must be \(9, 20\)": (query[:, 1:], row, norm, eps, cos, sin, True),
        r"row: shape \(8, 14\)": (query, row[1:], norm, eps, cos, sin, True),
        r"latent_norm: shape \(7,\)": (query, row, norm[1:], eps, cos, sin, True),
        "cos: dtype torch.float16": (query, row, norm, eps, cos.half(), sin, True),
        "row: strides": (query, row.T.contiguous().T, norm, eps, cos, sin, True),
    }.items():
        with pytest.raises(ValueError, match=message):
            latent_rows(*given_, *rest)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"slots, cache: torch.int32"):
        latent_rows(query, row, norm, eps, cos, sin, True, cache, slots.int(), 2, 4)


@needs_kernel
def test_a_slot_outside_the_cache_is_refused() -> None:
    given_ = row_operands(2, 4, 6, 8, torch.float32)
    cache, slots = torch.zeros(3, 4, 14), torch.arange(9)
    for bad in (-1, 12):
        slots[4] = bad
        with pytest.raises(ValueError, match=r"slots: every entry must be in 0 \.\. 3 \* 4 - 1"):
            latent_rows(*given_, True, cache, slots, 2, 4)
        assert cache.eq(0).all()

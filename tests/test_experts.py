"""The expert kernels against a naive loop over tokens, forward and every gradient by name."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from helpers import moe_layers, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dvpa.model.router import NO_TIER, TierPlan
from dvpa.ops import resolve_backend
from dvpa_kernels import make_routing, moe_mlp
from dvpa_kernels.fp8 import moe_mlp_fp8, quantise_weight

BACKEND = pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])


def naive(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """One token and one slot at a time, straight from the formula."""
    rows = []
    for token in range(len(x)):
        out = torch.zeros_like(x[0])
        for slot in range(index.shape[1]):
            expert = int(index[token, slot])
            if expert < len(gate_up):
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                out = out + weight[token, slot] * (down[expert] @ (F.silu(gate) * up))
        rows.append(out)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def case(
    tokens: int, experts: int, slots: int, hidden: int, width: int, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs; about a third of the slots is empty, expert 0 never gets a row."""
    g = torch.Generator().manual_seed(seed)
    index = torch.stack(
        [torch.randperm(experts, generator=g)[:slots] for _ in range(tokens)]
    ) if tokens else torch.zeros(0, slots, dtype=torch.long)  # fmt: skip
    empty = torch.rand(index.shape, generator=g) < 0.33
    index = index.masked_fill(empty | (index == 0), experts)
    return {
        "x": torch.randn(tokens, hidden, generator=g),
        "w_gate_up": torch.randn(experts, 2 * width, hidden, generator=g) / hidden**0.5,
        "w_down": torch.randn(experts, hidden, width, generator=g) / width**0.5,
        "weight": torch.rand(index.shape, generator=g).masked_fill(index == experts, 0.0),
        "index": index,
    }


def compare(inputs: dict[str, Tensor], backend: str, tolerance: float = 2e-5) -> None:
    """Outputs and the gradient of every floating input agree with the naive loop."""
    index = inputs["index"]
    names = ["x", "w_gate_up", "w_down", "weight"]
    ours = {name: inputs[name].clone().requires_grad_() for name in names}
    theirs = {name: inputs[name].clone().requires_grad_() for name in names}
    routing = make_routing(index, ours["weight"], len(ours["w_down"]))
    out = moe_mlp(ours["x"], ours["w_gate_up"], ours["w_down"], routing, backend=backend)
    expected = naive(theirs["x"], theirs["w_gate_up"], theirs["w_down"], index, theirs["weight"])
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    if not len(index):
        return
    out.backward(grad)  # also where no slot is filled: the graph must not be cut
    if expected.requires_grad:
        expected.backward(grad)
    for name in names:
        if theirs[name].grad is None:  # no row at all: the naive loop never touched it
            assert ours[name].grad is None or not ours[name].grad.any(), name
            continue
        mask = index < len(ours["w_down"]) if name == "weight" else slice(None)
        torch.testing.assert_close(
            ours[name].grad[mask],
            theirs[name].grad[mask],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"gradient of {name}: {text}",
        )


@BACKEND
@pytest.mark.parametrize(
    ("tokens", "experts", "slots", "hidden", "width"),
    [
        (9, 6, 3, 16, 12),
        (1, 2, 1, 8, 4),
        (13, 5, 5, 20, 8),
        (7, 4, 2, 10, 6),  # rows that are not a multiple of 16 bytes
        (5, 3, 2, 7, 5),
        (0, 4, 2, 16, 8),
    ],
)
def test_output_and_gradients(
    tokens: int, experts: int, slots: int, hidden: int, width: int, backend: str
) -> None:
    compare(case(tokens, experts, slots, hidden, width), backend)


@BACKEND
def test_all_rows_on_one_expert(backend: str) -> None:
    inputs = case(11, 5, 1, 16, 8)
    inputs["index"].fill_(3)
    compare(inputs, backend)


@BACKEND
def test_a_batch_of_empty_slots_gives_zero(backend: str) -> None:
    inputs = case(4, 3, 2, 16, 8)
    inputs["index"].fill_(3)
    compare(inputs, backend)


@given(
    st.integers(1, 12), st.integers(2, 6), st.integers(1, 6), st.sampled_from([4, 6, 16]), st.data()
)
def test_the_torch_backend_is_the_reference(
    tokens: int, experts: int, slots: int, hidden: int, data: st.DataObject
) -> None:
    slots = min(slots, experts)
    seed = data.draw(st.integers(0, 1000))
    inputs = case(tokens, experts, slots, hidden, 4, seed)
    routing = make_routing(inputs["index"], inputs["weight"], experts)
    arguments = (inputs["x"], inputs["w_gate_up"], inputs["w_down"], routing)
    torch.testing.assert_close(
        moe_mlp(*arguments, backend="torch"), moe_mlp(*arguments, backend="reference")
    )


@BACKEND
def test_bf16_is_within_its_own_rounding(backend: str) -> None:
    inputs = case(33, 6, 3, 32, 16)
    exact = naive(*(inputs[n] for n in ("x", "w_gate_up", "w_down", "index", "weight")))
    half = {n: inputs[n].bfloat16() for n in ("x", "w_gate_up", "w_down")}
    routing = make_routing(inputs["index"], inputs["weight"], 6)
    out = moe_mlp(half["x"], half["w_gate_up"], half["w_down"], routing, backend=backend)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("hidden", [32, 7])  # 7: rows that grouped_mm refuses
def test_compiled_without_graph_breaks_it_is_the_same(
    hidden: int, backend: str, dtype: torch.dtype
) -> None:
    """Padded rows, forward and gradients: one graph gives what eager mode gives."""
    inputs = case(9, 6, 3, hidden, 16)
    names = ["x", "w_gate_up", "w_down", "weight"]

    def run(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weight: Tensor) -> Tensor:
        routing = make_routing(inputs["index"], weight, len(w_down))
        return moe_mlp(x, w_gate_up, w_down, routing, backend=backend)

    torch.compiler.reset()  # the other cases' graphs count against one limit
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        leaves = [inputs[n].to(torch.float32 if n == "weight" else dtype) for n in names]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        out = function(*leaves)
        out.sum().backward()  # an expanded gradient
        with torch.no_grad():
            plain = function(*leaves)
        results.append([out.detach(), plain, *(leaf.grad for leaf in leaves)])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for eager, traced, name in zip(*results, ["y", "y without gradient", *names], strict=True):
        if dtype == torch.bfloat16 and (hidden == 7 or backend == "cpu"):
            # Eager mode rounds to bf16 at other places: as near the truth, not bit by bit.
            difference = (traced - eager).float().norm()
            assert difference <= 1.5e-2 * eager.float().norm(), name
        else:
            torch.testing.assert_close(traced, eager, rtol=tolerance, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("token_index", lambda v: v + 99, r"routing.token_index: 99 \.\. 1\d\d must be in 0"),
        ("token_index", lambda v: -v - 1, "routing.token_index: -"),
        ("token_index", lambda v: v.int(), "routing.token_index: dtype torch.int32"),
        ("expert_offsets", lambda v: v.flip(0), "routing.expert_offsets: "),
        ("expert_offsets", lambda v: v + 1, "routing.expert_offsets: 1"),
        ("expert_offsets", lambda v: v * 2, "must rise from 0 to at most"),
        ("token_offsets", lambda v: v.flip(0), "routing.token_offsets: "),
        ("token_offsets", lambda v: v[:-1], "routing.token_offsets: shape"),
        ("token_rows", lambda v: v + 99, "routing.token_rows: 99"),
        ("weight", lambda v: v[:-1], "routing.weight: shape"),
    ],
)
def test_a_routing_made_by_hand_is_checked(
    column: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    inputs = case(4, 3, 2, 16, 8)
    routing = make_routing(inputs["index"], inputs["weight"], 3)
    operands = (inputs["x"], inputs["w_gate_up"], inputs["w_down"])
    by_hand = replace(routing, is_checked=False)
    assert moe_mlp(*operands, by_hand).shape == (4, 16)
    bad = replace(by_hand, **{column: change(getattr(routing, column))})
    with pytest.raises(ValueError, match=message):
        moe_mlp(*operands, bad)


def test_fp8_checks_a_routing_made_by_hand_before_anything_else() -> None:
    inputs = case(4, 3, 2, 16, 8)
    gate_up, down = quantise_weight(inputs["w_gate_up"]), quantise_weight(inputs["w_down"])
    routing = make_routing(inputs["index"], inputs["weight"], 3)
    bad = replace(routing, is_checked=False, token_index=routing.token_index + 99)
    with pytest.raises(ValueError, match=r"routing.token_index: 99 \.\. 1\d\d must be in 0"):
        moe_mlp_fp8(inputs["x"], *gate_up, *down, bad)


def test_rows_of_every_token_lead_back_to_its_slots() -> None:
    inputs = case(13, 5, 4, 8, 4)
    routing = make_routing(inputs["index"], inputs["weight"], 5)
    for token in range(13):
        rows = routing.token_rows[routing.token_offsets[token] : routing.token_offsets[token + 1]]
        assert (routing.token_index[rows] == token).all()
        filled = inputs["index"][token] < 5
        torch.testing.assert_close(routing.weight[rows], inputs["weight"][token][filled])
    assert routing.token_rows.sort().values.tolist() == list(range(len(routing.token_index)))


def test_routing_rows_are_sorted_stable_and_complete() -> None:
    index = torch.tensor([[2, 0], [4, 2], [0, 4], [4, 4]])
    weight = torch.arange(8.0).view(4, 2)
    routing = make_routing(index, weight, 4)
    assert routing.num_experts == 4
    assert routing.num_tokens == 4
    assert routing.expert_offsets.tolist() == [0, 2, 2, 4, 4]
    assert routing.expert_offsets.dtype == torch.int32
    assert routing.token_index.tolist() == [0, 2, 0, 1]
    assert routing.weight.tolist() == [1.0, 4.0, 0.0, 3.0]


@pytest.mark.parametrize("bad", [-1, 5])
def test_an_index_out_of_range_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=r"topk_index: .* must be in 0 \.\. 4"):
        make_routing(torch.tensor([[0, bad]]), torch.ones(1, 2), 4)


def test_tables_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="topk_index, topk_weight"):
        make_routing(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 2), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "gpu"}, "backend: 'gpu' must be one of"),
        ({"w_gate_up": torch.zeros(3, 7, 16)}, "w_gate_up: shape"),
        ({"w_gate_up": torch.zeros(3, 16, 12)}, "w_gate_up: shape"),
        ({"w_down": torch.zeros(3, 16, 4)}, "w_down: shape"),
        ({"w_down": torch.zeros(3, 8, 16).transpose(1, 2)}, "w_down: strides"),
        ({"w_gate_up": torch.zeros(3, 16, 16).transpose(1, 2)}, "w_gate_up: strides"),
        ({"x": torch.zeros(4)}, "x: shape"),
        ({"x": torch.zeros(5, 16)}, "routing: made for 4 tokens"),
        ({"x": torch.zeros(4, 16, dtype=torch.float64)}, "dtypes"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    inputs = case(4, 3, 2, 16, 8)
    arguments: dict[str, object] = {n: inputs[n] for n in ("x", "w_gate_up", "w_down")}
    arguments["routing"] = make_routing(inputs["index"], inputs["weight"], 3)
    with pytest.raises(ValueError, match=message):
        moe_mlp(**{**arguments, **change})  # type: ignore[arg-type]


def test_the_backend_is_chosen_by_name() -> None:
    assert resolve_backend() == "cpu"
    assert resolve_backend("auto", "cuda") == ("triton" if find_spec("triton") else "torch")
    assert resolve_backend("auto", "meta") == "torch"
    assert resolve_backend("reference", "cuda") == "reference"
    with pytest.raises(ValueError, match="backend: 'cuda' must be 'auto' or one of"):
        resolve_backend("cuda")


def test_a_tier_touches_only_its_pool() -> None:
    """Experts outside the pool get no gradient and may hold anything, even NaN."""
    model = tiny_model()
    block = moe_layers(model)[0]
    hidden = torch.randn(1, 6, 32)
    plan = TierPlan(torch.ones(1, 6, dtype=torch.long), 1)
    expected, _ = block(hidden, plan)
    pool = model.config.pool_size(1)
    with torch.no_grad():
        block.experts.gate_up_proj[pool:] = float("nan")
        block.experts.down_proj[pool:] = float("nan")
        block.gate.weight[pool:] = float("nan")
    out, _ = block(hidden, plan)
    assert torch.equal(out, expected)
    out.sum().backward()
    for name in ("gate_up_proj", "down_proj"):
        gradient = getattr(block.experts, name).grad
        assert gradient[:pool].any()
        assert not gradient[pool:].any(), name


def test_padding_brings_no_rows() -> None:
    block = moe_layers(tiny_model(tiny_config(n_shared_experts=0)))[0]
    tiers = torch.tensor([[NO_TIER, NO_TIER, 2]])
    out, routing = block(torch.randn(1, 3, 32), TierPlan(tiers, 2))
    assert not out[0, :2].any()
    assert out[0, 2].any()
    assert (routing.topk_index[:2] == 16).all()


def test_shared_experts_are_one_mlp_for_every_tier() -> None:
    model = tiny_model(tiny_config(n_shared_experts=2))
    block = moe_layers(model)[0]
    hidden = torch.randn(1, 4, 32)
    plan = TierPlan(torch.tensor([[0, 1, 2, 2]]), 2)
    out, routing = block(hidden, plan)
    x, shared = hidden[0], block.shared_experts
    assert shared.gate_proj.weight.shape == (32, 32)  # two experts of width 16
    routed = naive(
        x,
        block.experts.gate_up_proj,
        block.experts.down_proj,
        routing.topk_index,
        routing.topk_weight,
    )
    always_on = (F.silu(x @ shared.gate_proj.weight.T) * (x @ shared.up_proj.weight.T)) @ (
        shared.down_proj.weight.T
    )
    torch.testing.assert_close(out[0], routed + always_on, rtol=1e-5, atol=1e-5)

"""`DecodeLayers` against the operators that a layer is made of."""

from dataclasses import replace

import pytest
import torch
from decode_layer_world import (
    PAGE_SIZE,
    SHAPE,
    SHAPES,
    Shape,
    assert_same,
    by_operators,
    make_batch,
    make_weights,
    routed_by_operators,
    run,
)
from test_cpu_kernel import DTYPE, ISA, needs_kernel

from dvpa_kernels import DECODE_ROWS, DecodeLayers
from dvpa_kernels.cpu import status
from dvpa_kernels.cpu.layer import _scratch


@ISA
@DTYPE
@SHAPE
@pytest.mark.parametrize("rows", [1, 2, 13])
def test_a_layer_is_its_operators(rows: int, shape: Shape, dtype: torch.dtype, isa: str) -> None:
    weights, batch = make_weights(shape, dtype), make_batch(shape, rows, dtype)
    hidden, cache = run(weights.layer(isa), batch)
    assert hidden.isfinite().all()
    assert not torch.equal(hidden, batch.hidden)
    assert_same((hidden, cache), by_operators(weights, batch, isa))


@ISA
@DTYPE
@pytest.mark.parametrize("name", ["plain", "wide"])
def test_threads_change_no_bit(name: str, dtype: torch.dtype, isa: str) -> None:
    shape = SHAPES[name]
    # Enough work for a team.
    shape = replace(shape, hidden=600, latent=128, expert_width=64)
    weights, batch = make_weights(shape, dtype), make_batch(shape, DECODE_ROWS, dtype)
    layer = weights.layer(isa)
    alone = run(layer, batch)
    for threads in (2, 5):
        assert_same(run(layer, batch, threads), alone)


@ISA
@DTYPE
@SHAPE
def test_the_rest_of_the_batch_changes_no_bit(shape: Shape, dtype: torch.dtype, isa: str) -> None:
    weights, batch = make_weights(shape, dtype), make_batch(shape, 12, dtype)
    layer = weights.layer(isa)
    hidden, cache = run(layer, batch)
    for rows in ((0,), (3, 1), (2, 4, 5, 6, 7, 8, 9, 0, 1), (10, 11)):
        part = batch.take(*rows)
        assert_same((run(layer, part)[0],), (hidden[list(rows)],))
    assert not torch.equal(cache, batch.cache)


@needs_kernel
@DTYPE
def test_layers_run_one_after_the_other(dtype: torch.dtype) -> None:
    """Of different sizes inside, so that the later ones need more memory than the first."""
    shapes = [Shape(width=5, expert_width=0), Shape(), Shape(width=99, expert_width=70, value=33)]
    batch = make_batch(shapes[0], 7, dtype)
    layers = [make_weights(shape, dtype, seed).layer() for seed, shape in enumerate(shapes)]
    caches = [(batch.cache + i).clone() for i in range(3)]
    expected = batch.hidden.clone()
    expected_caches = [cache.clone() for cache in caches]
    for layer, cache in zip(layers, expected_caches, strict=True):
        DecodeLayers([layer], [cache])(expected, batch.rows, threads=1)
    hidden = batch.hidden.clone()
    _scratch.memory = torch.empty(0, dtype=torch.uint8)
    DecodeLayers(layers, caches)(hidden, batch.rows, threads=1)
    assert_same((hidden, torch.stack(caches)), (expected, torch.stack(expected_caches)))
    before = caches[2].clone()
    DecodeLayers(layers[:2], caches[:2])(hidden, batch.rows)
    assert_same((caches[2], caches[2]), (before, before))


@needs_kernel
def test_a_bad_row_stays_alone() -> None:
    shape = SHAPES["plain"]
    weights, batch = make_weights(shape, torch.float32), make_batch(shape, 6, torch.float32)
    layer = weights.layer()
    clean, _ = run(layer, batch)
    batch.hidden[2] = float("nan")
    hidden, _ = run(layer, batch)
    assert hidden[2].isnan().all()
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(hidden[rest], clean[rest])


@needs_kernel
@DTYPE
def test_without_experts_it_returns_their_input(dtype: torch.dtype) -> None:
    shape = SHAPES["plain"]
    weights, batch = make_weights(shape, dtype), make_batch(shape, 5, dtype)
    expected, _ = run(weights.layer(), batch)
    hidden = batch.hidden.clone()
    layer = weights.layer(routed=None, returns_normed=True)
    normed = DecodeLayers([layer], [batch.cache.clone()])(hidden, batch.rows, threads=1)
    assert normed is not None
    assert weights.routed is not None
    isa = status().isa
    assert isa is not None
    hidden += routed_by_operators(weights.routed, normed, batch.tiers, isa)
    assert torch.equal(hidden, expected)


@needs_kernel
def test_what_is_out_of_range_is_refused_and_nothing_is_written() -> None:
    shape = SHAPES["plain"]
    weights, batch = make_weights(shape, torch.float32), make_batch(shape, 4, torch.float32)
    layer = weights.layer()
    for name, value, message in (
        ("slots", 15 * PAGE_SIZE, r"slots: every entry must be in 0 \.\. 15 \* 4 - 1"),
        ("slots", -1, "slots"),
        ("row_sequence", 3, r"row_sequence: every entry must be in 0 \.\. 3 - 1"),
        ("row_length", 21, r"row_length: every entry must be in 0 \.\. 5 \* 4"),
        ("page_table", 15, r"page_table: .* must be in 0 \.\. 15 - 1"),
        ("tiers", 3, "tiers: every entry must be below 3"),
    ):
        changed = getattr(batch, name).clone()
        changed.view(-1)[0] = value
        rows = replace(batch, **{name: changed}).rows
        hidden, cache = batch.hidden.clone(), batch.cache.clone()
        with pytest.raises(ValueError, match=message):
            DecodeLayers([layer], [cache])(hidden, rows)
        assert_same((hidden, cache), (batch.hidden, batch.cache))


@needs_kernel
def test_what_does_not_fit_is_refused() -> None:
    shape = SHAPES["query-latent-and-biases"]
    weights, batch = make_weights(shape, torch.float32), make_batch(shape, 4, torch.float32)
    layer, rows, a = weights.layer(), batch.rows, weights.attention
    half = replace(batch, cos=batch.cos.half(), sin=batch.sin.half()).rows
    for message, hidden, given in (
        (r"hidden: torch.float32 \(3, 40\) must be", batch.hidden[1:], rows),
        ("hidden: torch.float16", batch.hidden.half(), rows),
        ("cos: torch.float16", batch.hidden, half),
        ("strides", batch.hidden.T.contiguous().T, rows),
    ):
        with pytest.raises(ValueError, match=message):
            DecodeLayers([layer], [batch.cache])(hidden, given)
    other = make_weights(replace(shape, rope=6, latent=38), torch.float32).layer()
    experts_elsewhere = weights.layer(routed=None, returns_normed=True)
    for message, layers, caches in (
        ("caches: 1 must be one for each of 2 layers", [layer, layer], [batch.cache]),
        ("caches: 0", [], []),
        (r"caches\[0\]: .* must be torch.float32 \(15, 4, 44\)", [layer], [batch.cache[..., 1:]]),
        (r"caches\[1\]: .* \(14, 4, 44\)", [layer, layer], [batch.cache, batch.cache[1:]]),
        (r"caches\[0\]: strides", [layer], [batch.cache.mT.contiguous().mT]),
        (r"layers\[1\]: must have the sizes", [layer, other], [batch.cache, batch.cache]),
        (r"layers\[0\]: only the last", [experts_elsewhere, layer], [batch.cache, batch.cache]),
    ):
        with pytest.raises(ValueError, match=message):
            DecodeLayers(layers, caches)
    for message, changes in (
        (r"row_length: torch.int64 \(4,\) must be torch.int32", {"row_length": batch.slots}),
        (r"slots: torch.int64 \(3,\) must be torch.int64 \(4,\)", {"slots": batch.slots[1:]}),
        (r"sin: .* \(4, 6\) must be torch.float32 \(4, 8\)", {"sin": batch.sin[:, 2:]}),
        (r"page_table: shape", {"page_table": batch.page_table[0]}),
    ):
        with pytest.raises(ValueError, match=message):
            replace(batch, **changes).rows  # noqa: B018
    many = make_batch(shape, DECODE_ROWS + 1, torch.float32)
    with pytest.raises(ValueError, match=f"cos: {DECODE_ROWS + 1} rows must be 1 .. {DECODE_ROWS}"):
        many.rows  # noqa: B018
    for message, changed in (
        ("key_up: strides", replace(a, key_up=a.key_up.mT.contiguous().mT)),
        (r"out: .* \(39, 30\) must be torch.float32 \(40, 30\)", replace(a, out=a.out[1:])),
        ("latent_norm: torch.float16", replace(a, latent_norm=a.latent_norm.half())),
        ("leave no even number for the rope", replace(a, into=a.into[1:])),
        ("query_norm, query_up: must both", replace(a, query_up=None)),
    ):
        with pytest.raises(ValueError, match=message):
            weights.layer(attention=changed)
    with pytest.raises(ValueError, match=r"torch.float64 on cpu must be fp32, bf16 or fp16"):
        weights.layer(attention_norm=weights.attention_norm.double())
    with pytest.raises(ValueError, match="isa: 'sse9' must be one of"):
        weights.layer("sse9")

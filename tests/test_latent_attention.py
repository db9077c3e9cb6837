"""`latent_attention`, both backends, against a loop in fp64 over positions.

Letters: R query rows, H heads, W cache row (C latent + rope key), S sequences, M pages a sequence.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_kernel import DTYPE, ISA, needs_kernel
from torch import Tensor

from dvpa_kernels import attention, latent_attention
from dvpa_kernels.attention import latent_attention_torch
from dvpa_kernels.cpu.attention import latent_attention_cpu

BOUNDS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}
SPLIT = 128  # positions; as in problems.h


@dataclass(frozen=True)
class Case:
    """The operands of one call."""

    q: Tensor
    cache: Tensor
    page_table: Tensor
    row_sequence: Tensor
    row_length: Tensor
    value_width: int
    scaling: float

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, float]:
        return tuple(vars(self).values())

    def rows(self, first: int, last: int) -> "Case":
        """The same with some of the rows only."""
        part = slice(first, last)
        return replace(
            self,
            q=self.q[part],
            row_sequence=self.row_sequence[part],
            row_length=self.row_length[part],
        )


def make_case(
    row_lengths: list[int],
    dtype: torch.dtype,
    heads: int = 4,
    value_width: int = 24,
    rope_width: int = 8,
    page_size: int = 16,
    sequences: int = 2,
    seed: int = 0,
) -> Case:
    """Rows over a few sequences; whatever no row may read is NaN, or no page at all."""
    g = torch.Generator().manual_seed(seed)
    width = value_width + rope_width
    rows = len(row_lengths)
    sequence_of = [row % sequences for row in range(rows)]
    longest = [
        max((n for n, owner in zip(row_lengths, sequence_of, strict=True) if owner == s), default=0)
        for s in range(sequences)
    ]
    pages = max(1, -(-max(longest) // page_size))
    cache = torch.full((sequences * pages + 3, page_size, width), float("nan"))
    order = torch.randperm(len(cache), generator=g)[: sequences * pages]
    page_table = order.view(sequences, pages).to(torch.int32)
    for s, length in enumerate(longest):
        for position in range(length):
            page = int(page_table[s, position // page_size])
            cache[page, position % page_size] = torch.randn(width, generator=g)
        page_table[s, -(-length // page_size) :] = 10**6 * (-1) ** s
    return Case(
        torch.randn(rows, heads, width, generator=g).to(dtype),
        cache.to(dtype),
        page_table,
        torch.tensor(sequence_of, dtype=torch.int32),
        torch.tensor(row_lengths, dtype=torch.int32),
        value_width,
        2 * width**-0.5,
    )


def naive(case: Case) -> Tensor:
    """fp64, one row at a time, over exactly its own positions."""
    rows, heads, _ = case.q.shape
    out = torch.zeros(rows, heads, case.value_width, dtype=torch.float64)
    size = case.cache.shape[1]
    for row, length in enumerate(case.row_length.tolist()):
        pages = case.page_table[int(case.row_sequence[row])].tolist()
        seen = [case.cache[pages[i // size], i % size].double() for i in range(length)]
        if seen:
            keys = torch.stack(seen)
            weights = (case.q[row].double() @ keys.T * case.scaling).softmax(-1)
            out[row] = weights @ keys[:, : case.value_width]
    return out


def assert_near_exact(out: Tensor | None, case: Case) -> None:
    exact = naive(case)
    assert out is not None
    assert out.dtype == case.q.dtype
    assert out.shape == exact.shape
    assert out.is_contiguous()
    assert (out.double() - exact).norm() <= BOUNDS[out.dtype] * exact.norm()


SHAPES = pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([1], {}),
        ([1, 2, 3, 4, 5, 31, 32, 33], {"page_size": 1}),
        ([40, 3, 0, 77, 16], {"page_size": 16, "heads": 12}),
        ([SPLIT, SPLIT + 1, 2 * SPLIT - 1, 5], {"heads": 1}),
        ([300, 299], {"heads": 16, "value_width": 512, "rope_width": 64}),
        ([70, 9], {"heads": 25, "value_width": 33, "rope_width": 0}),  # two blocks of heads
        ([50], {"heads": 3, "value_width": 1, "rope_width": 1}),
        ([37], {"heads": 7, "value_width": 1000, "rope_width": 60}),  # two blocks of the depth
        ([16 * SPLIT + 1], {"value_width": 8, "heads": 2, "page_size": 64}),  # larger splits
    ],
)


@ISA
@DTYPE
@SHAPES
def test_output(lengths: list[int], sizes: dict[str, int], dtype: torch.dtype, isa: str) -> None:
    case = make_case(lengths, dtype, **sizes)
    assert_near_exact(latent_attention_cpu(*case.operands, isa=isa), case)


@DTYPE
@SHAPES
def test_output_of_the_torch_backend(
    lengths: list[int], sizes: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(lengths, dtype, **sizes)
    assert_near_exact(latent_attention_torch(*case.operands), case)
    monkeypatch.setattr(attention, "GATHERED_ELEMENTS", 1)  # a row at a time
    assert_near_exact(latent_attention_torch(*case.operands), case)


@ISA
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape(isa: str, data: st.DataObject) -> None:
    case = make_case(
        data.draw(st.lists(st.integers(0, 150), min_size=0, max_size=6)),
        data.draw(st.sampled_from(list(BOUNDS))),
        heads=data.draw(st.integers(0, 30)),
        value_width=data.draw(st.integers(1, 70)),
        rope_width=data.draw(st.integers(0, 20)),
        page_size=data.draw(st.sampled_from([1, 3, 16])),
        sequences=data.draw(st.integers(1, 3)),
        seed=data.draw(st.integers(0, 99)),
    )
    out = latent_attention_cpu(*case.operands, isa=isa)
    assert out is not None
    bound = 2 * BOUNDS[case.q.dtype]
    torch.testing.assert_close(out.double(), naive(case), rtol=bound, atol=bound)


@ISA
@DTYPE
def test_neither_threads_nor_the_rest_of_the_batch_change_a_bit(
    dtype: torch.dtype, isa: str
) -> None:
    case = make_case([3 + 17 * row for row in range(33)], dtype, heads=13)
    out = latent_attention_cpu(*case.operands, isa=isa, threads=1)
    assert out is not None
    for threads in (2, 5):
        again = latent_attention_cpu(*case.operands, isa=isa, threads=threads)
        assert torch.equal(again, out)  # type: ignore[arg-type]
    for row in (0, 7, 15, 32):
        alone = latent_attention_cpu(*case.rows(row, row + 1).operands, isa=isa)
        assert torch.equal(alone[0], out[row])  # type: ignore[index]


@ISA
def test_many_rows_in_several_rounds_are_the_same_rows(isa: str) -> None:
    """More partial results than are kept at once."""
    case = make_case([2 * SPLIT + 1] * 70, torch.bfloat16, heads=24, value_width=1024, sequences=1)
    out = latent_attention_cpu(*case.operands, isa=isa, threads=2)
    assert out is not None
    for row in (0, 69):
        alone = latent_attention_cpu(*case.rows(row, row + 1).operands, isa=isa)
        assert torch.equal(alone[0], out[row])  # type: ignore[index]


@ISA
@DTYPE
def test_large_scores_saturate(dtype: torch.dtype, isa: str) -> None:
    """One position takes all the weight, wherever it is, and nothing overflows."""
    for winner in (0, 40, 199):
        case = make_case([200], dtype, sequences=1, value_width=16, rope_width=16)
        page = int(case.page_table[0, winner // 16])
        case.q.copy_(torch.full_like(case.q, 30.0))
        case.cache[:, :, 16:] = -20.0
        case.cache[page, winner % 16, 16:] = 20.0
        out = latent_attention_cpu(*case.operands, isa=isa)
        assert out is not None
        assert torch.equal(out[0], case.cache[page, winner % 16, :16].expand(4, 16))


@ISA
def test_nan_in_a_query_stays_in_its_head(isa: str) -> None:
    case = make_case([50, 60], torch.float32)
    clean = latent_attention_cpu(*case.operands, isa=isa)
    case.q[0, 2, 3] = float("nan")
    out = latent_attention_cpu(*case.operands, isa=isa)
    assert out is not None
    assert clean is not None
    assert out[0, 2].isnan().all()
    assert torch.equal(out[0, [0, 1, 3]], clean[0, [0, 1, 3]])
    assert torch.equal(out[1], clean[1])


@needs_kernel
def test_the_kernel_runs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def spy(*given: Tensor) -> Tensor:
        calls.append(given[0])
        return given[0]

    monkeypatch.setattr(attention, "latent_attention_torch", spy)
    case = make_case([20, 5], torch.bfloat16)
    assert_near_exact(latent_attention(*case.operands), case)
    assert not calls
    double = replace(case, q=case.q.double(), cache=case.cache.double())
    wants_grad = replace(case, q=case.q.clone().requires_grad_())
    for other in (double, wants_grad):
        assert latent_attention(*other.operands) is other.q
    with torch.no_grad():
        latent_attention(*wants_grad.operands)
    assert len(calls) == 2


def test_gradients_go_through_pytorch() -> None:
    case = make_case([20, 5], torch.float64)
    q = case.q.requires_grad_()
    latent_attention(*case.operands).sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert q.grad.any()


@needs_kernel
def test_values_out_of_range_are_refused_before_they_are_read() -> None:
    case = make_case([20, 5], torch.float32)
    table = case.page_table.clone()
    table[0, 1] = len(case.cache)
    for message, wrong in {
        r"row_sequence: every entry must be in 0 .. 2 - 1": replace(
            case, row_sequence=case.row_sequence + 2
        ),
        r"row_length: every entry must be in 0 .. 2 \* 16": replace(
            case, row_length=case.row_length + 13
        ),
        r"page_table: every entry that a row needs must be in 0 .. 7 - 1": replace(
            case, page_table=table
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            latent_attention(*wrong.operands)


def test_what_does_not_fit_is_refused() -> None:
    case = make_case([20, 5], torch.float32)
    for message, wrong in {
        r"q, cache: shapes \(2, 4, 31\)": replace(case, q=case.q[..., 1:]),
        r"value_width: 33 must be in 1 .. 32": replace(case, value_width=33),
        r"value_width: 0 must": replace(case, value_width=0),
        "cache: strides": replace(case, cache=case.cache.mT.contiguous().mT),
        "cache: dtype torch.float16": replace(case, cache=case.cache.half()),
        r"page_table: shape \(2,\) must be \[S, M\]": replace(case, page_table=case.page_table[0]),
        "page_table: dtype torch.int64": replace(case, page_table=case.page_table.long()),
        r"row_length: shape \(1,\) must be \(2,\)": replace(case, row_length=case.row_length[:1]),
        "row_sequence: on meta, must be on cpu": replace(
            case, row_sequence=case.row_sequence.to("meta")
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            latent_attention(*wrong.operands)

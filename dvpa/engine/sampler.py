"""From logits to tokens: one call for all rows of a step, each row on its own terms.

The order is vLLM's: logit_bias, min_tokens, penalties, temperature, min_p, top_k, top_p. Randomness
has no state: the u of a draw is a function of the row's seed and output position alone, and no
operation mixes rows. So preemption, speculation and the rest of the batch never change a seeded
output (bit for bit on the CPU; on a GPU up to the rounding of its parallel sums, which are fp64).

Letters: N rows, V vocabulary, K blocks of it with B tokens each, C candidates.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor

from dvpa.engine.sampling_params import SamplingParams

_BLOCK = 256  # tokens summed at once by `_draw`
_CANDIDATES = 256  # top_p looks at so many tokens first


@dataclass(frozen=True)
class SampleRow:
    """What one row of logits is sampled with.

    `position` is the index of the token among the request's outputs; `output_token_ids` are the
    tokens before it. `seed` is any whole number; each of `n` completions brings its own.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    seed: int
    position: int


@dataclass(frozen=True)
class Sampled:
    """One token; its log-probabilities are the model's own, before penalties and temperature.

    `logprob` and `top_logprobs` are None unless the request asked; `top_logprobs` holds exactly the
    number asked for, best first, the sampled token only if it is among them.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """A number in [0, 1) of 53 random bits, the same for the same arguments.

    Streams are independent: 0 draws tokens, others serve speculation's accept tests.
    """
    digest = blake2b(f"{seed}:{position}:{stream}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53


def draw(probabilities_V: Tensor, u: float) -> int:
    """The token at u in [0, 1) of the cumulated distribution, in the order of token ids.

    probabilities_V: fp32 [V], not negative, of any positive sum. Never a token of probability 0.

    Raises:
        ValueError: the probabilities have no positive, finite sum.
    """
    u_N = torch.tensor([u], dtype=torch.float64, device=probabilities_V.device)
    token_id = int(_draw(probabilities_V[None], u_N))
    if token_id < 0:
        raise ValueError("probabilities: their sum must be positive and finite")
    return token_id


def logprobs(
    logits_NV: Tensor, token_ids: Sequence[int], num_top: int
) -> list[tuple[float, dict[int, float]]]:
    """Per row: the log-probability of its token, and the `num_top` best as id -> value, best first.

    logits_NV: any float dtype; one token id per row. For outputs and for prompts alike.
    """
    logprob_NV = logits_NV.float().log_softmax(-1)
    token_N1 = torch.tensor(token_ids, device=logits_NV.device)[:, None]
    chosen = logprob_NV.gather(1, token_N1)[:, 0].tolist()
    top = logprob_NV.topk(min(num_top, logprob_NV.shape[1]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    tops = [dict(zip(ids, values, strict=True)) for ids, values in pairs]
    return list(zip(chosen, tops, strict=True))


class Sampler:
    """Samples the rows of a step. `eos_token_ids` are what min_tokens holds back, beside the
    request's own stop ids (also with ignore_eos, as in vLLM).
    """

    def __init__(self, eos_token_ids: Sequence[int] = ()) -> None:
        self.eos_token_ids = tuple(eos_token_ids)

    @torch.no_grad()
    def sample(self, logits_NV: Tensor, rows: Sequence[SampleRow]) -> list[Sampled | None]:
        """One token per row; greedy ties go to the lowest id.

        logits_NV: [N, V], any float dtype and device. None stands for a row that cannot be sampled
        and must fail alone: its logits are not finite, or min_tokens holds back every token.
        """
        assert logits_NV.shape[0] == len(rows)
        if not rows:
            return []
        # `max` carries NaN and +inf; only -inf needs the minimum.
        best = logits_NV.max(-1)
        is_finite_N = best.values.isfinite() & logits_NV.amin(-1).isfinite()
        token_N = best.indices
        drawn = [i for i, row in enumerate(rows) if not self._is_plain_greedy(row)]
        if drawn:
            chosen = [rows[i] for i in drawn]
            u_N = [uniform(row.seed, row.position) for row in chosen]
            index_N = torch.tensor(drawn, device=logits_NV.device)
            token_N[index_N] = _draw(
                self._process(logits_NV[index_N].float(), chosen),
                torch.tensor(u_N, dtype=torch.float64, device=logits_NV.device),
            )
        # The only device sync of a plain greedy step.
        token_ids = token_N.masked_fill(~is_finite_N, -1).tolist()
        sampled = [None if token_id < 0 else Sampled(token_id) for token_id in token_ids]
        self._add_logprobs(sampled, logits_NV, rows)
        return sampled

    def probabilities(self, logits_V: Tensor, row: SampleRow) -> Tensor:
        """The distribution `sample` draws from, fp32 [V]; one-hot for greedy.

        Raises:
            FloatingPointError: `sample` would give None.
        """
        probability_V = self.distributions(logits_V[None], [row])[0]
        if probability_V is None:
            raise FloatingPointError("logits are not finite, or min_tokens holds back every token")
        return probability_V

    @torch.no_grad()
    def distributions(self, logits_NV: Tensor, rows: Sequence[SampleRow]) -> list[Tensor | None]:
        """`probabilities` of many rows [N, V] at once; None where it would raise."""
        assert logits_NV.shape[0] == len(rows)
        if not rows:
            return []
        probability_NV = self._process(logits_NV.to(torch.float32, copy=True), rows)
        is_usable_N = logits_NV.isfinite().all(-1) & probability_NV.isfinite().all(-1)
        usable = zip(probability_NV, is_usable_N.tolist(), strict=True)
        return [probability_V if is_usable else None for probability_V, is_usable in usable]

    def _process(self, x_NV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        """The distribution of each row; overwrites x_NV, fp32. NaN where nothing can be drawn."""
        self._add_biases(x_NV, rows)
        for x_V, row in zip(x_NV, rows, strict=True):
            _penalise(x_V, row)
        # The maximum becomes 0, so no temperature can overflow it, and min_p is one comparison.
        best = x_NV.max(-1, keepdim=True)
        x_NV -= best.values
        greedy = [i for i, row in enumerate(rows) if row.params.is_greedy]
        if greedy:
            one_hot_NV = torch.full_like(x_NV[: len(greedy)], float("-inf"))
            kept_N1 = best.indices[greedy]
            x_NV[greedy] = one_hot_NV.scatter_(1, kept_N1, x_NV[greedy].gather(1, kept_N1))

        params = [row.params for row in rows]
        random = [i for i, param in enumerate(params) if not param.is_greedy]
        temperatures = [1.0 if param.is_greedy else param.temperature for param in params]
        if any(temperature != 1.0 for temperature in temperatures):
            x_NV /= x_NV.new_tensor(temperatures)[:, None]
        if some := [i for i in random if params[i].min_p > 0.0]:
            lowest_N1 = x_NV.new_tensor([params[i].min_p for i in some])[:, None].log()
            x_NV[some] = _cut(x_NV[some], lowest_N1)
        if some := [i for i in random if 0 < params[i].top_k < x_NV.shape[1]]:
            top_k_N = torch.tensor([params[i].top_k for i in some], device=x_NV.device)
            some_NV = x_NV[some]
            ranked = some_NV.topk(max(params[i].top_k for i in some)).values
            x_NV[some] = _cut(some_NV, ranked.gather(1, top_k_N[:, None] - 1))
        if some := [i for i in random if params[i].top_p < 1.0]:
            top_p_N = x_NV.new_tensor([params[i].top_p for i in some], dtype=torch.float64)
            some_NV = x_NV[some]
            kept_NV = _nucleus(some_NV.softmax(-1), top_p_N, _CANDIDATES)
            x_NV[some] = some_NV.masked_fill_(~kept_NV, float("-inf"))
        return x_NV.softmax(-1)

    def _add_biases(self, x_NV: Tensor, rows: Sequence[SampleRow]) -> None:
        """logit_bias, then minus infinity for the ids that min_tokens holds back."""
        cells: list[tuple[int, int, float]] = []
        for i, row in enumerate(rows):
            held_back = self._held_back(row)
            biases = row.params.logit_bias.items()
            cells += [(i, token, bias) for token, bias in biases if token not in held_back]
            cells += [(i, token, float("-inf")) for token in held_back]
        if cells:
            row_ids, token_ids, values = zip(*cells, strict=True)
            x_NV[list(row_ids), list(token_ids)] += x_NV.new_tensor(values)

    def _held_back(self, row: SampleRow) -> set[int]:
        if row.position >= row.params.min_tokens:
            return set()
        return {*self.eos_token_ids, *row.params.stop_token_ids}

    def _is_plain_greedy(self, row: SampleRow) -> bool:
        """Whether the raw maximum is the answer."""
        params = row.params
        touched = params.logit_bias or self._held_back(row) or _penalises(params)
        return params.is_greedy and not touched

    def _add_logprobs(
        self, sampled: list[Sampled | None], logits_NV: Tensor, rows: Sequence[SampleRow]
    ) -> None:
        """Fill in what was asked for, in place."""
        asked: dict[int, list[tuple[int, int]]] = {}
        for i, (done, row) in enumerate(zip(sampled, rows, strict=True)):
            if done is not None and row.params.logprobs is not None:
                asked.setdefault(row.params.logprobs, []).append((i, done.token_id))
        # Per number asked, as what topk does with ties depends on it, and a row not on its batch.
        for num_top, cells in asked.items():
            index, token_ids = [i for i, _ in cells], [token_id for _, token_id in cells]
            found = logprobs(logits_NV[index], token_ids, num_top)
            for (i, token_id), (logprob, top) in zip(cells, found, strict=True):
                sampled[i] = Sampled(token_id, logprob, top)


def _penalises(params: SamplingParams) -> bool:
    additive = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    return additive or params.repetition_penalty != 1.0


def _penalise(x_V: Tensor, row: SampleRow) -> None:
    """Repetition over prompt and output, then frequency and presence over the output; in place."""
    params = row.params
    if not _penalises(params):
        return
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt_token_ids, *row.output_token_ids}))
        seen = seen.to(x_V.device, torch.int64)
        before = x_V[seen]
        factor = params.repetition_penalty
        x_V[seen] = torch.where(before > 0, before / factor, before * factor)
    if counts := Counter(row.output_token_ids):
        ids = torch.tensor(list(counts), device=x_V.device)
        times = x_V.new_tensor(list(counts.values()))
        x_V[ids] -= params.frequency_penalty * times + params.presence_penalty


def _cut(x_NV: Tensor, lowest_N1: Tensor) -> Tensor:
    return x_NV.masked_fill_(x_NV < lowest_N1, float("-inf"))


def _nucleus(probability_NV: Tensor, top_p_N: Tensor, num_candidates: int) -> Tensor:
    """Whether a token is among the fewest best ones whose sum reaches top_p, bool [N, V].

    Among equals the lowest ids are taken, as by a stable sort. A full sort costs ten times a
    `topk` of few, and few are enough for all but flat rows, which go again with more.
    """
    vocab_size = probability_NV.shape[1]
    value_NC = probability_NV.topk(min(num_candidates, vocab_size)).values
    cumulated_NC = value_NC.cumsum(-1, dtype=torch.float64)
    num_kept_N1 = 1 + (cumulated_NC[:, :-1] < top_p_N[:, None]).sum(-1, keepdim=True)
    lowest_N1 = value_NC.gather(1, num_kept_N1 - 1)
    above_NV, equal_NV = probability_NV > lowest_N1, probability_NV == lowest_N1
    num_equal_N1 = num_kept_N1 - above_NV.count_nonzero(-1)[:, None]
    kept_NV = above_NV | (equal_NV & (equal_NV.cumsum(-1, dtype=torch.int32) <= num_equal_N1))
    flat_N = cumulated_NC[:, -1] < top_p_N
    if num_candidates < vocab_size and flat_N.any():
        kept_NV[flat_N] = _nucleus(probability_NV[flat_N], top_p_N[flat_N], 16 * num_candidates)
    return kept_NV


def _draw(probability_NV: Tensor, u_N: Tensor) -> Tensor:
    """Inverse CDF in fp64, int64 [N]; -1 for a row without a positive, finite sum.

    In two levels, as one cumulated sum over V costs ten times the block sums: first the block, then
    the token in it.
    """
    block_NKB = F.pad(probability_NV, (0, -probability_NV.shape[1] % _BLOCK)).unflatten(
        1, (-1, _BLOCK)
    )
    end_NK = block_NKB.sum(-1, dtype=torch.float64).cumsum(-1)
    total_N = end_NK[:, -1]
    is_drawable_N = (total_N > 0) & total_N.isfinite()
    target_N1 = (u_N * total_N)[:, None]
    block_N1 = torch.searchsorted(end_NK, target_N1, right=True).clamp(max=end_NK.shape[1] - 1)
    start_N1 = F.pad(end_NK, (1, 0)).gather(1, block_N1)
    inner_NB = block_NKB.gather(1, block_N1[:, :, None].expand(-1, -1, _BLOCK))[:, 0].double()
    token_N1 = torch.searchsorted(inner_NB.cumsum(-1), target_N1 - start_N1, right=True)
    # Where the two levels round differently the search can run past the block's last candidate.
    last_N1 = _BLOCK - 1 - (inner_NB > 0).flip(-1).int().argmax(-1, keepdim=True)
    token_N1 = block_N1 * _BLOCK + torch.minimum(token_N1, last_N1)
    return token_N1[:, 0].masked_fill(~is_drawable_N, -1)

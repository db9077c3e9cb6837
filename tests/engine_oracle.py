"""What the engine's answers are held against: `generate()` and plain forward passes, no cache.

And a way to run it: arrivals and cancellations at given steps, pieces gathered as clients would.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any

import torch
from helpers import thresholds, tiny_config, tiny_model
from torch import Tensor

from dvpa.engine import Engine, Piece, RequestOutput, SamplingParams
from dvpa.engine.cache import bytes_per_position
from dvpa.engine.request import Request, Segment
from dvpa.engine.runner import StepResult
from dvpa.model import DvpaForCausalLM

NEAR_TIE = 1e-4  # between the best two logits: rounding may decide either way
NUM_NEW = 12


def make_prompts(vocab_size: int = 64, seed: int = 1) -> list[list[int]]:
    """Twenty prompts of 1 .. 40 tokens, some of them the beginnings of others; no id above 58."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (1, 2, 5, 9, 16, 17, 23, 40, 12, 33)
    prompts = [
        torch.randint(3, vocab_size - 5, (n,), generator=generator).tolist() for n in lengths
    ]
    prompts += [[*prompts[7][:n], 5, 6] for n in (8, 16, 31)]
    prompts += [[*prompts[9][:n]] for n in (4, 15, 24)]
    prompts += [[*prompts[5], *prompts[6]], prompts[3] * 2, prompts[4] * 2, prompts[7][:39]]
    return prompts


class Oracle:
    """One model, and what it answers to its prompts by itself."""

    def __init__(self, seed: int = 0, **changes: Any) -> None:
        self.model: DvpaForCausalLM = tiny_model(tiny_config(**changes), seed)
        self.model.generation_config.eos_token_id = None
        self.prompts = make_prompts(self.model.config.vocab_size)
        self.num_near_ties = 0
        self.num_tiers = self.model.config.num_tiers
        self._answers: dict[tuple[int, int, bool], list[int]] = {}
        self.difficulties: list[float] = []
        if self.model.difficulty_head is not None:
            self.difficulties = [self._score(prompt) for prompt in self.prompts]
            ranked = sorted(self.difficulties)
            third = len(ranked) // 3
            cuts = [(ranked[i - 1] + ranked[i]) / 2 for i in (third, 2 * third)]
            self.model.tier_map = thresholds(self.model, *cuts)

    @torch.inference_mode()
    def _score(self, prompt: list[int]) -> float:
        return float(self.model.score(torch.tensor([prompt])).difficulty)

    def tier_of(self, prompt: int) -> int:
        """The tier that the map gives this prompt."""
        return self.model.tier_map.tier(self.difficulties[prompt])

    def answer(self, prompt: int, tier: int, read_by_base: bool = False) -> list[int]:
        """NUM_NEW greedy tokens of `generate()`, at this tier from the prompt's last token on."""
        if not self._answers:  # all there are, in one left-padded batch
            width = max(map(len, self.prompts))
            keys = list(product(range(len(self.prompts)), range(self.num_tiers), [False, True]))
            ids = [[0] * (width - len(self.prompts[i])) + self.prompts[i] for i, _, _ in keys]
            tiers = [[0 if by_base else t] * (width - 1) + [t] for _, t, by_base in keys]
            lengths = torch.tensor([[len(self.prompts[i])] for i, _, _ in keys])
            out = self.model.generate(
                torch.tensor(ids),
                attention_mask=(torch.arange(width) >= width - lengths).long(),
                tiers=torch.tensor(tiers),
                max_new_tokens=NUM_NEW,
                do_sample=False,
            )
            self._answers = dict(zip(keys, out[:, width:].tolist(), strict=True))
        return self._answers[prompt, tier, read_by_base]

    def check(
        self, prompt: int, tier: int, tokens: Sequence[int], read_by_base: bool = False
    ) -> None:
        """The tokens are the answer's first ones, up to a near tie, which is counted."""
        expected = self.answer(prompt, tier, read_by_base)[: len(tokens)]
        if list(tokens) == expected:
            return
        place = next(i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b)
        ids = [*self.prompts[prompt], *expected[:place]]
        read = len(self.prompts[prompt]) - 1
        tiers = [0 if read_by_base else tier] * read + [tier] * (len(ids) - read)
        best = logits_of(self.model, ids, tiers)[-1].topk(2)
        gap = float(best.values[0] - best.values[1])
        assert gap < NEAR_TIE, (prompt, tier, read_by_base, place, tokens, expected, gap)
        self.num_near_ties += 1


@torch.inference_mode()
def logits_of(
    model: DvpaForCausalLM, token_ids: Sequence[int], tiers: int | Sequence[int]
) -> Tensor:
    """Logits [S, V] of one plain forward pass, each position at its own tier."""
    given = [tiers] * len(token_ids) if isinstance(tiers, int) else tiers
    return model(torch.tensor([list(token_ids)]), tiers=torch.tensor([list(given)])).logits[0]


def assert_greedy(
    model: DvpaForCausalLM, prompt: Sequence[int], output: Sequence[int], tiers: Sequence[int]
) -> None:
    """Every output token is the best one after what precedes it, whose positions ran at `tiers`."""
    ids = [*prompt, *output][:-1]
    logits = logits_of(model, ids, tiers[: len(ids)])[len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    assert float((logits.amax(1) - chosen).max()) < NEAR_TIE


@cache
def oracle(**changes: Any) -> Oracle:
    """The same one for the same model, in whatever test."""
    return Oracle(**changes)


def make_engine(model: DvpaForCausalLM, num_pages: int | None = None, **settings: Any) -> Engine:
    """An engine with so many pages (None: plenty)."""
    if num_pages is not None:
        page = bytes_per_position(model.config, model.dtype) * settings.get("page_size", 32)
        settings["cache_bytes"] = page * num_pages
    return Engine(model, **settings)


def preempt_at_random(engine: Engine, share: float = 0.25, seed: int = 0) -> None:
    """Take the pages of some running request before this share of the steps, whatever it does."""
    rng, scheduler = random.Random(seed), engine.scheduler
    schedule = scheduler.schedule

    def with_victims() -> tuple[list[Segment], list[Request]]:
        victims = []
        if scheduler.running and rng.random() < share:
            victims.append(rng.choice(scheduler.running))
            scheduler._preempt(victims[0])
        segments, preempted = schedule()
        return segments, [*victims, *preempted]

    scheduler.schedule = with_victims  # type: ignore[method-assign]


@dataclass
class Arrival:
    """A prompt, the step it comes in, and the one it is cancelled in."""

    prompt: Sequence[int]
    params: SamplingParams
    at: int = 0
    cancel_at: int | None = None
    pieces: list[Piece] = field(default_factory=list)
    request_id: str = ""

    def tokens(self, index: int = 0) -> list[int]:
        """All tokens of one completion."""
        return [t for piece in self.pieces if piece.index == index for t in piece.token_ids]

    def last(self, index: int = 0) -> Piece:
        """Its last piece; nothing may follow it."""
        own = [piece for piece in self.pieces if piece.index == index]
        assert [piece.finish_reason is not None for piece in own] == [False] * (len(own) - 1) + [
            True
        ]
        return own[-1]


def serve(engine: Engine, arrivals: Sequence[Arrival], max_steps: int = 5000) -> None:
    """Run until all have ended; the pages are free again."""
    for step in range(max_steps):
        for arrival in arrivals:
            if arrival.at == step:
                arrival.request_id = engine.add(
                    arrival.prompt, arrival.params, listener=arrival.pieces.append
                )
            if arrival.cancel_at == step and arrival.at <= step:
                engine.cancel(arrival.request_id)
        engine.step()
        if not engine.has_work and all(arrival.at <= step for arrival in arrivals):
            break
    assert not engine.has_work, "a request never ended"
    assert engine.pages.num_held == 0
    for arrival in arrivals:
        for index in range(arrival.params.n):
            arrival.last(index)


def greedy(**changes: Any) -> SamplingParams:
    """NUM_NEW greedy tokens."""
    return replace(SamplingParams(temperature=0.0, max_tokens=NUM_NEW), **changes)


def one(engine: Engine, prompt: Any, params: SamplingParams) -> RequestOutput:
    """The output of one prompt."""
    [output] = engine.generate([prompt], params)
    return output


def crowd(known: Oracle, **params: Any) -> list[Arrival]:
    """A request for each prompt, at tiers 0, 1, 2, 0, ..."""
    return [
        Arrival(prompt, greedy(tier=i % 3, **params), at=i // 4)
        for i, prompt in enumerate(known.prompts)
    ]


def check_all(known: Oracle, arrivals: Sequence[Arrival], tiers: Sequence[int]) -> None:
    """Every arrival has its whole answer, at its tier."""
    for i, (arrival, tier) in enumerate(zip(arrivals, tiers, strict=True)):
        known.check(i, tier, arrival.tokens())
        assert arrival.last().finish_reason == "length"


class Between:
    """Calls `act(step)` while a step is in flight."""

    def __init__(self, engine: Engine, act: Callable[[int], None]) -> None:
        self.num_runs = 0
        self._act, self._run = act, engine.runner.run
        engine.runner.run = self.run  # type: ignore[method-assign]

    def run(self, segments: list[Segment]) -> StepResult:
        self.num_runs += 1
        result = self._run(segments)
        self._act(self.num_runs)
        return result

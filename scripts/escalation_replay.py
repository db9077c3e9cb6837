"""Escalation replayed: what the engine does with a request that goes up a tier at given tokens.

Greedy answers do not depend on what else is in a batch, so a request's course is settled by the
tokens at which it goes up. Every course is run through the engine once; which course bounds of the
doubt lead to is then worked out with the engine's own `Doubt`, on doubts already seen. That makes a
grid of bounds, random courses and jumps to the top tier affordable.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer

from dvpa.engine import Engine, EscalationParams, Piece, SamplingParams
from dvpa.engine.escalation import Doubt
from dvpa.engine.request import Request
from dvpa.model import DvpaForCausalLM
from dvpa.pricing import price
from dvpa.tasks import Task, verify
from dvpa.tiers.tier_map import NEVER as NO_DIFFICULTY
from dvpa.tiers.tier_map import TierMap

# Tokens of the answer (0 is the first) at which a request goes up one tier, ascending.
Course = tuple[int, ...]
NEVER: Course = ()
CHUNK = 512  # requests queued at a time, well below what lets load lower their tiers


@dataclass(frozen=True)
class Start:
    """Where requests start: at the fitted map's tier (None) or all at one.

    The base tier reads the prompts, as the engine does with `read_prompt="base"`; with `is_whole`
    the tier itself does, and stays.
    """

    tier: int | None = None
    is_whole: bool = False


@dataclass(frozen=True)
class Run:
    """What became of one request."""

    text: str
    quality: float
    flops: float
    flops_before: float  # spent when it first went up; all of it where it never did
    first_tier: int
    tier: int  # the last one
    tier_tokens: tuple[int, ...]
    difficulty: float | None
    seen: tuple[tuple[int, float], ...]  # (token of the answer, doubt), in the order of judging

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer, eos included."""
        return sum(self.tier_tokens)

    @property
    def doubts(self) -> list[float]:
        """The last doubt of each token; tokens of the top tier are not judged."""
        return list(dict(self.seen).values())


class Planned(Doubt):
    """Goes up where a course says, and notes all doubts."""

    def __init__(self, request: Request, course: Course) -> None:
        super().__init__(EscalationParams())
        self.seen: list[tuple[int, float]] = []
        self.flops_before: float | None = None
        self._request = request
        self._left = list(course)

    def is_too_much(self, uncertainty: float) -> bool:
        """Whether the course goes up here."""
        token = len(self._request.output_token_ids)
        self.seen.append((token, uncertainty))
        if not self._left or self._left[0] != token:
            return False
        del self._left[0]
        if self.flops_before is None:
            self.flops_before = self._request.flops
        return True


def open_engine(
    folder: Path, start: Start, escalation: EscalationParams | None, read_prompt: str, batch: int
) -> Engine:
    """The engine on a checkpoint, its map replaced by a constant one where `start` names a tier."""
    model = DvpaForCausalLM.from_pretrained(folder)
    if start.tier is not None:
        model.tier_map = constant_map(model.tier_map, start.tier)
    tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    return Engine(
        model,
        tokenizer,
        dtype="float32",
        read_prompt=read_prompt,
        escalation=escalation,
        max_num_seqs=batch,
        max_num_batched_tokens=max(512, 16 * batch),
    )


def constant_map(fitted: TierMap, tier: int) -> TierMap:
    """A fitted map that sends every difficulty to one tier."""
    cuts = (0.0,) * tier + (NO_DIFFICULTY,) * (fitted.num_tiers - 1 - tier)
    return TierMap("threshold", fitted.tier_names, fitted.costs, tier, cuts)


def params_of(start: Start, max_tokens: int) -> SamplingParams:
    """Greedy, at the start's tier; a full queue must not lower it."""
    tier = start.tier if start.is_whole and start.tier is not None else "auto"
    return SamplingParams(
        temperature=0.0, max_tokens=max_tokens, tier=tier, allow_degradation=False
    )


class Replay:
    """Courses of tasks from one start, run when first asked for."""

    def __init__(
        self, folder: Path, start: Start, tasks: Sequence[Task], max_tokens: int, batch: int = 128
    ) -> None:
        self.start, self.tasks = start, tasks
        self.engine = open_engine(folder, start, EscalationParams(), "base", batch)
        self.num_tiers = len(self.engine.model.config.tier_names)
        self._price = price(self.engine.model.config)
        self._params = params_of(start, max_tokens)
        self._runs: dict[tuple[int, Course], Run] = {}

    def runs(self, courses: Sequence[Course]) -> list[Run]:
        """The run of every task on its course."""
        wanted = list(enumerate(courses))
        missing = iter([key for key in wanted if key not in self._runs])
        while chunk := list(islice(missing, CHUNK)):
            self._run(chunk)
        return [self._runs[key] for key in wanted]

    def never(self) -> list[Run]:
        """The runs that keep their tier."""
        return self.runs([NEVER] * len(self.tasks))

    def courses(self, params: EscalationParams) -> list[Course]:
        """The course of every task under the engine's rule."""
        courses = [NEVER] * len(self.tasks)
        while True:
            runs = self.runs(courses)
            ahead = [follow(params, run, c) for run, c in zip(runs, courses, strict=True)]
            if ahead == courses:
                return courses
            courses = ahead

    def jumps(self, params: EscalationParams) -> list[Course]:
        """Courses that go all the way up where the engine's rule goes up first."""
        firsts = [follow(params, run, NEVER)[:1] for run in self.never()]
        top = self.num_tiers - 1
        return [
            first * (top - run.first_tier) for first, run in zip(firsts, self.never(), strict=True)
        ]

    def _run(self, wanted: Iterable[tuple[int, Course]]) -> None:
        engine = self.engine
        keys = {engine.add(self.tasks[i].question, self._params): (i, c) for i, c in wanted}
        plans: dict[str, Planned] = {}
        for request, live in engine.progress.live.items():
            course = keys[request.request_id][1]
            live.doubt = plans[request.request_id] = Planned(request, course)
        pieces: dict[str, list[Piece]] = {request_id: [] for request_id in keys}
        while engine.has_work:
            for piece in engine.step():
                pieces[piece.request_id].append(piece)
        for request_id, key in keys.items():
            text = "".join(piece.text for piece in pieces[request_id])
            self._runs[key] = self._make(key, text, pieces[request_id][-1], plans[request_id])

    def _make(self, key: tuple[int, Course], text: str, last: Piece, plan: Planned) -> Run:
        record = last.telemetry
        if record is None or last.error is not None:
            raise RuntimeError(f"request {key[0]}: {last.error}")
        followed = key[1][: record.escalations]  # an answer may end before its course does
        first_tier = record.tier - record.escalations
        overhead = self.overhead(first_tier)
        # Rows of the tiers a jump passes over are computed here, and would not be by a real jump.
        passed = sum(
            self._price.tiers[first_tier + n].flops_per_token
            for n in range(1, len(followed))
            if followed[n] == followed[n - 1]
        )
        before = record.flops if plan.flops_before is None else plan.flops_before
        return Run(
            text=text,
            quality=verify(self.tasks[key[0]], text),
            flops=record.flops - overhead - passed,
            flops_before=before - overhead,
            first_tier=first_tier,
            tier=record.tier,
            tier_tokens=record.tier_tokens,
            difficulty=record.difficulty,
            seen=tuple(plan.seen),
        )

    def overhead(self, first_tier: int) -> float:
        """FLOPs of choosing a tier: nobody needs a head, or reads twice, where all start at one."""
        if self.start.tier is None or self.start.is_whole:
            return 0.0
        return float(self._price.scoring_flops(0, first_tier, "base"))


def follow(params: EscalationParams, run: Run, course: Course) -> Course:
    """One step of the engine's rule beyond a course it has led to; the course itself at its end."""
    doubt, tokens = Doubt(params), []
    for token, uncertainty in run.seen:
        if doubt.is_too_much(uncertainty):
            tokens.append(token)
            if len(tokens) > len(course):
                break
    assert tuple(tokens[: len(course)]) == course
    return tuple(tokens)

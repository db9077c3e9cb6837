"""Runs the scheduler's segments on the model: flattening, the pass, logits, scores.

Keeps, per request, what a probe leaves for the rest of its prompt: trunk (or probe) output, and the
difficulty head's reading so far. Nothing here decides anything.

Letters: T positions, D hidden, R rows with logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dvpa.engine.cache import LatentCache
from dvpa.engine.forward import Chunk, Decoder, ExpertsOfLayer, Step
from dvpa.engine.probe import Reading, difficulty, read_on
from dvpa.engine.request import Part, Request, Segment
from dvpa.model.causal_lm import DvpaForCausalLM

# Up to this many positions of a request go through the absorbed form, which reads the cache once.
ABSORBED_ROWS = 16
ORDER = (Part.PROBE, Part.WHOLE, Part.AFTER_TRUNK, Part.AFTER_PROBE)


@dataclass(frozen=True)
class StepResult:
    """What a step computed, by position in the list of segments.

    `logits` [R, vocab], of segment i the rows `rows[i]`; `difficulties[i]` where a prompt was read
    to its end for scoring; `failed`: segments with a state that is not finite.
    """

    logits: Tensor
    rows: dict[int, slice]
    difficulties: dict[int, float]
    failed: frozenset[int]


@dataclass
class _Kept:
    """What a probe has left of one prompt."""

    trunk: list[Tensor] = field(default_factory=list)
    probe: list[Tensor] = field(default_factory=list)
    reading: Reading | None = None


class Runner:
    """The model side of the engine: one `run` per step."""

    def __init__(
        self, model: DvpaForCausalLM, cache: LatentCache, experts: ExpertsOfLayer | None = None
    ) -> None:
        self.model = model
        self.cache = cache
        self.decoder = Decoder(model, cache, experts)
        self._device = cache.storage.device
        self._kept: dict[Request, _Kept] = {}
        self._readings: dict[int, Reading] = {}  # by page, up to its end

    def has_reading(self, page: int) -> bool:
        """Whether the head's reading up to the end of this page is known."""
        return page in self._readings

    def drop_page(self, page: int) -> None:
        """The page is handed out anew."""
        self._readings.pop(page, None)

    def forget(self, request: Request) -> None:
        """The request ended, lost its pages, or has read its prompt: nothing kept is needed."""
        self._kept.pop(request, None)

    @torch.inference_mode()
    def run(self, segments: Sequence[Segment]) -> StepResult:
        """Compute the segments' rows in one pass; writes the cache, changes no request."""
        order = sorted(range(len(segments)), key=lambda i: _place(segments[i]))
        ordered = [segments[i] for i in order]
        step = self._flatten(ordered)
        hidden = self._enter(ordered, step)
        passed = self.decoder(step, hidden)
        sound_T = torch.isfinite(passed.hidden).all(-1).tolist()

        rows: dict[int, slice] = {}
        read: dict[int, Tensor] = {}  # last states of prompts that were read to their ends
        wanted: list[int] = []
        difficulties: dict[int, float] = {}
        failed: set[int] = set()
        first = 0
        for i, segment in zip(order, ordered, strict=True):
            here = slice(first, first := first + segment.length)
            if not all(sound_T[here]):
                failed.add(i)
                continue
            if segment.num_logits:
                rows[i] = slice(len(wanted), len(wanted) + segment.num_logits)
                wanted.extend(range(first - segment.num_logits, first))
            if segment.request.scores and segment.request.decision is None:
                states = passed.probe_states[here]
                if self._read_on(segment, states):
                    read[i] = states[-1:]
            if segment.part is Part.PROBE:
                kept = self._kept[segment.request]
                kept.trunk.append(passed.trunk[here].clone())
                kept.probe.append(passed.hidden[here].clone())
        logits_RV = passed.hidden.new_empty(0, self.model.config.vocab_size)
        if wanted:
            logits_RV = self.decoder.logits(passed.hidden[self._int(wanted)])
        for i, last in read.items():
            is_known = self.knows_lens(segments[i])
            lens = logits_RV[rows[i].stop - 1] if is_known else self.decoder.logits(last)[0]
            difficulties[i] = self._score(segments[i].request, lens)
        return StepResult(logits_RV, rows, difficulties, frozenset(failed))

    def _flatten(self, segments: Sequence[Segment]) -> Step:
        page_size = self.cache.page_size
        token_ids: list[int] = []
        positions: list[int] = []
        tiers: list[int] = []
        slots: list[int] = []
        chunks: list[Chunk] = []
        decoding: list[Segment] = []
        sequence: list[int] = []
        lengths: list[int] = []
        decode_first: int | None = None
        for segment in segments:
            pages, first = segment.request.pages, len(token_ids)
            span = range(segment.start, segment.end)
            token_ids.extend(segment.token_ids)
            positions.extend(span)
            tiers.extend(segment.tiers)
            slots.extend(pages[p // page_size] * page_size + p % page_size for p in span)
            if _is_absorbed(segment):
                decode_first = first if decode_first is None else decode_first
                sequence.extend([len(decoding)] * segment.length)
                lengths.extend(p + 1 for p in span)
                decoding.append(segment)
            else:
                held = pages[: -(-segment.end // page_size)]
                chunks.append(Chunk(first, len(token_ids), segment.start, self._int(held)))
        sizes = [sum(s.length for s in segments if s.part is part) for part in ORDER]
        bounds = tuple(sum(sizes[: i + 1]) for i in range(4))
        first = decode_first or 0
        width = max((len(s.request.pages) for s in decoding), default=0)
        table = [s.request.pages + [0] * (width - len(s.request.pages)) for s in decoding]
        return Step(
            token_ids=self._int(token_ids),
            positions=self._int(positions),
            tiers=self._int(tiers),
            max_tier=max(tiers),
            slots=self._int(slots),
            bounds=(bounds[0], bounds[1], bounds[2], bounds[3]),
            decode=slice(first, first + len(sequence)),
            decode_sequence=self._int(sequence, torch.int32),
            decode_length=self._int(lengths, torch.int32),
            page_table=self._int(table, torch.int32),
            chunks=tuple(chunks),
        )

    def _enter(self, segments: Sequence[Segment], step: Step) -> Tensor:
        """Embeddings [T, D]; resumed segments enter with what their probe has left."""
        fresh = step.bounds[1]
        hidden = self.decoder.embed(step.token_ids)
        first = fresh
        for segment in segments:
            if segment.part in (Part.AFTER_TRUNK, Part.AFTER_PROBE):
                kept, request = self._kept[segment.request], segment.request
                states = kept.trunk if segment.part is Part.AFTER_TRUNK else kept.probe
                start = segment.start - request.kept_from
                hidden[first : first + segment.length] = torch.cat(states)[
                    start : start + segment.length
                ]
                first += segment.length
        return hidden

    def knows_lens(self, segment: Segment) -> bool:
        """Whether the segment's own logits are the logit lens: the probe is the whole base tier."""
        return segment.num_logits > 0 and self.decoder.probes_all

    def _read_on(self, segment: Segment, states: Tensor) -> bool:
        """The difficulty head reads on; True once the prompt is read."""
        head, request, page_size = self.model.difficulty_head, segment.request, self.cache.page_size
        assert head is not None, "only a model with a head is asked to score"
        kept = self._kept.setdefault(request, _Kept())
        before = kept.reading
        if before is None and segment.start:
            before = self._readings[request.pages[segment.start // page_size - 1]]
        full = range(segment.start // page_size, segment.end // page_size)
        ends = [(page + 1) * page_size - segment.start for page in full]
        readings = read_on(head, before, states, [*ends, segment.length])
        for page, reading in zip(full, readings, strict=False):
            self._readings[request.pages[page]] = reading
        kept.reading = readings[-1]
        return segment.end >= len(request.prompt_token_ids)

    def _score(self, request: Request, lens_V: Tensor) -> float:
        head, reading = self.model.difficulty_head, self._kept[request].reading
        assert head is not None and reading is not None
        return difficulty(head, reading, lens_V)

    def _int(self, values: Sequence[object], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def _is_absorbed(segment: Segment) -> bool:
    return segment.part is Part.WHOLE and segment.length <= ABSORBED_ROWS


def _place(segment: Segment) -> tuple[int, bool]:
    """Order of a segment in the step (see `forward`); sorting is stable."""
    return ORDER.index(segment.part), segment.part is Part.WHOLE and not _is_absorbed(segment)

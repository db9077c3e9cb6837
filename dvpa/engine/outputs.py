"""What the engine gives back: pieces while a request runs, the whole at its end. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from dvpa.engine.sampling_params import SamplingParams
from dvpa.tiers.policy import Decision
from dvpa.tiers.record import TelemetryRecord


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one token under the model itself (before temperature and penalties)."""

    token_id: int
    logprob: float
    top: Mapping[int, float]  # the likeliest alternatives


@dataclass(frozen=True)
class Piece:
    """News of one completion: new tokens and text; with `finish_reason` it is the last one.

    `finish_reason`: stop | length | cancelled | timeout | error. `error` says what went wrong,
    `decision` comes with the first piece (None if it ended before there was one), `telemetry` with
    the last.
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    decision: Decision | None = None
    telemetry: TelemetryRecord | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """One finished completion. `choices` holds all `n` of its prompt, this one included."""

    request_id: str
    index: int
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    finish_reason: str
    error: str | None
    telemetry: TelemetryRecord
    choices: tuple["RequestOutput", ...] = ()


@dataclass
class Gathering:
    """Collects the pieces of a prompt's completions into outputs."""

    prompt_token_ids: list[int]
    params: SamplingParams
    pieces: list[Piece] = field(default_factory=list)
    num_ended: int = 0

    def take(self, piece: Piece) -> None:
        """One more piece of any of the completions."""
        self.pieces.append(piece)
        self.num_ended += piece.finish_reason is not None

    @property
    def is_done(self) -> bool:
        """Whether all completions have ended."""
        return self.num_ended == self.params.n

    def output(self) -> RequestOutput:
        """The first completion, with all of them as its `choices`."""
        choices = tuple(self._choice(index) for index in range(self.params.n))
        return replace(choices[0], choices=choices)

    def _choice(self, index: int) -> RequestOutput:
        pieces = [piece for piece in self.pieces if piece.index == index]
        last = pieces[-1]
        assert last.finish_reason is not None
        assert last.telemetry is not None
        return RequestOutput(
            request_id=last.request_id,
            index=index,
            prompt_token_ids=tuple(self.prompt_token_ids),
            text="".join(piece.text for piece in pieces),
            token_ids=tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
            logprobs=tuple(chain.from_iterable(piece.logprobs for piece in pieces)),
            prompt_logprobs=last.prompt_logprobs,
            finish_reason=last.finish_reason,
            error=last.error,
            telemetry=last.telemetry,
        )

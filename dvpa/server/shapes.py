"""The answers' JSON: what /v1/completions and /v1/chat/completions make of pieces."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from dvpa.engine import Piece
from dvpa.engine.outputs import TokenLogprob
from dvpa.server.job import Job
from dvpa.server.logprobs import CompletionLogprobs, chat_logprobs, joined
from dvpa.server.prompts import Prompts


class Shape(Protocol):
    """Either way of answering."""

    def take(self, choice: int, piece: Piece) -> None:
        """One more piece of an answer that is sent as a whole."""
        ...

    def whole(self, created: int) -> dict[str, Any]:
        """That answer."""
        ...

    def opening(self, created: int) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        ...

    def chunk(self, choice: int, piece: Piece, created: int) -> dict[str, Any]:
        """One piece of a stream; a choice's last one carries its telemetry as `dvpa`."""
        ...

    def closing(self, created: int) -> dict[str, Any]:
        """The chunk with the usage."""
        ...


@dataclass
class _Gathered:
    """A choice so far."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    finish_reason: str = ""


class _Base:
    """What both have in common."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, job: Job, prompts: Prompts) -> None:
        self._job = job
        self._prompts = prompts
        self._gathered = [_Gathered() for _ in range(job.num_choices)]

    def take(self, choice: int, piece: Piece) -> None:
        gathered = self._gathered[choice]
        gathered.text.append(piece.text)
        gathered.logprobs.extend(piece.logprobs)
        if piece.finish_reason is not None:
            gathered.finish_reason = piece.finish_reason
            gathered.prompt_logprobs = piece.prompt_logprobs

    def closing(self, created: int) -> dict[str, Any]:
        return {**self._head(self.chunk_object, created), "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        return self._job.usage()

    def _head(self, kind: str, created: int) -> dict[str, Any]:
        job = self._job
        return {"id": job.request_id, "object": kind, "created": created, "model": job.model}

    def _chunk(self, created: int, choice: int, piece: Piece, **parts: Any) -> dict[str, Any]:
        shown = {"index": choice, **parts, "finish_reason": piece.finish_reason}
        chunk = {**self._head(self.chunk_object, created), "choices": [shown]}
        if piece.telemetry is not None:
            chunk["dvpa"] = piece.telemetry.to_dict()
        return chunk


class CompletionShape(_Base):
    """/v1/completions.

    Args:
        logprobs: number of alternatives; None for no log-probabilities.
        echo: the prompts, to be repeated before their completions (None among them: sent as ids).
        drops_output: the one token that was generated was not asked for.
    """

    whole_object = chunk_object = "text_completion"

    def __init__(
        self,
        job: Job,
        prompts: Prompts,
        *,
        logprobs: int | None = None,
        echo: Sequence[str | None] | None = None,
        drops_output: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        super().__init__(job, prompts)
        self._num_top = logprobs
        self._drops_output = drops_output
        self._echo: list[str] | None = None
        if echo is not None:
            self._echo = [
                prompts.decode(ids, skip_special_tokens) if text is None else text
                for ids, text in zip(job.prompts, echo, strict=True)
            ]
        self._running: dict[int, CompletionLogprobs] = {}

    def whole(self, created: int) -> dict[str, Any]:
        choices = [self._choice(index, found) for index, found in enumerate(self._gathered)]
        return {
            **self._head(self.whole_object, created),
            "choices": choices,
            "usage": self._usage(),
        }

    def opening(self, created: int) -> Iterator[dict[str, Any]]:
        for choice in range(self._job.num_choices if self._echo is not None else 0):
            piece = Piece(self._job.request_id)
            yield self._chunk(created, choice, piece, text=self._before(choice), logprobs=None)

    def chunk(self, choice: int, piece: Piece, created: int) -> dict[str, Any]:
        found = None
        if self._num_top is not None and not self._drops_output:
            if choice not in self._running:
                self._running[choice] = CompletionLogprobs(self._num_top, self._prompts)
            found = self._running[choice].output(piece.logprobs)
        text = "" if self._drops_output else piece.text
        return self._chunk(created, choice, piece, text=text, logprobs=found)

    def _choice(self, index: int, found: _Gathered) -> dict[str, Any]:
        logprobs = None
        if self._num_top is not None:
            parts, running = [], CompletionLogprobs(self._num_top, self._prompts)
            if self._echo is not None:
                prompt = self._job.prompts[index // self._job.params.n]
                parts.append(running.prompt(prompt, found.prompt_logprobs))
            if not self._drops_output:
                parts.append(running.output(found.logprobs))
            logprobs = joined(parts)
        text = "" if self._drops_output else "".join(found.text)
        return {
            "index": index,
            "text": self._before(index) + text,
            "logprobs": logprobs,
            "finish_reason": "length" if self._drops_output else found.finish_reason,
        }

    def _before(self, choice: int) -> str:
        return "" if self._echo is None else self._echo[choice // self._job.params.n]

    def _usage(self) -> dict[str, Any]:
        return self._job.usage(0 if self._drops_output else None)


class ChatShape(_Base):
    """/v1/chat/completions. `top_logprobs`: alternatives; None for no log-probabilities."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, job: Job, prompts: Prompts, top_logprobs: int | None) -> None:
        super().__init__(job, prompts)
        self._num_top = top_logprobs

    def whole(self, created: int) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(found.text)},
                "logprobs": self._logprobs(found.logprobs),
                "finish_reason": found.finish_reason,
            }
            for index, found in enumerate(self._gathered)
        ]
        return {
            **self._head(self.whole_object, created),
            "choices": choices,
            "usage": self._usage(),
        }

    def opening(self, created: int) -> Iterator[dict[str, Any]]:
        for choice in range(self._job.num_choices):
            delta = {"role": "assistant", "content": ""}
            piece = Piece(self._job.request_id)
            yield self._chunk(created, choice, piece, delta=delta, logprobs=None)

    def chunk(self, choice: int, piece: Piece, created: int) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        logprobs = self._logprobs(piece.logprobs) if piece.token_ids else None
        return self._chunk(created, choice, piece, delta=delta, logprobs=logprobs)

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._num_top is None:
            return None
        return chat_logprobs(tokens, self._num_top, self._prompts)

"""Log-probabilities in the two shapes OpenAI has for them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dvpa.engine.outputs import TokenLogprob
from dvpa.server.prompts import Prompts


def chat_logprobs(tokens: Iterable[TokenLogprob], num_top: int, prompts: Prompts) -> dict[str, Any]:
    """{"content": [{token, logprob, bytes, top_logprobs}]}."""
    content = []
    for token in tokens:
        best = sorted(token.top.items(), key=lambda pair: -pair[1])[:num_top]
        top = [_entry(token_id, logprob, prompts) for token_id, logprob in best]
        content.append({**_entry(token.token_id, token.logprob, prompts), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(token_id: int, logprob: float, prompts: Prompts) -> dict[str, Any]:
    text = prompts.token_text(token_id)
    raw = [int(text[8:], 16)] if text.startswith("bytes:\\x") else list(text.encode())
    return {"token": text, "logprob": finite(logprob), "bytes": raw}


class CompletionLogprobs:
    """{"tokens", "token_logprobs", "top_logprobs", "text_offset"}, in parts for a stream.

    Args:
        num_top: alternatives per token; the token itself is always among them.
    """

    def __init__(self, num_top: int, prompts: Prompts) -> None:
        self._num_top = num_top
        self._prompts = prompts
        self._offset = 0

    def prompt(
        self, token_ids: Sequence[int], known: Sequence[TokenLogprob | None] | None
    ) -> dict[str, Any]:
        """The echoed prompt's; its first token has none."""
        found = known or [None] * len(token_ids)
        return self._part(zip(token_ids, found, strict=True))

    def output(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The generated tokens'."""
        return self._part((token.token_id, token) for token in tokens)

    def _part(self, pairs: Iterable[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        part: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for token_id, token in pairs:
            text = self._prompts.token_text(token_id)
            part["tokens"].append(text)
            part["token_logprobs"].append(None if token is None else finite(token.logprob))
            part["top_logprobs"].append(None if token is None else self._top(token))
            part["text_offset"].append(self._offset)
            self._offset += len(text)
        return part

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        best = sorted(token.top.items(), key=lambda pair: -pair[1])[: self._num_top]
        named = {token.token_id: token.logprob, **dict(best)}
        top: dict[str, float] = {}
        for token_id, logprob in named.items():  # two tokens can read the same: the likelier stays
            text = self._prompts.token_text(token_id)
            top[text] = max(finite(logprob), top.get(text, LOWEST))
        return top


LOWEST = -9999.0  # JSON has no infinity; vLLM's stand-in


def finite(logprob: float) -> float:
    """The value, or the stand-in for one that JSON cannot carry."""
    return logprob if logprob > LOWEST else LOWEST


def joined(parts: Iterable[Mapping[str, list[Any]]]) -> dict[str, Any] | None:
    """Parts of `CompletionLogprobs` one after the other; None for none."""
    whole: dict[str, list[Any]] = {}
    for part in parts:
        for key, values in part.items():
            whole.setdefault(key, []).extend(values)
    return whole or None

"""Token ids of one request to text as they come, cut at the first stop string.

Two things keep text back. *Unsettled* text may still read otherwise when more tokens come: bytes of
an incomplete character, and with byte-fallback tokenizers any run of byte tokens, as one invalid
byte turns the whole run into replacement characters. *Pending* text is settled, but may be the
beginning of a stop string.

The cost is linear: like vLLM's prefix offset, only the last settled piece and what follows is
decoded, since text depends on the tokens before it (a leading space is dropped, say).
"""

from typing import TYPE_CHECKING

from dvpa.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_MAX_UNSETTLED = 32  # tokens; see `_is_settled`


class Detokenizer:
    """Incremental text of one completion.

    All text together is `tokenizer.decode(ids, skip_special_tokens=...)` without clean-up of
    spaces, cut at the stop string. The one exception: invalid UTF-8 in a run of more than 32 byte
    tokens may show another number of replacement characters.

    Of several stop strings the one completed first wins, of those the longest, however the text
    falls into tokens. As in vLLM, none ends within the first `min_tokens` tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", params: SamplingParams) -> None:
        self.stopped: str | None = None  # the stop string found
        self._tokenizer = tokenizer
        self._params = params
        self._skipped: set[int] = set()
        if params.skip_special_tokens:
            added = tokenizer.added_tokens_decoder
            self._skipped = {token_id for token_id, token in added.items() if token.special}
        self._emitted: list[str] = []
        self._num_tokens = 0
        self._is_finished = False
        self._window: list[int] = []  # the last settled tokens, then the unsettled ones
        self._num_settled = 0
        self._settled_text = ""  # what the settled tokens of the window decode to by themselves
        self._unsettled = ""
        self._pending = ""
        self._num_exempt = 0  # leading characters of pending and unsettled text in min_tokens

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        return "".join(self._emitted)

    def push(self, token_id: int) -> str:
        """The new text that is safe to emit, often empty; sets `stopped` if a stop string is found.

        Not after `stopped` or `finish`. An id the tokenizer does not know has no text.
        """
        assert self.stopped is None and not self._is_finished
        self._num_tokens += 1
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        # What has no text of its own must not become the window: the next space would be dropped.
        if piece is not None and token_id not in self._skipped:
            self._window.append(token_id)
            self._unsettled = self._decode(self._window)[len(self._settled_text) :]
            if self._is_settled(is_byte=len(piece) == 6 and piece.startswith("<0x")):
                self._settle()
        return self._emit()

    def finish(self) -> str:
        """The rest, kept back until now. Nothing after a stop string."""
        if self.stopped is not None or self._is_finished:
            return ""
        self._is_finished = True
        self._pending, self._unsettled = self._pending + self._unsettled, ""
        return self._emit()

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids,
            skip_special_tokens=self._params.skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def _is_settled(self, is_byte: bool) -> bool:
        """Whether no later token changes the unsettled text.

        Long runs of bytes count as settled wherever they are valid, so that a script which the
        vocabulary lacks still streams; and very long ones anywhere, so that garbage costs no more.
        """
        num_unsettled = len(self._window) - self._num_settled
        if num_unsettled >= 2 * _MAX_UNSETTLED:
            return True
        is_open = is_byte and num_unsettled < _MAX_UNSETTLED
        return not is_open and not self._unsettled.endswith(_REPLACEMENT)

    def _settle(self) -> None:
        """Move the unsettled text on to pending, and the window up to its tokens."""
        token_ids = self._window[self._num_settled :]
        if len(token_ids) >= _MAX_UNSETTLED:  # a run of bytes: its last character is enough
            token_ids = token_ids[-len(self._unsettled[-1:].encode()) :]
        self._window, self._num_settled = token_ids, len(token_ids)
        self._settled_text = self._decode(token_ids)
        self._pending, self._unsettled = self._pending + self._unsettled, ""

    def _emit(self) -> str:
        """Take from the pending text what no stop string can claim any more."""
        # An incomplete character is no text yet, but what precedes it may complete a stop string.
        visible = self._pending + self._unsettled.rstrip(_REPLACEMENT)
        if self._num_tokens <= self._params.min_tokens:
            self._num_exempt = len(visible)
        elif (found := self._find_stop(visible)) is not None:
            start, self.stopped = found
            end = start + len(self.stopped) * self._params.include_stop_str_in_output
            return self._take(visible, end)
        held = 0 if self._is_finished else self._num_held()
        return self._take(self._pending, len(self._pending) - held)

    def _find_stop(self, visible: str) -> tuple[int, str] | None:
        """Where the winning stop string starts, and which it is."""
        found: list[tuple[int, int, str]] = []
        for stop in self._params.stop:
            start = visible.find(stop, max(0, self._num_exempt - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        return min(found)[1:] if found else None

    def _num_held(self) -> int:
        """Length of the longest suffix of the pending text that may begin a stop string."""
        lengths = [0]
        for stop in self._params.stop:
            for length in range(min(len(stop) - 1, len(self._pending)), 0, -1):
                if self._pending.endswith(stop[:length]):
                    lengths.append(length)
                    break
        return max(lengths)

    def _take(self, text: str, end: int) -> str:
        taken, self._pending = text[:end], text[end:]
        self._num_exempt = max(0, self._num_exempt - end)
        self._emitted.append(taken)
        return taken

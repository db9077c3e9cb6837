"""Text to token ids and back, for the HTTP side: with its own tokenizers, off the event loop.

The engine's tokenizer is not touched: it decodes in the engine's thread, and the Rust backend does
not allow changes from another one meanwhile.
"""

import asyncio
import copy
import threading
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from dvpa.server.errors import ApiError, bad_field
from dvpa.server.schemas import Message
from dvpa.tasks import encoding
from dvpa.tasks.chat import encode_chat

AT_ONCE = 4096  # characters that are tokenised in the event loop; more go to a thread
_REPLACEMENT = "\ufffd"


class Prompts:
    """The served model's tokenizer.

    Args:
        tokenizer: None for a checkpoint without one: prompts are token ids then.
        context: the longest sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, context: int) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self._context = context
        self._elsewhere = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        self._texts: dict[int, str] = {}
        self._longest = 0
        if self.tokenizer is not None:
            self._longest = max((len(piece) for piece in self.tokenizer.get_vocab()), default=0)
            self._anchor = self.tokenizer.encode("a", add_special_tokens=False)
            self._anchor_text = self.decode(self._anchor)

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint says how a conversation is written."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    async def encode(self, text: str, param: str = "prompt") -> list[int]:
        """Token ids of a prompt, the beginning-of-sequence token first.

        Raises:
            ApiError: 400 for an empty prompt, one that cannot fit, or without a tokenizer.
        """
        return await self._run(text, param, encoding.encode_prompt)

    async def encode_plain(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of any text, for /tokenize; it may be empty."""

        def encode(tokenizer: Any, text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))

        return await self._run(text, "prompt", encode, may_be_empty=True)

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn.

        By the tokenizer's chat template; without one the contents, a line each, are the prompt: a
        single message is then the same as a plain prompt.
        """
        if not self.has_chat_template:
            text = "\n".join(message.text for message in messages)
            return await self.encode(text, "messages")
        turns = [(m.role, m.text) for m in messages]

        def encode(tokenizer: Any, text: str) -> list[int]:
            return encode_chat(tokenizer, turns, generation_prompt=True)

        return await self._run("".join(m.text for m in messages), "messages", encode)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids; unknown ids have none."""
        if self.tokenizer is None:
            raise ApiError(400, "this checkpoint has no tokenizer: send token ids", param="prompt")
        return cast(
            "str",
            self.tokenizer.decode(
                list(token_ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            ),
        )

    def token_text(self, token_id: int) -> str:
        """One token as it reads inside a text; a lone byte as OpenAI writes it, `bytes:\\xNN`."""
        known = self._texts.get(token_id)
        if known is not None:
            return known
        if self.tokenizer is None:
            return f"token_id:{token_id}"
        text = self.decode([*self._anchor, token_id])[len(self._anchor_text) :]
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        if _REPLACEMENT in text and isinstance(piece, str):
            is_byte = piece.startswith("<0x") and piece.endswith(">")
            text = f"bytes:\\x{piece[3:-1].lower()}" if is_byte else piece
        self._texts[token_id] = text  # as many as there are tokens, at most
        return text

    async def _run(
        self, text: str, param: str, encode: Any, may_be_empty: bool = False
    ) -> list[int]:
        if self.tokenizer is None:
            raise ApiError(400, f"{param}: must be token ids, there is no tokenizer", param=param)
        try:
            text.encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell but UTF-8 cannot
            raise ApiError(400, f"{param}: not valid Unicode text", param=param) from None
        if not may_be_empty and not text.strip():
            raise ApiError(400, f"{param}: must not be empty", param=param)
        # No tokenizer makes fewer tokens of it: no need to find out how many.
        if len(text) > self._context * max(self._longest, 1):
            raise ApiError(
                400,
                f"{param}: {len(text)} characters are more than the context of {self._context} "
                "tokens can hold",
                param=param,
                code="context_length_exceeded",
            )
        try:
            if len(text) <= AT_ONCE:
                return cast("list[int]", encode(self.tokenizer, text))
            return await asyncio.to_thread(self._encode_elsewhere, encode, text)
        except ValueError as error:
            raise bad_field(error) from None

    def _encode_elsewhere(self, encode: Any, text: str) -> list[int]:
        with self._lock:
            return cast("list[int]", encode(self._elsewhere, text))

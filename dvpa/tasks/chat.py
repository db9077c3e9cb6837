"""Conversations: JSON Lines of messages, written by a tokenizer's chat template, with the tokens
that the assistant has to produce marked.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

The marks come from the template itself, without `{% generation %}` in it: the conversation is
rendered up to each assistant turn, as a server would prompt for it, and through that turn. Each
rendering must be the beginning of the next one, as text and as token ids, so that what is trained
is exactly what is asked for later; where a template rewrites earlier turns, that is an error.

A special token spelt out in a message is text like any other; only the template writes real ones.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import Record, read_records
from .task_set import Task, TaskSet

ROLES = ("system", "user", "assistant")
ASSISTANT = "assistant"
Turn = tuple[str, str]  # (role, content)
_FIRST_GUARD = 0x10FC00  # private-use characters that stand for special tokens spelt in messages


@dataclass(frozen=True, slots=True)
class ChatTask(Task):
    """A conversation as a task: all but the last turn is the prompt, the last one the answer.

    `question` and `answer` are for people; `turns` is what is encoded. `where`: file and line.
    """

    turns: tuple[Turn, ...] = ()
    where: str = ""

    @staticmethod
    def from_turns(
        turns: Sequence[Turn], where: str, level: int = 0, kind: str = "chat"
    ) -> "ChatTask":
        """A task whose id is derived from everything before the answer."""
        told = turns[:-1]
        question = told[-1][1] if len(told) == 1 else "\n".join(f"{r}: {text}" for r, text in told)
        plain = Task.create(question, turns[-1][1], level, kind)
        return ChatTask(
            plain.question, plain.answer, level, kind, plain.id, turns=tuple(turns), where=where
        )


@dataclass(frozen=True)
class ChatIds:
    """Token ids of a conversation, and where each assistant turn begins and, after its
    end-of-sequence token, ends among them.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


def read_chats(path: str | Path) -> TaskSet:
    """Conversations of a JSON Lines file (or one JSON array).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed row, an unknown role, no assistant turn at the end; names file and
            line.
    """
    tasks = []
    for line, record in read_records(path):
        where = f"{path}:{line}"
        try:
            tasks.append(ChatTask.from_turns(_turns(record), where, kind=Path(path).stem))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not tasks:
        raise ValueError(f"{path}:1: no records")
    return TaskSet(Path(path).stem, tuple(tasks))


def as_chat(task: Task, where: str) -> ChatTask:
    """A question and its answer as a user's and an assistant's turn; same id, level and kind."""
    turns = (("user", task.question), (ASSISTANT, task.answer))
    return ChatTask(
        task.question, task.answer, task.level, task.kind, task.id, task.numeric, turns=turns,
        where=where,
    )  # fmt: skip


def encode_chat(tokenizer: Any, turns: Sequence[Turn], generation_prompt: bool) -> list[int]:
    """Token ids of a conversation as the chat template writes it.

    Args:
        generation_prompt: end with what asks for the assistant's turn.

    Raises:
        ValueError: the tokenizer has no chat template, or it refuses these turns.
    """
    spelt = [token for token in tokenizer.all_special_tokens if any(token in t for _, t in turns)]
    guards = {chr(_FIRST_GUARD + i): token for i, token in enumerate(spelt)}
    if not guards:
        return _encode(tokenizer, _render(tokenizer, turns, generation_prompt), split=False)
    text = _render(tokenizer, _guarded(turns, guards), generation_prompt)
    ids: list[int] = []
    for part in filter(None, re.split("([" + "".join(guards) + "])", text)):
        ids += _encode(tokenizer, guards.get(part, part), split=part in guards)
    return ids


def encode_conversation(tokenizer: Any, task: ChatTask) -> ChatIds:
    """Token ids of a whole conversation and the spans of its assistant turns.

    Raises:
        ValueError: no chat template; one that refuses the turns, rewrites earlier ones, or does not
            end the assistant's with the end-of-sequence token. Names file and line.
    """
    try:
        return _conversation(tokenizer, task.turns)
    except ValueError as error:
        raise ValueError(f"{task.where}: {error}") from None


def split_answer(tokenizer: Any, task: ChatTask) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids): everything before the last assistant turn, and that turn."""
    chat = encode_conversation(tokenizer, task)
    begin, end = chat.spans[-1]
    return chat.ids[:begin], chat.ids[begin:end]


def _conversation(tokenizer: Any, turns: Sequence[Turn]) -> ChatIds:
    ids = encode_chat(tokenizer, turns, generation_prompt=False)
    spans = []
    for number, (role, _) in enumerate(turns):
        if role != ASSISTANT:
            continue
        asked = encode_chat(tokenizer, turns[:number], generation_prompt=True)
        is_last = number == len(turns) - 1
        answered = ids if is_last else encode_chat(tokenizer, turns[: number + 1], False)
        for part in (asked, answered):
            if ids[: len(part)] != part:
                raise ValueError(
                    "chat template: turns up to the assistant's do not begin the whole "
                    f"conversation, so its tokens cannot be told apart (message {number + 1})"
                )
        written = answered[len(asked) :]
        if tokenizer.eos_token_id not in written:
            raise ValueError(
                f"chat template: an assistant turn does not end with {tokenizer.eos_token!r}, the "
                f"tokenizer's end of sequence: nothing would teach the model to stop "
                f"(message {number + 1})"
            )
        # What a template writes after it, a line end perhaps, is never asked of the model.
        spans.append((len(asked), len(asked) + written.index(tokenizer.eos_token_id) + 1))
    return ChatIds(ids, spans)


def _render(tokenizer: Any, turns: Sequence[Turn], generation_prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat template: the tokenizer has none; give one (data.chat_template)")
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt
            )
        )
    except Exception as error:  # a template may refuse an order of roles, in its own words
        raise ValueError(f"messages: refused by the chat template: {error}") from error


def _guarded(turns: Sequence[Turn], guards: dict[str, str]) -> list[Turn]:
    guarded = []
    for role, content in turns:
        if any(ord(char) >= _FIRST_GUARD for char in content):
            raise ValueError("content: characters from U+10FC00 on are reserved")
        # The longest first: one special token may contain another.
        for guard, token in sorted(guards.items(), key=lambda pair: -len(pair[1])):
            content = content.replace(token, guard)
        guarded.append((role, content))
    return guarded


def _encode(tokenizer: Any, text: str, split: bool) -> list[int]:
    ids = list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split))
    # The call above leaves the choice in the backend, where `encode_batch_fast` would read it.
    tokenizer.backend_tokenizer.encode_special_tokens = tokenizer.split_special_tokens
    return ids


def _turns(record: Record) -> list[Turn]:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages: must be a non-empty list; the record has {sorted(record)}")
    turns = [_turn(message, number) for number, message in enumerate(messages)]
    if turns[-1][0] != ASSISTANT:
        raise ValueError(f"messages: the last one must be the assistant's, not {turns[-1][0]}'s")
    if turns[0][0] == ASSISTANT:
        raise ValueError("messages: the first one must not be the assistant's")
    return turns


def _turn(message: Any, number: int) -> Turn:
    where = f"messages[{number}]"
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        found = sorted(message) if isinstance(message, dict) else type(message).__name__
        raise ValueError(f"{where}: must have role and content and nothing else, not {found}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{where}.role: {role!r} must be one of {', '.join(ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{where}.content: must be non-empty text, not {content!r}")
    return role, content

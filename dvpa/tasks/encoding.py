"""How a task becomes token ids: the one place that fixes the format, shared by training and
evaluation.

    prompt = [bos] + encode(question)         answer = encode(answer) + [eos]

Question and answer are tokenised separately, so no merge ever crosses the border and a prompt has
the same ids whether or not its answer is known. No torch here; batches are NumPy int64 arrays.

Dimension letters: `B` sequences, `T` tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .chat import ChatTask, split_answer
from .task_set import Task

IntArray = npt.NDArray[np.int64]


def encode_prompt(tokenizer: Any, question: str) -> list[int]:
    """`[bos] + encode(question)`. ValueError if the question is empty or the tokenizer has no bos
    token.
    """
    question_ids = list(tokenizer.encode(question, add_special_tokens=False))
    if not question_ids:
        raise ValueError(f"question must hold at least one token, got {question!r}")
    return [_special_id(tokenizer, "bos_token_id"), *question_ids]


def encode_task(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) of one task; the answer ends with eos and may otherwise be empty.

    Raises ValueError if the question is empty or the tokenizer lacks a bos or eos token.
    """
    answer_ids = list(tokenizer.encode(answer, add_special_tokens=False))
    return encode_prompt(tokenizer, question), [*answer_ids, _special_id(tokenizer, "eos_token_id")]


def encode_tasks(tokenizer: Any, tasks: Sequence[Task]) -> list[tuple[list[int], list[int]]]:
    """`encode_task` of many tasks in one call of the Rust backend, several times faster; the
    tokenizer must be a fast one. Conversations are written by the tokenizer's chat template.
    """
    if any(isinstance(task, ChatTask) for task in tasks):
        return [_encode_either(tokenizer, task) for task in tasks]
    bos, eos = _special_id(tokenizer, "bos_token_id"), _special_id(tokenizer, "eos_token_id")
    encode_batch = tokenizer.backend_tokenizer.encode_batch_fast
    questions = encode_batch([task.question for task in tasks], add_special_tokens=False)
    answers = encode_batch([task.answer for task in tasks], add_special_tokens=False)
    for task, question in zip(tasks, questions, strict=True):
        if not question.ids:
            raise ValueError(f"question must hold at least one token, got {task.question!r}")
    pairs = zip(questions, answers, strict=True)
    return [([bos, *question.ids], [*answer.ids, eos]) for question, answer in pairs]


def _encode_either(tokenizer: Any, task: Task) -> tuple[list[int], list[int]]:
    if isinstance(task, ChatTask):
        return split_answer(tokenizer, task)
    return encode_task(tokenizer, task.question, task.answer)


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[IntArray, IntArray]:
    """Rows padded on the left (for `generate`): ids int64 [B, T] and mask int64 [B, T], 1 on real
    tokens.
    """
    return _pad(sequences, pad_id, left=True)


def right_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[IntArray, IntArray]:
    """Rows padded on the right (teacher-forced passes): ids int64 [B, T] and mask int64 [B, T]."""
    return _pad(sequences, pad_id, left=False)


def _pad(sequences: Sequence[Sequence[int]], pad_id: int, left: bool) -> tuple[IntArray, IntArray]:
    if not sequences or min(len(row) for row in sequences) == 0:
        raise ValueError("sequences must hold at least one sequence, each with at least one token")
    length = max(len(row) for row in sequences)
    ids = np.full((len(sequences), length), pad_id, dtype=np.int64)
    mask = np.zeros((len(sequences), length), dtype=np.int64)
    for index, row in enumerate(sequences):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, where] = row
        mask[index, where] = 1
    return ids, mask


def _special_id(tokenizer: Any, name: str) -> int:
    value = getattr(tokenizer, name, None)
    if value is None:
        raise ValueError(f"tokenizer.{name} must be set: the task format needs it")
    return int(value)

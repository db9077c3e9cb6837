"""Task, TaskSet and verify: a question, the answer that counts, and the one function that says
whether a text is it.

A task set is an immutable sequence. It comes from the generators (generators.py) or from a local
file of records (`from_jsonl`). What is left out: partial credit, and answers that need more than
text or one number to compare.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, overload

from .draws import stable_hash
from .records import Record, read_records

ANSWER_MARK = (
    "####"  # GSM8K's: the number after the last mark is the answer, the text before it the working
)

# A minus counts only where no word or number ends right before it: "12-5" ends in 5, "is -5" in -5.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])-)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


@dataclass(frozen=True, slots=True)
class Task:
    """One question with its exact answer.

    level: graded difficulty, 0 the easiest; a file without levels reads as 0. kind: what sort of
    task it is. id: 16 hex digits, a hash of the question. numeric: compare as numbers instead of as
    text (see verify). by_nll: nothing is compared, a tier is as good as it predicts the answer.
    """

    question: str
    answer: str
    level: int
    kind: str
    id: str
    numeric: bool = False
    by_nll: bool = False

    @staticmethod
    def create(question: str, answer: str, level: int, kind: str, numeric: bool = False) -> "Task":
        """A task whose id is derived from its question."""
        return Task(question, answer, level, kind, f"{stable_hash(question):016x}", numeric)


def verify(task: Task, text: str) -> float:
    """Quality of an answer, 1.0 or 0.0.

    Text answers: equal after every run of whitespace is made one space. Numeric answers: the number
    after the last "####" (or the last number, where there is no mark) has the same value; "1,080",
    "1080" and "1080.0" are one number.
    """
    if not task.numeric:
        return float(text.split() == task.answer.split())
    expected = final_number(task.answer)
    return float(expected is not None and final_number(text) == expected)


def final_number(text: str) -> Decimal | None:
    """The last number after the last "####", or the last number of a text without the mark; None if
    there is none.
    """
    numbers = _NUMBER.findall(text.rpartition(ANSWER_MARK)[2])
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


@dataclass(frozen=True)
class TaskSet(Sequence[Task]):
    """A named, immutable sequence of tasks; a slice of it is a TaskSet again."""

    name: str
    tasks: tuple[Task, ...]

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        """The tasks in order."""
        return iter(self.tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> "TaskSet": ...
    def __getitem__(self, index: int | slice) -> "Task | TaskSet":
        """One task, or the task set of a slice."""
        if isinstance(index, slice):
            return TaskSet(self.name, self.tasks[index])
        return self.tasks[index]

    @property
    def levels(self) -> tuple[int, ...]:
        """The distinct levels, ascending."""
        return tuple(sorted({task.level for task in self.tasks}))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The distinct kinds, sorted."""
        return tuple(sorted({task.kind for task in self.tasks}))

    def by_level(self, level: int) -> "TaskSet":
        """The tasks of one level."""
        return self.subset(lambda task: task.level == level, f"{self.name}/level {level}")

    def by_kind(self, kind: str) -> "TaskSet":
        """The tasks of one kind."""
        return self.subset(lambda task: task.kind == kind, f"{self.name}/{kind}")

    def subset(
        self, choice: Callable[[Task], bool] | Iterable[int], name: str | None = None
    ) -> "TaskSet":
        """The tasks a predicate accepts, or those at the given indices, in that order."""
        if callable(choice):
            tasks = tuple(task for task in self.tasks if choice(task))
        else:
            tasks = tuple(self.tasks[index] for index in choice)
        return TaskSet(self.name if name is None else name, tasks)

    def split(self, fractions: Mapping[str, float], seed: int = 0) -> "dict[str, TaskSet]":
        """Disjoint parts, each task placed by a hash of (seed, id): equal questions never fall on
        both sides.

        fractions: name -> share, each > 0, adding up to at most 1 (what remains is in no part).
        Sizes are approximate.
        """
        total = math.fsum(fractions.values())
        if not fractions or min(fractions.values()) <= 0 or total > 1 + 1e-9:
            raise ValueError(
                f"fractions must each be > 0 and add up to <= 1, got {dict(fractions)}"
            )
        parts: dict[str, list[Task]] = {name: [] for name in fractions}
        for task in self.tasks:
            position, bound = stable_hash(f"{seed}/{task.id}") / 2**64, 0.0
            for name, fraction in fractions.items():
                bound += fraction
                if position < bound:
                    parts[name].append(task)
                    break
        return {name: TaskSet(f"{self.name}/{name}", tuple(part)) for name, part in parts.items()}

    @staticmethod
    def from_jsonl(
        path: str | Path,
        *,
        question: str | Sequence[str] = "question",
        answer: str = "answer",
        level: str | Callable[[Record], int] = "level",
        kind: str | Callable[[Record], str] = "kind",
        numeric: bool | None = None,
        name: str | None = None,
    ) -> "TaskSet":
        """Read JSON Lines, or one JSON array of objects; every error is a ValueError naming file
        and line.

        question, answer, level, kind: field names; several question fields are joined into one
        text. level and kind are optional in the file (0 and "task"), and may be functions of the
        record. numeric None: each answer that is a number, or ends in "#### number", is compared as
        one.
        """
        fields = [question] if isinstance(question, str) else list(question)
        tasks = []
        for line, record in read_records(path):
            try:
                text = _join([_text(record, field) for field in fields])
                expected = _text(record, answer)
                as_number = _is_numeric(expected) if numeric is None else numeric
                if as_number and final_number(expected) is None:
                    raise ValueError(f"field {answer!r} holds no number: {expected!r}")
                found = (_level(record, level), _kind(record, kind))
            except ValueError as error:
                raise ValueError(f"{path}:{line}: {error}") from error
            tasks.append(Task.create(text, expected, *found, numeric=as_number))
        if not tasks:
            raise ValueError(f"{path}:1: no records")
        return TaskSet(Path(path).stem if name is None else name, tuple(tasks))

    def to_jsonl(self, path: str | Path) -> None:
        """Write one object per task with the fields question, answer, level, kind; from_jsonl reads
        it back.
        """
        with Path(path).open("w", encoding="utf-8", newline="\n") as file:
            for task in self.tasks:
                record = {"question": task.question, "answer": task.answer}
                file.write(json.dumps(record | {"level": task.level, "kind": task.kind}) + "\n")


def _text(record: Record, field: str) -> str:
    if field not in record:
        raise ValueError(f"field {field!r} is missing; the record has {sorted(record)}")
    value: Any = record[field]
    if isinstance(value, float) and math.isfinite(value):
        value = int(value) if value.is_integer() else value
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        raise ValueError(f"field {field!r} must be text or a number, got {value!r}")
    text = str(value).strip()
    if not text:
        raise ValueError(f"field {field!r} is empty")
    return text


def _join(parts: Sequence[str]) -> str:
    # A part without end punctuation gets a full stop: two sentences must not run into one.
    ended = [part if part[-1] in ".,:;!?" else part + "." for part in parts[:-1]]
    return " ".join([*ended, parts[-1]])


def _is_numeric(answer: str) -> bool:
    tail = answer.rpartition(ANSWER_MARK)[2].strip().lstrip("$")
    return _NUMBER.fullmatch(tail) is not None


def _level(record: Record, level: str | Callable[[Record], int]) -> int:
    value = level(record) if callable(level) else record.get(level, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"level must be an integer >= 0, got {value!r}")
    return value


def _kind(record: Record, kind: str | Callable[[Record], str]) -> str:
    value = kind(record) if callable(kind) else record.get(kind, "task")
    if not isinstance(value, str) or not value:
        raise ValueError(f"kind must be non-empty text, got {value!r}")
    return value

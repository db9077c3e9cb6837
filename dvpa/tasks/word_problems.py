"""Readers of two public word-problem files as they are published: GSM8K (train.jsonl) and SVAMP
(SVAMP.json).

The files are not part of dvpa; a path is given. Both are compared by their number.
"""

import re
from dataclasses import replace
from pathlib import Path

from .records import Record
from .task_set import TaskSet

_ANNOTATION = re.compile(r"<<[^<>]*>>")

# The published answer of this row contradicts its own equation ((4 - 2) + 3 against 1).
_MISLABELLED = "chal-680"


def load_gsm8k(path: str | Path, keep_annotations: bool = False) -> TaskSet:
    """GSM8K: level is the number of calculator annotations, a proxy of the steps needed, at most 9;
    kind "gsm8k".

    The answer is the whole worked solution with its last line "#### N"; keep_annotations False
    strips `<<a+b=c>>`.
    """
    tasks = TaskSet.from_jsonl(path, level=_annotations, kind=lambda _: "gsm8k", numeric=True)
    if keep_annotations:
        return tasks
    stripped = (replace(task, answer=_ANNOTATION.sub("", task.answer)) for task in tasks)
    return TaskSet(tasks.name, tuple(stripped))


def load_svamp(path: str | Path) -> TaskSet:
    """SVAMP: body and question joined; level is the number of operators less one; kind is the
    normalised type.

    The one row with a wrong label (chal-680) is left out. By custom this file is for evaluation
    only.
    """
    tasks = TaskSet.from_jsonl(
        path,
        question=("Body", "Question"),
        answer="Answer",
        level=_operators,
        kind=_svamp_kind,
        numeric=True,
    )
    return tasks.subset(lambda task: task.kind != _MISLABELLED)


def _annotations(record: Record) -> int:
    return len(_ANNOTATION.findall(str(record.get("answer", ""))))


def _operators(record: Record) -> int:
    return max(0, sum(word in "+-*/" for word in str(record.get("Equation", "")).split()) - 1)


def _svamp_kind(record: Record) -> str:
    if record.get("ID") == _MISLABELLED:
        return _MISLABELLED
    return "svamp-" + str(record.get("Type", "")).replace("Divison", "Division").lower()

"""What `--tasks` names: generated tasks or local files, as one task set without repeats.

    problems.jsonl                question, answer, optional level and kind
    gsm8k:FILE  svamp:FILE        as they are published
    chat:FILE                     conversations
    text:FILE                     plain text, its passages scored by nll
    graded  graded:RECIPE.yaml    generated, with default settings or those of a recipe
    nll:...                       any of the files, scored by the nll of the answer

Generated tasks come from the generator's calibrate and test splits: no model has trained on them,
and no difficulty head. Files are taken as they are; that nothing in them was trained on is the
caller's to know.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .chat import read_chats
from .draws import stable_hash
from .generators import GradedTasks
from .task_set import Task, TaskSet
from .text import TextCorpus
from .word_problems import load_gsm8k, load_svamp

GRADED, BY_NLL = "graded", "nll"
_READERS: dict[str, Callable[[Path], Sequence[Task]]] = {
    "jsonl": TaskSet.from_jsonl,
    "gsm8k": load_gsm8k,
    "svamp": load_svamp,
    "chat": read_chats,
    "text": lambda path: TextCorpus.from_files(path).passages(path.stem),
}
# Keys of a recipe's data.graded that are GradedTasks' own; the evaluation's weights are another.
_GRADED_KEYS = ("seed", "num_facts", "zipf", "filler", "recall_share")


def read_tasks(specs: Sequence[str], items: int, seed: int = 0) -> tuple[TaskSet, int]:
    """The tasks that `specs` name, at most `items` of each, and how many repeats were left out.

    Which ones are taken is a function of seed and question, so that fewer items are among more.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown form, a bad file (its name and line), no specs, items below 1.
    """
    if not specs:
        raise ValueError("tasks: name at least one")
    if items < 1:
        raise ValueError(f"items: {items} must be 1 or more")
    tasks: dict[str, Task] = {}
    num_read = 0
    for spec in specs:
        read = _read(spec, items, seed)
        num_read += len(read)
        for task in read:
            tasks.setdefault(task.id, task)
    return TaskSet("+".join(specs), tuple(tasks.values())), num_read - len(tasks)


def _read(spec: str, items: int, seed: int) -> Sequence[Task]:
    form, _, rest = spec.partition(":")
    if form == GRADED:
        return _graded(rest, items, seed)
    if form == BY_NLL and rest:
        if rest.partition(":")[0] == GRADED:
            raise ValueError(f"tasks: {spec}: generated tasks are verified, not scored by nll")
        return [replace(task, by_nll=True) for task in _read(rest, items, seed)]
    if form not in _READERS:
        form, rest = "jsonl", spec
    path = Path(rest)
    if not path.is_file():
        forms = ", ".join((*_READERS, GRADED, BY_NLL))
        raise FileNotFoundError(f"tasks: {spec}: no such file (or one of {forms}, then ':')")
    tasks = list(_READERS[form](path))
    kept = sorted(tasks, key=lambda task: stable_hash(f"{seed}/{task.id}"))[:items]
    chosen = {id(task) for task in kept}
    return [task for task in tasks if id(task) in chosen]


def _graded(recipe: str, items: int, seed: int) -> Sequence[Task]:
    settings = _graded_settings(recipe) if recipe else {}
    weights = settings.pop("evaluation_weights", None)
    if weights is not None:
        settings["level_weights"] = weights
    generator = GradedTasks(settings.pop("seed", 0), **settings)
    half = items // 2
    sizes = {"calibrate": items - half, "test": half}
    return [
        task
        for split, size in sizes.items()
        if size
        for task in generator.sample(split, size, seed=seed)
    ]


def _graded_settings(recipe: str) -> dict[str, Any]:
    from dvpa.config import find_config, load_yaml

    data = load_yaml(find_config(recipe)).get("data")
    graded = data.get("graded") if isinstance(data, dict) else None
    if not isinstance(graded, dict):
        raise ValueError(f"tasks: {recipe}: has no data.graded to take the settings from")
    return {key: graded[key] for key in (*_GRADED_KEYS, "evaluation_weights") if key in graded}

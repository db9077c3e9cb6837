"""Where training and evaluation examples come from: embedded graded tasks, or local files.

An example is a (prompt ids, completion ids) pair; a conversation's also says, per id of its
completion, whether the assistant wrote it. Both sources answer the same questions: what
trains the tokenizer, which examples train the model, and which evaluate it, in disjoint parts:
`head` (difficulty head), `fit` and `calibrate` (tier map), `test` (report).
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dvpa.evaluate.outcomes import collect_outcomes
from dvpa.evaluate.table import OutcomeTable
from dvpa.tasks import (
    ChatTask,
    GradedTasks,
    Task,
    TaskSet,
    TextCorpus,
    load_gsm8k,
    load_svamp,
    read_chats,
)
from dvpa.tasks.chat import ChatIds, as_chat, encode_conversation, split_answer
from dvpa.tasks.encoding import encode_tasks
from dvpa_train.batches import WHOLE_STEP, Example, Part
from dvpa_train.config import DataConfig, FileData, GradedData, Recipe, StageConfig
from dvpa_train.packed_source import PackedSource

PARTS = ("head", "fit", "calibrate", "test")
TOKENIZER_LINES = 20_000


class Source(Protocol):
    """The examples of one recipe."""

    def tokenizer_lines(self) -> Iterator[str]:
        """Text to train the tokenizer on (training part only)."""

    def prepare(self, tokenizer: Any) -> None:
        """Tokenise whatever is finite, once."""

    def describe(self) -> str:
        """How many examples there are and what became of the others; "" for an endless source."""

    def train_batch(
        self, start: int, stop: int, level_weights: Sequence[float] = ()
    ) -> list[Example]:
        """Training examples number start .. stop - 1 of an endless seeded order.

        `level_weights`: a stage's own mix of task levels, where the source has levels.
        """

    def held_out(self, sizes: Mapping[str, int]) -> dict[str, TaskSet]:
        """Up to so many held-out tasks of each of `PARTS`; no question stands in two of them."""

    def collect(self, model: Any, tokenizer: Any, tasks: TaskSet, **kwargs: Any) -> OutcomeTable:
        """Every tier's outcome on held-out tasks."""


def make_source(recipe: Recipe) -> Source:
    """The source a recipe asks for."""
    source: Source
    if recipe.data.graded is not None:
        source = GradedSource(recipe.data.graded, recipe.seed)
    else:
        source = FileSource(recipe.data, recipe.seed)
    return source if recipe.data.packed is None else PackedSource(recipe, evaluation=source)


class GradedSource:
    """Seeded tasks with exact verifiers; training and held-out questions never meet."""

    def __init__(self, data: GradedData, seed: int) -> None:
        self.data, self.seed = data, seed
        shared: dict[str, Any] = {
            "num_facts": data.num_facts,
            "filler": data.filler,
            "recall_share": data.recall_share,
        }
        self.evaluation = GradedTasks(data.seed, level_weights=data.evaluation_weights, **shared)
        self.mix = lru_cache(
            lambda *weights: GradedTasks(data.seed, level_weights=(*weights, 0.0), **shared)
        )
        self.tokenizer: Any = None

    def tokenizer_lines(self) -> Iterator[str]:
        """Lines of every task form."""
        return self.evaluation.training_lines(TOKENIZER_LINES)

    def prepare(self, tokenizer: Any) -> None:
        """Keep the tokenizer: examples are drawn and encoded on the fly."""
        self.tokenizer = tokenizer

    def describe(self) -> str:
        """Drawn without end."""
        return ""

    def train_batch(
        self, start: int, stop: int, level_weights: Sequence[float] = ()
    ) -> list[Example]:
        """Fresh draws from the stage's mix of levels, the recipe's seed choosing the stream."""
        mix = self.mix(*(level_weights or self.data.train_weights))
        return encode_tasks(
            self.tokenizer, [mix.item("train", i, self.seed) for i in range(start, stop)]
        )

    def held_out(self, sizes: Mapping[str, int]) -> dict[str, TaskSet]:
        """`head` and `fit` share the generator's fit split: its items in order, head first."""
        both = self.evaluation.sample("fit", sizes["head"] + sizes["fit"], seed=self.seed)
        parts = {"head": both[: sizes["head"]], "fit": both[sizes["head"] :]}
        for part in ("calibrate", "test"):
            parts[part] = self.evaluation.sample(part, sizes[part], seed=self.seed)
        return parts

    def collect(self, model: Any, tokenizer: Any, tasks: TaskSet, **kwargs: Any) -> OutcomeTable:
        """Quality: exact match under greedy decoding."""
        return collect_outcomes(model, tokenizer, tasks, **kwargs)


class FileSource:
    """Word problems and plain text from local files, as (prompt, completion) language modelling."""

    def __init__(self, data: DataConfig, seed: int) -> None:
        self.data, self.seed = data, seed
        self.train: list[Task] = []
        self.evaluation: dict[str, list[Task]] = {part: [] for part in PARTS}
        for file in data.files:
            self._add(file)
        self.examples: list[Example] = []
        self.num_cut = 0  # training examples longer than max_length
        self.num_dropped = 0  # of those, conversations with no assistant's token inside it

    def _add(self, file: FileData) -> None:
        path = resolve_data(file.path)
        kept, held = self._read(file, path)
        self.train += kept
        random.Random(f"{self.seed}/{path.name}").shuffle(held)
        if file.evaluation_only:
            self.evaluation["test"] += held
            return
        for i, task in enumerate(held):
            self.evaluation[PARTS[i % len(PARTS)]].append(task)

    def _read(self, file: FileData, path: Path) -> tuple[list[Task], list[Task]]:
        """(training, held-out) tasks of one file."""
        never_trains = file.evaluation_only or self.data.packed is not None
        fraction = 1.0 if never_trains else self.data.validation_fraction
        if file.format == "text":
            if file.chat:
                raise ValueError(f"data.files: {file.path}: text has no turns: chat must be false")
            if self.data.packed is not None and not file.evaluation_only:
                return [], TextCorpus.from_files(path).passages(path.stem)
            if fraction == 1.0:
                raise ValueError(f"data.files: {file.path}: text cannot be evaluation_only")
            parts = TextCorpus.from_files(path).split(fraction)
            train, held = (part.passages(path.stem) for part in parts)
            return train, held
        read: dict[str, Callable[[Path], TaskSet]] = {
            "gsm8k": load_gsm8k, "svamp": load_svamp, "jsonl": TaskSet.from_jsonl,
            "chat": read_chats,
        }  # fmt: skip
        tasks = [replace(task, kind=path.stem) for task in read[file.format](path)]
        if file.chat and file.format != "chat":
            tasks = [as_chat(task, f"{path} ({task.question[:40]!r})") for task in tasks]
        random.Random(f"{self.seed}/{path.name}/split").shuffle(tasks)
        cut = round(len(tasks) * fraction)
        return tasks[cut:], tasks[:cut]

    def tokenizer_lines(self) -> Iterator[str]:
        """Questions, answers and passages that train the model."""
        for task in self.train:
            yield from task.question.splitlines()
            yield from task.answer.splitlines()

    def prepare(self, tokenizer: Any) -> None:
        """Encode and cut every training example; conversations to evaluate are checked as well.

        Raises:
            ValueError: a conversation that the chat template cannot write; nothing is left to train
                on.
        """
        limit = self.data.max_length
        held = [task for tasks in self.evaluation.values() for task in tasks]
        for task in held:
            if isinstance(task, ChatTask):
                split_answer(tokenizer, task)
        plain = [task for task in self.train if not isinstance(task, ChatTask)]
        pairs = iter(encode_tasks(tokenizer, plain))
        for task in self.train:
            if isinstance(task, ChatTask):
                self._add_chat(encode_conversation(tokenizer, task))
                continue
            prompt, completion = next(pairs)
            self.num_cut += len(prompt) + len(completion) > limit
            prompt = prompt[: limit - 1]
            self.examples.append((prompt, completion[: limit - len(prompt)]))
        if self.num_dropped and not self.examples:
            raise ValueError(
                f"data.max_length: {limit} tokens hold no assistant's token of any conversation"
            )

    def _add_chat(self, chat: ChatIds) -> None:
        """Cut at the end; what is left may hold nothing to learn."""
        limit, begin, end = self.data.max_length, chat.spans[0][0], chat.spans[-1][1]
        self.num_cut += end > limit
        if begin >= limit:
            self.num_dropped += 1
            return
        learned = [False] * end
        for start, stop in chat.spans:
            learned[start:stop] = [True] * (stop - start)
        kept = slice(begin, min(end, limit))
        self.examples.append((chat.ids[:begin], chat.ids[kept], learned[kept]))

    def describe(self) -> str:
        """Counts of what trains."""
        dropped = f", {self.num_dropped} of them dropped: nothing to learn is left"
        return (
            f"{len(self.examples):,} training examples; {self.num_cut} longer than "
            f"{self.data.max_length} tokens{dropped if self.num_dropped else ''}"
        )

    def train_batch(
        self, start: int, stop: int, level_weights: Sequence[float] = ()
    ) -> list[Example]:
        """Epochs over the files, each in an order of its own; files have no levels to weigh."""
        size = len(self.examples)
        orders = {
            epoch: np.random.default_rng((self.seed, epoch)).permutation(size)
            for epoch in range(start // size, (stop - 1) // size + 1)
        }
        return [self.examples[orders[i // size][i % size]] for i in range(start, stop)]

    def held_out(self, sizes: Mapping[str, int]) -> dict[str, TaskSet]:
        """Every fourth held-out task each; evaluation-only files join the test."""
        parts = {}
        for part in PARTS:
            tasks = list(self.evaluation[part])
            # In file order a part that is cut short would lose whole files.
            random.Random(f"{self.seed}/{part}/order").shuffle(tasks)
            parts[part] = TaskSet(f"files/{part}", tuple(tasks[: sizes[part]]))
        return parts

    def collect(self, model: Any, tokenizer: Any, tasks: TaskSet, **kwargs: Any) -> OutcomeTable:
        """Quality: exp(-(nll_t - nll_top)+) of the completion, design section 2."""
        limit = model.config.max_position_embeddings
        fitting = _fitting(tokenizer, tasks, limit)
        if not len(fitting):
            raise ValueError(f"data.files: none of {len(tasks)} held-out tasks fits {limit} tokens")
        table = collect_outcomes(model, tokenizer, fitting, **kwargs)
        return replace(table, quality=np.exp(-np.maximum(table.nll - table.nll[:, -1:], 0.0)))


def _fitting(tokenizer: Any, tasks: TaskSet, limit: int) -> TaskSet:
    pairs = encode_tasks(tokenizer, list(tasks))
    kept = [t for t, (p, c) in zip(tasks, pairs, strict=True) if len(p) + len(c) <= limit]
    return TaskSet(tasks.name, tuple(kept))


def resolve_data(path: str) -> Path:
    """A data file as given, or below the folder in DVPA_DATA (by its name).

    Raises:
        FileNotFoundError: it is in neither place.
    """
    tried = [Path(path)]
    if os.environ.get("DVPA_DATA"):
        tried.insert(0, Path(os.environ["DVPA_DATA"]) / Path(path).name)
    for candidate in tried:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"data.files: {path}: no such file (set DVPA_DATA to its folder)")


class BatchDataset:
    """Map-style dataset: item i is micro-batch i of the stage: a loader's position is one number.

    All processes together read, in one order that no number of them changes, the examples from
    `first` on; this one reads its part of every micro-batch.

    Args:
        part: of this process among all, in a step of one micro-batch.
        accumulate: micro-batches of a step.
        skipped: batches of the stage, by number, that are left out: the next ones move up.
    """

    def __init__(
        self,
        source: Source,
        stage: StageConfig,
        first: int,
        part: Part = WHOLE_STEP,
        accumulate: int = 1,
        skipped: Sequence[int] = (),
    ) -> None:
        self.source, self.stage, self.first = source, stage, first
        self.part, self.accumulate, self.skipped = part, accumulate, sorted(skipped)
        check_batch(stage, part.count * accumulate)

    def __len__(self) -> int:
        return self.stage.steps * self.accumulate

    def __getitem__(self, index: int) -> tuple[list[Example], list[Example]]:
        """(Examples of the micro-batch, those of all this process's that the step still has).

        The step's first micro-batch is asked how much there is to learn in all of it.
        """
        step, micro = divmod(index, self.accumulate)
        own = self._read(step, micro)
        if micro:
            return own, own
        later = (self._read(step, i) for i in range(1, self.accumulate))
        return own, [*own, *chain.from_iterable(later)]

    def _read(self, step: int, micro: int) -> list[Example]:
        parts = self.accumulate * self.part.count
        size = self.stage.batch_size // parts
        start = self.first + self.number(step) * self.stage.batch_size
        start += (micro * self.part.count + self.part.index) * size
        return self.source.train_batch(start, start + size, self.stage.level_weights)

    def number(self, step: int) -> int:
        """The batch that a step reads."""
        for skipped in self.skipped:
            step += skipped <= step
        return step


def check_batch(stage: StageConfig, parts: int) -> None:
    """ValueError unless the stage's batch falls into so many equal parts."""
    if stage.batch_size % parts:
        raise ValueError(
            f"stages.{stage.name}.batch_size: {stage.batch_size} must be a multiple of {parts} "
            "(processes times strategy.accumulate)"
        )

"""Training rows from prepared folders; evaluation from the tasks or files given beside them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dvpa.evaluate.table import OutcomeTable
from dvpa.tasks import TaskSet
from dvpa_train.config import Recipe
from dvpa_train.mixture import Mixture, Schedule
from dvpa_train.packed import PackedDataset, PackedRow
from dvpa_train.tokenizer_files import tokenizer_hash

if TYPE_CHECKING:
    from dvpa_train.examples import Source


class PackedSource:
    """Sample i of the run, for every i: its stage's mixture says which folder, the folder's own
    order which window. A window comes again only when its folder's epoch is over.

    `evaluation` gives the held-out tasks; it never trains.

    Raises:
        FileNotFoundError, ValueError: a folder is not prepared, or damaged.
    """

    def __init__(self, recipe: Recipe, evaluation: "Source") -> None:
        packed = recipe.data.packed
        assert packed is not None
        self.recipe, self.evaluation = recipe, evaluation
        seed = recipe.seed if packed.seed is None else packed.seed
        self.datasets = [
            PackedDataset(part.path, packed.sequence_length, seed) for part in packed.sources
        ]
        names = [part.label for part in packed.sources]
        default = {part.label: part.weight for part in packed.sources}
        self.schedule = Schedule(
            [
                (
                    stage.steps * stage.batch_size,
                    Mixture([(stage.mixture or default).get(name, 0.0) for name in names]),
                )
                for stage in recipe.stages
            ]
        )

    def tokenizer_lines(self) -> Iterator[str]:
        """Nothing: packed data comes with its tokenizer.

        Raises:
            ValueError: always.
        """
        raise ValueError("tokenizer: packed data needs the tokenizer it was prepared with")

    def prepare(self, tokenizer: Any) -> None:
        """Check that the folders were prepared with this tokenizer.

        Raises:
            ValueError: another tokenizer, or ids that this one does not have.
        """
        ours = tokenizer_hash(Path(tokenizer.name_or_path))
        for dataset in self.datasets:
            manifest = dataset.manifest
            if manifest.tokenizer_sha256 != ours:
                raise ValueError(
                    f"data.packed: {dataset.folder}: prepared with another tokenizer (sha256 "
                    f"{manifest.tokenizer_sha256[:16]}.., this run's {ours[:16]}..)"
                )
            if manifest.vocab_size > len(tokenizer):
                raise ValueError(
                    f"data.packed: {dataset.folder}: vocab_size {manifest.vocab_size} must be at "
                    f"most the tokenizer's {len(tokenizer)}"
                )
        self.evaluation.prepare(tokenizer)

    def train_batch(
        self, start: int, stop: int, level_weights: Sequence[float] = ()
    ) -> list[PackedRow]:
        """Rows of samples start .. stop - 1; packed data has no levels to weigh."""
        sources, within = self.schedule.locate(np.arange(start, stop))
        return [
            self.datasets[source].sample(number)
            for source, number in zip(sources.tolist(), within.tolist(), strict=True)
        ]

    def describe(self) -> str:
        """Nothing to say: `dvpa-train prepare` has reported what it left out."""
        return ""

    def held_out(self, sizes: Mapping[str, int]) -> dict[str, TaskSet]:
        """Of the evaluation beside."""
        return self.evaluation.held_out(sizes)

    def collect(self, model: Any, tokenizer: Any, tasks: TaskSet, **kwargs: Any) -> OutcomeTable:
        """Of the evaluation beside."""
        return self.evaluation.collect(model, tokenizer, tasks, **kwargs)

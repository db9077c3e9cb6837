"""The steps of an assembly in a database on the disk, and what became of each in a few bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dvpa.checkpoint.headers import TensorInfo
from dvpa.checkpoint.interpolate import FORMATS
from dvpa.checkpoint.scratch_database import Row, ScratchDatabase
from dvpa.checkpoint.stored_headers import info_of, stored
from dvpa.checkpoint.tensor_class import CLASSES

SCALE_SUFFIX = "_scale_inv"
MERGED, COPIED, KEPT, EQUAL = "merged", "copied", "kept", "equal"
ACTIONS = {
    MERGED: "combined from several parents",
    COPIED: "one parent's bytes, as the rule says",
    KEPT: "the base's bytes: the difference is below the threshold",
    EQUAL: "the base's bytes: the parents do not differ",
}
_ACTIONS = tuple(ACTIONS)
_SCHEMA = """
CREATE TABLE steps (
    number INTEGER PRIMARY KEY, unit INTEGER, name TEXT, scaled INTEGER, class INTEGER,
    expert TEXT, rule INTEGER, dtype TEXT, shape TEXT, num_bytes INTEGER
)
"""
_COLUMNS = "number, unit, name, scaled, class, expert, rule, dtype, shape, num_bytes"


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor, or an FP8 weight and its scale, to be taken or combined under a rule."""

    number: int
    name: str
    scale: str | None
    tensor_class: str
    expert: str | None  # the routed expert that it is of, with its layer
    rule: int
    info: TensorInfo
    num_bytes: int  # of the result, the scale's included

    @property
    def can_combine(self) -> bool:
        """Whether values can be computed with: floats, and FP8 with scales."""
        return self.info.dtype in FORMATS or self.scale is not None


class StepTable:
    """Every step, numbered in the order of the base's files, and the unit it is decided in."""

    def __init__(self, database: ScratchDatabase) -> None:
        self._database = database
        for statement in (
            _SCHEMA,
            "CREATE INDEX units ON steps (unit)",
            "CREATE INDEX experts ON steps (expert, rule)",
        ):
            database.run(statement)

    def __len__(self) -> int:
        return self._sum("COUNT(*)")

    def __iter__(self) -> Iterator[Step]:
        query = f"SELECT {_COLUMNS} FROM steps ORDER BY number"
        return map(_step, self._database.rows(query))

    def add(self, step: Step, unit: int) -> None:
        """Append a step; a unit is known by the number of its first step."""
        self._database.run(
            f"INSERT INTO steps ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(step.number, unit, step.name, step.scale is not None),
            *(CLASSES.index(step.tensor_class), step.expert, step.rule),
            *(step.info.dtype, stored(step.info.shape), step.num_bytes),
        )

    def unit_of(self, step: Step) -> int | None:
        """The unit of an earlier step of the same expert under the same rule."""
        query = "SELECT unit FROM steps WHERE expert = ? AND rule = ? LIMIT 1"
        row = self._database.first(query, step.expert, step.rule)
        return None if row is None else int(row[0])

    def units(self) -> Iterator[list[Step]]:
        """Steps that are decided together, unit by unit."""
        rows = self._database.rows(f"SELECT {_COLUMNS} FROM steps ORDER BY unit, number")
        for _, unit in groupby(rows, key=lambda row: row[1]):
            yield [_step(row) for row in unit]

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data in the result."""
        return self._sum("SUM(num_bytes)")

    @property
    def num_scales(self) -> int:
        """Steps that take a scale along."""
        return self._sum("SUM(scaled)")

    def columns(self) -> NDArray[np.void]:
        """Of every step `class` (an index of CLASSES), `rule`, `tensors` (1 or 2), `num_bytes`."""
        kinds = [("class", np.uint8), ("rule", np.uint16), ("tensors", np.uint8)]
        table = np.empty(len(self), [*kinds, ("num_bytes", np.int64)])
        query = "SELECT class, rule, scaled + 1, num_bytes FROM steps ORDER BY number"
        for i, row in enumerate(self._database.rows(query)):
            table[i] = row
        return table

    def _sum(self, what: str) -> int:
        row = self._database.first(f"SELECT {what} FROM steps")
        assert row is not None
        return int(row[0] or 0)


def _step(row: Row) -> Step:
    number, _, name, scaled, kind, expert, rule, dtype, shape, num_bytes = row
    scale = name + SCALE_SUFFIX if scaled else None
    info = info_of(dtype, shape)
    return Step(number, name, scale, CLASSES[kind], expert, rule, info, num_bytes)


class Outcome(NamedTuple):
    """What became of a tensor.

    `parent` gave the bytes (None: several did). `difference` is the largest root mean square of
    the elements' differences from the base among the parents that share in it, `relative` the
    same over the base's own root mean square; None where nothing was compared.
    """

    action: str
    parent: int | None
    difference: float | None = None
    relative: float | None = None


class Outcomes:
    """One `Outcome` per step, or None as long as there is none; 19 bytes each.

    `table` has `action` (index into ACTIONS, -1: none yet), `parent` (-1: several), `difference`
    and `relative` (NaN: not compared).
    """

    def __init__(self, count: int) -> None:
        kinds = [("action", np.int8), ("parent", np.int16)]
        numbers = [("difference", np.float64), ("relative", np.float64)]
        self.table = np.empty(count, [*kinds, *numbers])
        self.table["action"] = -1

    def __getitem__(self, number: int) -> Outcome | None:
        action, parent, difference, relative = self.table[number].item()
        if action < 0:
            return None
        return Outcome(
            _ACTIONS[action],
            None if parent < 0 else parent,
            None if np.isnan(difference) else difference,
            None if np.isnan(relative) else relative,
        )

    def __setitem__(self, number: int, outcome: Outcome) -> None:
        parent = -1 if outcome.parent is None else outcome.parent
        numbers = (np.nan if x is None else x for x in (outcome.difference, outcome.relative))
        self.table[number] = (_ACTIONS.index(outcome.action), parent, *numbers)

    def are_known(self, steps: Sequence[Step]) -> bool:
        """Whether each of these steps has an outcome."""
        return all(self.table["action"][step.number] >= 0 for step in steps)

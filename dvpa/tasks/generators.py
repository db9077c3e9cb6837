"""Graded tasks from a seed: easy ones every tier solves, hard ones that pay for more experts, and
hopeless ones.

level   string    sorting   arithmetic               base            recall (rank of the fact)
0       copy      -         two digits +- one        -               most frequent 1 %
1       reverse   -         two digits + one, carry  -               next 10 %
2       -         sort      two +- two digits        below 100       next 33 %
3       -         unique    product; three operands  below 1,000     the rest
4       hopeless: facts of the same form that are in no training split, so no tier can know them

What makes the levels honest:
- Facts look the same at every level: two-syllable keys, one-syllable values, drawn from one
  distribution. Only having met a fact often makes it easy; fewer facts share a level's weight at
  level 0 than at level 3.
- Length follows difficulty in arithmetic and sorting, but not in recall, and copying four letters
  is longer than a product; `filler` puts meaningless words in front of a share of the questions to
  loosen the tie further.
- An item depends on (seed, split, stream, index) only, through BLAKE2b and SplitMix64: no state, no
  process, no Python version. A question belongs to one split by its own hash, whatever the seed.
  Facts are the exception by nature: training has them all, `fit` has half of them (the difficulty
  head and the tier map share that split), `calibrate` and `test` a quarter each.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from .draws import Draws, stable_hash
from .forms import FORMS_BY_LEVEL, NUM_KEYS, SYLLABLES, fact_question, key_of, made_up_fact
from .task_set import Task, TaskSet

SPLITS = ("train", "fit", "calibrate", "test")
KINDS = ("string", "sorting", "arithmetic", "base", "recall", "hopeless")
NUM_LEVELS = 5
HOPELESS_LEVEL = 4
FILLER_WORD = "hm"

_EVALUATION_SPLITS = SPLITS[1:]
_FACT_TURNS = ("fit", "calibrate", "test", "fit")
_RANK_SHARES = (0.01, 0.11, 0.4433)  # of num_facts: where levels 0, 1, 2 of recall end


class GradedTasks:
    """Tasks of levels 0 to 4 from a seed.

    num_facts: facts in the training split, 300 .. 5000. level_weights: how often each level is
    drawn (relative); the training split has no level 4, whose weight is dropped there. zipf:
    exponent of the frequency of a fact by its rank within its level, in training only (0: uniform).
    filler: share of questions with one to four filler words in front. recall_share: share of facts
    in levels 0 .. 3 (None: as often as each other form of the level).
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        num_facts: int = 3000,
        level_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0, 1.0),
        zipf: float = 0.0,
        filler: float = 0.0,
        recall_share: float | Sequence[float] | None = None,
    ) -> None:
        if not 300 <= num_facts <= 5000:
            raise ValueError(f"num_facts must be in [300, 5000], got {num_facts}")
        if not 0.0 <= zipf <= 4.0:
            raise ValueError(f"zipf must be in [0, 4], got {zipf}")
        if not 0.0 <= filler <= 1.0:
            raise ValueError(f"filler must be in [0, 1], got {filler}")
        shares = _recall_shares(recall_share)
        self.seed = seed
        self.num_facts = num_facts
        self.filler = filler
        self.recall_shares = shares
        self.level_weights = _checked_weights("level_weights", level_weights)
        self._cumulative = {
            split: list(accumulate(self._available(split, self.level_weights))) for split in SPLITS
        }
        self._facts = self._make_facts()
        self._zipf = [
            list(accumulate((rank + 1) ** -zipf for rank in range(len(level))))
            for level in self._facts["train"]
        ]

    def item(self, split: str, index: int, stream: int = 0) -> Task:
        """The index-th task of an endless stream, in O(1); different streams are independent.

        ValueError for an unknown split, a negative index, or a split none of whose levels has a
        weight.
        """
        self._check_split(split)
        if index < 0:
            raise ValueError(f"index must be >= 0, got {index}")
        cumulative = self._cumulative[split]
        if not cumulative[-1]:
            raise ValueError(
                f"level_weights {self.level_weights} leave nothing to draw in split {split!r}"
            )
        draws = Draws(f"{self.seed}/{split}/{stream}/{index}")
        level = bisect_right(cumulative, draws.fraction() * cumulative[-1])
        kind, question, answer = self._draw(split, level, draws)
        return Task.create(self._with_filler(question, draws), answer, level, kind)

    def sample(
        self,
        split: str,
        size: int,
        weights: Sequence[float] | None = None,
        levels: Sequence[int] | None = None,
        seed: int = 0,
        unique: bool | None = None,
    ) -> TaskSet:
        """A task set with exact level counts (largest remainder of size x weight), in shuffled
        order.

        weights: per level, default level_weights. levels: only these. unique: no question twice;
        default for every split but train. ValueError if the split has fewer distinct questions than
        asked for.
        """
        self._check_split(split)
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        checked = self.level_weights if weights is None else _checked_weights("weights", weights)
        chosen = set(range(NUM_LEVELS) if levels is None else levels)
        if not chosen <= set(range(NUM_LEVELS)):
            raise ValueError(f"levels must be within 0 .. {NUM_LEVELS - 1}, got {sorted(chosen)}")
        kept = [w if level in chosen else 0.0 for level, w in enumerate(checked)]
        available = self._available(split, kept)
        if not sum(available):
            raise ValueError(f"levels {sorted(chosen)} have no items in split {split!r}")
        distinct = split != "train" if unique is None else unique
        tasks: list[Task] = []
        for level, count in enumerate(_shares(size, available)):
            tasks += self._of_level(split, level, count, seed, distinct)
        order = Draws(f"{self.seed}/{split}/{seed}/order")
        tasks.sort(key=lambda _: order.bits())
        return TaskSet(f"graded/{split}", tuple(tasks))

    def training_lines(self, num_lines: int) -> Iterator[str]:
        """Text to train a tokenizer on: every task form equally often.

        Facts are made up here, so that no real key becomes a token of its own and tells its rank by
        its length.
        """
        forms = [form for level in FORMS_BY_LEVEL for _, form in level]
        # Facts twice: their syllables are many, and each should become a token.
        forms += [made_up_fact, made_up_fact]
        for index in range(num_lines):
            draws = Draws(f"{self.seed}/lines/{index}")
            question, answer = forms[draws.below(len(forms))](draws)
            yield self._with_filler(question, draws) + " " + answer

    def _draw(self, split: str, level: int, draws: Draws) -> tuple[str, str, str]:
        """(kind, question without filler, answer)."""
        forms = FORMS_BY_LEVEL[level]
        if level == HOPELESS_LEVEL:
            return ("hopeless", *self._draw_fact(split, level, draws))
        if draws.fraction() < self.recall_shares[level]:
            return ("recall", *self._draw_fact(split, level, draws))
        kind, form = forms[draws.below(len(forms))]
        question, answer = form(draws)
        while split_of(question) != split:
            question, answer = form(draws)
        return kind, question, answer

    def _draw_fact(self, split: str, level: int, draws: Draws) -> tuple[str, str]:
        facts = self._facts[split][level]
        if split != "train":
            return facts[draws.below(len(facts))]
        cumulative = self._zipf[level]
        return facts[bisect_right(cumulative, draws.fraction() * cumulative[-1])]

    def _with_filler(self, question: str, draws: Draws) -> str:
        if not self.filler or draws.fraction() >= self.filler:
            return question
        return f"{FILLER_WORD} " * draws.between(1, 4) + question

    def _of_level(self, split: str, level: int, count: int, seed: int, unique: bool) -> list[Task]:
        tasks: list[Task] = []
        seen: set[str] = set()
        attempt = last_new = 0
        while len(tasks) < count:
            draws = Draws(f"{self.seed}/{split}/{seed}/{level}/{attempt}")
            kind, question, answer = self._draw(split, level, draws)
            attempt += 1
            if not unique or question not in seen:  # filler does not make a question another one
                seen.add(question)
                text = self._with_filler(question, draws)
                tasks.append(Task.create(text, answer, level, kind))
                last_new = attempt
            elif attempt - last_new > 20 * len(seen) + 1000:
                raise ValueError(
                    f"size asks for {count} distinct questions of level {level} in split "
                    f"{split!r}, which has about {len(seen)} (unique=False allows repeats)"
                )
        return tasks

    def _make_facts(self) -> dict[str, list[list[tuple[str, str]]]]:
        """Per split and level, (question, answer) in order of rank."""

        def digest(text: str) -> bytes:
            return hashlib.blake2b(text.encode(), digest_size=16).digest()

        keys = sorted(
            (digest(f"{self.seed}/fact/{key}"), key) for key in map(key_of, range(NUM_KEYS))
        )
        ends = [round(self.num_facts * share) for share in _RANK_SHARES]
        bounds = [0, *ends, self.num_facts, len(keys)]
        facts: dict[str, list[list[tuple[str, str]]]] = {
            split: [[] for _ in range(NUM_LEVELS)] for split in SPLITS
        }
        for level in range(NUM_LEVELS):
            for rank in range(bounds[level], bounds[level + 1]):
                hashed, key = keys[rank]
                value = SYLLABLES[int.from_bytes(hashed[8:], "big") % len(SYLLABLES)]
                fact = (fact_question(key), value)
                # In turn, not by hash: level 0 has few facts, and no split may go without.
                facts[_FACT_TURNS[rank % len(_FACT_TURNS)]][level].append(fact)
                if level != HOPELESS_LEVEL:
                    facts["train"][level].append(fact)
        return facts

    @staticmethod
    def _available(split: str, weights: Sequence[float]) -> list[float]:
        unseen = {HOPELESS_LEVEL} if split == "train" else set()
        return [0.0 if level in unseen else weight for level, weight in enumerate(weights)]

    @staticmethod
    def _check_split(split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def split_of(question: str) -> str:
    """The split a generated question (without filler) belongs to: train 80 %, the others a third of
    the rest each.
    """
    part = stable_hash(question) % 15
    return "train" if part < 12 else _EVALUATION_SPLITS[part - 12]


def _recall_shares(given: float | Sequence[float] | None) -> tuple[float, ...]:
    """The share of recall in each of levels 0 .. 3."""
    if given is None:
        return tuple(1.0 / (len(forms) + 1) for forms in FORMS_BY_LEVEL[:HOPELESS_LEVEL])
    shares = (given,) * HOPELESS_LEVEL if isinstance(given, int | float) else tuple(given)
    if len(shares) != HOPELESS_LEVEL or not all(0.0 <= share <= 1.0 for share in shares):
        raise ValueError(
            f"recall_share must be None, or one number or {HOPELESS_LEVEL} in [0, 1], got {given}"
        )
    return shares


def _checked_weights(field: str, weights: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(weight) for weight in weights)
    valid = len(values) == NUM_LEVELS and all(0.0 <= value < float("inf") for value in values)
    if not valid or not sum(values):
        raise ValueError(
            f"{field} must be {NUM_LEVELS} numbers >= 0, not all 0 (levels 0 .. 4), got {values}"
        )
    return values


def _shares(size: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights that add up to size (largest remainder)."""
    exact = [size * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(
        range(len(exact)), key=lambda level: (counts[level] - exact[level], level)
    )
    for level in by_remainder[: size - sum(counts)]:
        counts[level] += 1
    return counts

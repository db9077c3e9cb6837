"""Graded tasks: right answers, disjoint splits, shares of levels, the same in every process."""

import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpa.tasks import KINDS, SPLITS, GradedTasks, verify
from dvpa.tasks.draws import Draws
from dvpa.tasks.forms import FORMS_BY_LEVEL, NUM_KEYS, key_of
from dvpa.tasks.generators import HOPELESS_LEVEL, split_of

ROOT = Path(__file__).resolve().parents[1]
TASKS = GradedTasks(0)
GOLDEN = [
    ("77+5 =", "82", 1, "arithmetic"),
    ("95*12 =", "1140", 3, "arithmetic"),
    ("fact zuri =", "wa", 0, "recall"),
    ("2+28 =", "30", 1, "arithmetic"),
]


def independent_answer(question: str) -> str | None:
    """The answer worked out from the question's text alone; None for facts."""
    words = question.removesuffix(" =").split()
    word, rest = words[0], words[1:]
    if word == "copy":
        return " ".join(rest)
    if word == "reverse":
        return " ".join(rest[::-1])
    if word == "sort":
        return " ".join(letter for letter in "abcdefghijklmnop" for _ in range(rest.count(letter)))
    if word == "unique":
        return " ".join(letter for letter in "ponmlkjihgfedcba" if letter in rest)
    if word == "fact":
        return None
    if word.startswith("base"):
        return None  # int() is the check there, in the other direction
    return str(eval(word, {"__builtins__": {}}))


@pytest.mark.parametrize("split", SPLITS)
def test_every_item_has_the_right_answer_and_passes_only_its_own_verifier(split):
    for index in range(1500):
        task = TASKS.item(split, index)
        assert task.kind in KINDS and task.question.endswith(" =")
        expected = independent_answer(task.question)
        if expected is not None:
            assert task.answer == expected, task
        if task.kind == "base":
            word, number, _ = task.question.split()
            assert int(task.answer, int(word.removeprefix("base"))) == int(number)
        assert verify(task, task.answer) == 1.0
        assert verify(task, f"  {task.answer}\n") == 1.0
        assert verify(task, task.answer + " a") == 0.0
        assert verify(task, task.answer[:-1]) == 0.0
        assert verify(task, "") == 0.0


def test_levels_get_harder_in_the_stated_way():
    for level, bound in ((2, range(100)), (3, range(100, 1000))):
        tasks = TASKS.sample("train", 600, levels=[level]).by_kind("base")
        assert tasks and all(int(task.question.split()[1]) in bound for task in tasks)
    for task in TASKS.sample("test", 60, levels=[0]).by_kind("arithmetic"):
        left, sign, right = task.question.removesuffix(" =").partition(
            "-" if "-" in task.question else "+"
        )
        units = int(left[-1]) + (int(right[-1]) if sign == "+" else -int(right[-1]))
        assert 0 <= units <= 9, f"{task.question} carries"
    assert {task.kind for task in TASKS.sample("test", 50, levels=[HOPELESS_LEVEL])} == {"hopeless"}


def test_items_depend_on_seed_split_stream_and_index_only():
    again = GradedTasks(0)
    assert [again.item("train", i) for i in range(300)] == [
        TASKS.item("train", i) for i in range(300)
    ]
    first = [TASKS.item("train", i) for i in range(50)]
    assert first != [GradedTasks(1).item("train", i) for i in range(50)]
    assert first != [TASKS.item("train", i, stream=1) for i in range(50)]
    assert first != [TASKS.item("train", i) for i in range(50, 100)]
    copied = pickle.loads(pickle.dumps(TASKS))
    assert copied.item("fit", 7) == TASKS.item("fit", 7)


def test_items_are_the_same_in_another_process_with_another_hash_seed():
    program = (
        "from dvpa.tasks import GradedTasks\n"
        "g = GradedTasks(5, zipf=1.0, filler=0.5)\n"
        "print([g.item(s, i) for s in ('train', 'test') for i in range(40)])\n"
        "print(g.sample('fit', 30).tasks)\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(outputs) == 1 and "Task(" in outputs.pop()


def test_known_items_never_change():
    """Golden values: a change here invalidates every published number of the demo."""
    tasks = [TASKS.item("train", index) for index in range(4)]
    assert [(task.question, task.answer, task.level, task.kind) for task in tasks] == GOLDEN


@given(st.integers(0, 10**9), st.integers(0, 10**6), st.sampled_from(SPLITS), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_generated_question_belongs_to_exactly_one_split(index, stream, split, filler):
    tasks = FILLED if filler else TASKS
    task = tasks.item(split, index, stream)
    core = task.question.removeprefix("hm ")
    while core.startswith("hm "):
        core = core.removeprefix("hm ")
    assert filler or core == task.question
    if task.kind not in {"recall", "hopeless"}:
        assert split_of(core) == split
    else:
        places = [s for s in SPLITS if s != "train" and core in QUESTIONS[s]]
        assert len(places) == 1
        assert split in (places[0], "train")


FILLED = GradedTasks(0, filler=1.0)
QUESTIONS = {
    split: {question for level in TASKS._facts[split] for question, _ in level} for split in SPLITS
}


def test_facts_are_all_in_training_and_hopeless_ones_never():
    train = QUESTIONS["train"]
    assert len(train) == TASKS.num_facts
    evaluation = [QUESTIONS[split] for split in ("fit", "calibrate", "test")]
    assert sum(map(len, evaluation)) == len(set().union(*evaluation)) == NUM_KEYS
    for questions, share in zip(evaluation, (0.5, 0.25, 0.25), strict=True):
        assert abs(len(questions & train) - TASKS.num_facts * share) <= 2
    hopeless = TASKS.sample("test", 500, levels=[HOPELESS_LEVEL])
    assert not {task.question for task in hopeless} & train
    assert all(TASKS.item("train", i).level != HOPELESS_LEVEL for i in range(2000))
    by_question = dict(fact for level in TASKS._facts["train"] for fact in level)
    recall = TASKS.sample("test", 400, levels=[0, 1, 2, 3]).by_kind("recall")
    assert recall and all(by_question[task.question] == task.answer for task in recall)


def test_the_key_of_a_fact_does_not_tell_its_level():
    shapes = {
        tuple(letter in "aeiou" for letter in question.split()[1])
        for questions in QUESTIONS.values()
        for question in questions
    }
    assert shapes == {(False, True, False, True)}
    # First letters are distributed alike at the frequent, the rare and the hopeless end.
    rates = []
    for level in (1, 3, HOPELESS_LEVEL):
        keys = [q for s in SPLITS[1:] for q, _ in TASKS._facts[s][level]]
        rates.append(sum(question.split()[1] < "l" for question in keys) / len(keys))
    assert max(rates) - min(rates) < 0.12
    assert len({key_of(number) for number in range(NUM_KEYS)}) == NUM_KEYS


def test_every_form_has_several_hundred_questions_in_training_and_some_in_each_other_split():
    for level in FORMS_BY_LEVEL:
        for kind, form in level:
            questions = {form(Draws(f"{kind}/{i}"))[0] for i in range(4000)}
            splits = Counter(map(split_of, questions))
            assert splits["train"] >= 400, (kind, form, splits)
            assert all(splits[split] >= 20 for split in SPLITS), (kind, form, splits)


def test_sample_has_exact_level_counts_and_no_repeats():
    sample = TASKS.sample("test", 1000)
    assert Counter(task.level for task in sample) == dict.fromkeys(range(5), 200)
    assert len({task.question for task in sample}) == 1000
    assert sample.levels == (0, 1, 2, 3, 4) and sample.kinds == tuple(sorted(KINDS))
    assert [task.level for task in sample] != sorted(task.level for task in sample)
    weighted = TASKS.sample("fit", 10, weights=(2, 1, 1, 0, 0))
    assert Counter(task.level for task in weighted) == {0: 5, 1: 3, 2: 2}
    assert TASKS.sample("train", 101).levels == (0, 1, 2, 3)
    assert TASKS.sample("test", 50).tasks == TASKS.sample("test", 50).tasks
    assert TASKS.sample("test", 50).tasks != TASKS.sample("test", 50, seed=1).tasks


def test_level_weights_shape_the_stream():
    tasks = GradedTasks(0, level_weights=(6, 3, 0, 1, 5))
    train = Counter(tasks.item("train", i).level for i in range(4000))
    assert train.keys() == {0, 1, 3}
    assert abs(train[0] / 4000 - 0.6) < 0.03 and abs(train[3] / 4000 - 0.1) < 0.02
    test = Counter(tasks.item("test", i).level for i in range(1000))
    assert abs(test[4] / 1000 - 1 / 3) < 0.06


def test_recall_share_and_filler_shape_every_level():
    tasks = GradedTasks(0, recall_share=0.6, filler=0.25)
    drawn = [tasks.item("train", i) for i in range(4000)]
    for level in range(4):
        kinds = Counter(task.kind for task in drawn if task.level == level)
        assert abs(kinds["recall"] / kinds.total() - 0.6) < 0.06
    assert abs(sum(task.question.startswith("hm ") for task in drawn) / 4000 - 0.25) < 0.03
    rising = GradedTasks(0, recall_share=[0.0, 0.2, 0.6, 1.0])
    for level, share in enumerate((0.0, 0.2, 0.6, 1.0)):
        kinds = Counter(task.kind for task in rising.sample("train", 1000, levels=[level]))
        assert abs(kinds["recall"] / kinds.total() - share) < 0.06
    never = GradedTasks(0, recall_share=0.0).sample("test", 300, levels=[0, 1, 2, 3])
    assert "recall" not in never.kinds
    # Filler in front does not let a question in twice.
    cores = [task.question.replace("hm ", "") for task in FILLED.sample("test", 1500)]
    assert len(set(cores)) == 1500


def test_zipf_prefers_frequent_facts_in_training_only():
    def top_share(tasks: GradedTasks, split: str) -> float:
        facts = [q for q, _ in tasks._facts[split][3]]
        frequent = set(facts[: len(facts) // 10])
        drawn = [
            t.question
            for t in tasks.sample(split, 2000, levels=[3], unique=False).by_kind("recall")
        ]
        return sum(question in frequent for question in drawn) / len(drawn)

    assert top_share(GradedTasks(0), "train") < 0.2
    assert top_share(GradedTasks(0, zipf=1.0), "train") > 0.5
    assert top_share(GradedTasks(0, zipf=1.0), "test") < 0.2


def test_training_lines_do_not_favour_real_keys():
    lines = list(TASKS.training_lines(3000))
    assert lines == list(TASKS.training_lines(3000))
    assert {line.split()[0] for line in lines} >= {"copy", "reverse", "sort", "unique", "fact"}
    keys = [line.split()[1] for line in lines if line.startswith("fact ")]
    level_0 = {q.split()[1] for q, _ in TASKS._facts["train"][0]}
    assert sum(key in level_0 for key in keys) / len(keys) < 0.03


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GradedTasks(0, num_facts=10), r"num_facts must be in \[300, 5000\], got 10"),
        (lambda: GradedTasks(0, zipf=-1), "zipf"),
        (lambda: GradedTasks(0, filler=1.5), "filler"),
        (lambda: GradedTasks(0, recall_share=-0.1), "recall_share"),
        (lambda: GradedTasks(0, recall_share=[0.5, 0.5]), "recall_share"),
        (lambda: GradedTasks(0, level_weights=(1, 1)), "level_weights must be 5 numbers"),
        (lambda: GradedTasks(0, level_weights=(1, 1, float("nan"), 1, 1)), "level_weights"),
        (lambda: GradedTasks(0, level_weights=(0, 0, 0, 0, 1)).item("train", 0), "nothing to draw"),
        (lambda: TASKS.item("validation", 0), "split must be one of train, fit, calibrate, test"),
        (lambda: TASKS.item("train", -1), "index"),
        (lambda: TASKS.sample("train", 0), "size"),
        (lambda: TASKS.sample("train", 5, levels=[4]), "no items in split 'train'"),
        (lambda: TASKS.sample("test", 5, levels=[5]), "levels"),
        (lambda: TASKS.sample("test", 5000, levels=[4]), "distinct questions of level 4"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

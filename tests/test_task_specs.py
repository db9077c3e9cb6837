"""What `--tasks` can name, and one clear error for everything else."""

import json
from pathlib import Path

import pytest

from dvpa.tasks import GradedTasks
from dvpa.tasks.specs import read_tasks

ROWS = [{"question": f"what is {n} + 1 ?", "answer": str(n + 1)} for n in range(30)]


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_file_of_problems(problems: Path) -> None:
    tasks, repeats = read_tasks([str(problems)], items=100)
    assert (len(tasks), repeats) == (30, 0)
    assert all(task.numeric and not task.by_nll for task in tasks)
    same, _ = read_tasks([f"jsonl:{problems}"], items=100)
    assert same.tasks == tasks.tasks


def test_fewer_items_are_among_more_and_depend_on_the_seed(problems: Path) -> None:
    few, many = (read_tasks([str(problems)], items)[0] for items in (7, 20))
    assert len(few) == 7 and set(few) <= set(many)
    assert set(read_tasks([str(problems)], 7, seed=1)[0]) != set(few)
    order = [task.question for task in many]
    assert order == sorted(order, key=lambda q: [row["question"] for row in ROWS].index(q))


def test_repeats_are_left_out_and_counted(problems: Path) -> None:
    tasks, repeats = read_tasks([str(problems), str(problems)], items=100)
    assert (len(tasks), repeats) == (30, 30)


def test_nll_and_text(tmp_path: Path, problems: Path) -> None:
    assert all(task.by_nll for task in read_tasks([f"nll:{problems}"], 9)[0])
    text = tmp_path / "play.txt"
    text.write_text("\n".join(f"line {n} of a play that goes on and on" for n in range(80)))
    tasks, _ = read_tasks([f"text:{text}"], 100)
    assert len(tasks) > 3
    assert all(task.by_nll and task.kind == "play" for task in tasks)


def test_generated_tasks_are_none_that_a_head_was_trained_on() -> None:
    tasks, _ = read_tasks(["graded:train/pico.yaml"], items=60)
    assert len(tasks) == 60
    generator = GradedTasks(0, num_facts=300, recall_share=0.5)
    trained = {task.question for task in generator.sample("fit", 300)}
    assert not trained & {task.question for task in tasks}
    known = {
        task.question
        for split in ("calibrate", "test")
        for task in generator.sample(split, 30, seed=0)
    }
    assert known == {task.question for task in tasks}  # the recipe's own settings
    assert read_tasks(["graded"], 60)[0].tasks != tasks.tasks


def test_published_files(data_folder: Path) -> None:
    specs = [f"gsm8k:{data_folder}/gsm8k_train.jsonl", f"nll:svamp:{data_folder}/svamp.json"]
    tasks, repeats = read_tasks(specs, items=40)
    assert len(tasks) + repeats == 80
    by_nll = [task.by_nll for task in tasks]
    assert by_nll == [False] * 40 + [True] * (len(tasks) - 40)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("nowhere.jsonl", FileNotFoundError, "nowhere.jsonl"),
        ("gsm8k:nowhere.jsonl", FileNotFoundError, "gsm8k:nowhere"),
        ("nll:graded", ValueError, "verified"),
        ("graded:model/pico.yaml", ValueError, "no data.graded"),
        ("graded:nowhere.yaml", FileNotFoundError, "nowhere.yaml"),
    ],
)
def test_what_cannot_be_read(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_tasks([spec], 10)


def test_bad_rows_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n{"question": "c"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: field 'answer' is missing"):
        read_tasks([str(path)], 10)
    with pytest.raises(ValueError, match="at least one"):
        read_tasks([], 10)
    with pytest.raises(ValueError, match="items: 0"):
        read_tasks([str(path)], 0)

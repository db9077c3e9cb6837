"""Sources of examples: graded draws and local files; what trains never evaluates."""

import json
from pathlib import Path

import pytest

from dvpa.tasks import train_tokenizer
from dvpa_train.config import DataConfig, FileData, GradedData
from dvpa_train.examples import PARTS, FileSource, GradedSource, resolve_data


def _write(folder: Path, rows: int = 200) -> list[FileData]:
    problems = folder / "problems.jsonl"
    lines = [
        json.dumps({"question": f"what is {i} plus 1 ?", "answer": str(i + 1)}) for i in range(rows)
    ]
    problems.write_text("\n".join(lines))
    other = folder / "other.jsonl"
    other.write_text(
        "\n".join(json.dumps({"question": f"only asked {i}", "answer": "x"}) for i in range(9))
    )
    text = folder / "play.txt"
    text.write_text(
        "\n".join(f"line {i} of a rather long play, spoken by nobody." for i in range(400))
    )
    return [
        FileData(str(problems), "jsonl"),
        FileData(str(text), "text"),
        FileData(str(other), "jsonl", evaluation_only=True),
    ]


def _source(folder: Path, seed: int = 0, max_length: int = 64) -> FileSource:
    return FileSource(
        DataConfig(files=_write(folder), max_length=max_length, validation_fraction=0.2), seed
    )


def test_files_are_split_once_and_evaluation_only_files_never_train(tmp_path: Path) -> None:
    source = _source(tmp_path)
    parts = source.held_out(dict.fromkeys(PARTS, 1000))
    held = {task.question for tasks in parts.values() for task in tasks}
    assert sum(len(tasks) for tasks in parts.values()) == len(held)  # no task in two parts
    trained = {task.question for task in source.train}
    assert not trained & held
    assert len([q for q in trained if q.startswith("what is")]) == 160
    assert not any(question.startswith("only asked") for question in trained)
    assert sum(q.startswith("only asked") for q in (t.question for t in parts["test"])) == 9
    lines = "\n".join(source.tokenizer_lines())
    assert "only asked" not in lines
    assert "line 399" not in lines  # text is held out by position: its last part


def test_a_part_cut_short_keeps_some_of_every_file(tmp_path: Path) -> None:
    source = _source(tmp_path)
    whole = source.held_out(dict.fromkeys(PARTS, 1000))["test"]
    short = source.held_out(dict.fromkeys(PARTS, 1000) | {"test": len(whole) // 2})["test"]
    assert [task.id for task in short] == [task.id for task in whole][: len(short)]
    # Evaluation-only files were added last; in file order they would be gone.
    assert any(task.question.startswith("only asked") for task in short)


def test_text_held_out_is_its_last_part(tmp_path: Path) -> None:
    source = _source(tmp_path)
    passages = [task for task in source.train if task.kind == "play"]
    held = [t for tasks in source.held_out(dict.fromkeys(PARTS, 99)).values() for t in tasks]
    first_held = min(int(t.question.split()[1]) for t in held if t.kind == "play")
    assert all(int(task.question.split()[1]) < first_held for task in passages)


def test_every_epoch_visits_every_example_in_another_order(tmp_path: Path) -> None:
    source = _source(tmp_path)
    source.prepare(train_tokenizer(source.tokenizer_lines(), 300))
    size = len(source.examples)
    epochs = [source.train_batch(e * size, (e + 1) * size) for e in range(2)]
    for epoch in epochs:
        assert sorted(map(repr, epoch)) == sorted(map(repr, source.examples))
    assert epochs[0] != epochs[1]
    across = source.train_batch(size - 3, size + 3)  # a batch over the border
    assert across == epochs[0][-3:] + epochs[1][:3]


def test_long_examples_are_cut_and_counted(tmp_path: Path) -> None:
    source = _source(tmp_path, max_length=12)
    source.prepare(train_tokenizer(source.tokenizer_lines(), 300))
    assert source.num_cut > 0
    assert max(len(p) + len(c) for p, c in source.examples) == 12
    assert all(completion for _, completion in source.examples)


def test_another_seed_splits_otherwise(tmp_path: Path) -> None:
    first, second = (_source(tmp_path, seed) for seed in (0, 1))
    questions = [{task.question for task in source.train} for source in (first, second)]
    assert questions[0] != questions[1]


def test_graded_stages_may_weigh_levels_themselves() -> None:
    source = GradedSource(GradedData(num_facts=300), seed=0)
    source.prepare(train_tokenizer(source.tokenizer_lines(), 512))
    only_copies = source.train_batch(0, 50, [1.0, 0.0, 0.0, 0.0])
    any_level = source.train_batch(0, 50)
    assert max(len(p) for p, _ in only_copies) < max(len(p) for p, _ in any_level)
    assert source.train_batch(10, 20) == any_level[10:20]  # the order is endless and fixed


def test_data_files_are_looked_up_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    monkeypatch.setenv("DVPA_DATA", str(tmp_path))
    assert resolve_data("elsewhere/a.jsonl") == tmp_path / "a.jsonl"
    with pytest.raises(FileNotFoundError, match="DVPA_DATA"):
        resolve_data("elsewhere/b.jsonl")


def test_the_words_files_are_read_whole(data_folder: Path) -> None:
    files = [
        FileData(str(data_folder / "gsm8k_train.jsonl"), "gsm8k"),
        FileData(str(data_folder / "svamp.json"), "svamp", evaluation_only=True),
        FileData(str(data_folder / "tinyshakespeare.txt"), "text"),
    ]
    source = FileSource(DataConfig(files=files, validation_fraction=0.15), seed=0)
    kinds = [task.kind for task in source.train]
    assert kinds.count("gsm8k_train") == 7473 - round(0.15 * 7473)
    assert "svamp" not in kinds
    assert kinds.count("tinyshakespeare") > 2000
    test = source.held_out(dict.fromkeys(PARTS, 10_000))["test"]
    assert sum(task.kind == "svamp" for task in test) == 999  # one row is mislabelled
    assert not any("<<" in task.answer for task in source.train)

"""Task sets: sequences, from files, answers compared by value; text corpora."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpa.tasks import GradedTasks, Task, TaskSet, TextCorpus, load_gsm8k, load_svamp, verify
from dvpa.tasks.task_set import final_number

TASKS = GradedTasks(0)


def test_task_set_is_a_sequence():
    tasks = TASKS.sample("test", 40)
    assert len(tasks) == 40 and tasks[0] in tasks and list(tasks)[-1] == tasks[-1]
    assert isinstance(tasks[:5], TaskSet) and len(tasks[:5]) == 5
    assert {task.level for task in tasks.by_level(2)} == {2}
    assert tasks.subset([3, 1]).tasks == (tasks[3], tasks[1])
    assert len(tasks.subset(lambda task: task.level < 2)) == 16
    assert tasks[0].id == Task.create(tasks[0].question, "other", 3, "x").id


@given(st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_split_is_disjoint_complete_and_keeps_equal_questions_together(seed):
    tasks = TASKS.sample("train", 300, unique=False)
    parts = tasks.split({"a": 0.5, "b": 0.3, "c": 0.2}, seed)
    ids = [{task.id for task in part} for part in parts.values()]
    assert sum(map(len, parts.values())) == 300
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    assert 100 < len(parts["a"]) < 200
    with pytest.raises(ValueError, match="fractions"):
        tasks.split({"a": 0.8, "b": 0.3})


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("work\n#### 1,080", "so it is #### 1080", 1.0),
        ("work\n#### 1,080", "#### 1080.0", 1.0),
        ("work\n#### 1,080", "#### 5 no, #### 1,080", 1.0),
        ("work\n#### 1,080", "1080 #### 7", 0.0),
        ("work\n#### 1,080", "1080 ####", 0.0),
        ("51.0", "51", 1.0),
        ("51", "she pays $51.00.", 1.0),
        ("51", "51 or 52", 0.0),
        ("-5", "it is -5", 1.0),
        ("5", "7-5", 1.0),
        ("0.5", ".5", 1.0),
        ("5", "no idea", 0.0),
        ("1", "1" * 5000, 0.0),
    ],
)
def test_numeric_answers_are_compared_by_value(answer, text, expected):
    assert verify(Task.create("q", answer, 0, "task", numeric=True), text) == expected


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-1e9, max_value=1e9))
@settings(deadline=None)
def test_final_number_reads_what_formatting_writes(value):
    assert final_number(f"so #### {value:,}") == value
    assert final_number(f"{value} then, at last, {value:,}.") == value


def test_from_jsonl_reads_fields_levels_and_joined_questions(tmp_path):
    path = tmp_path / "tasks.jsonl"
    rows = [
        {"question": " What? ", "answer": "a b", "level": 2, "kind": "x"},
        {"question": "How many?", "answer": 3.0},
        {"question": "Line\u2028separator", "answer": "#### 1,000"},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    path.write_text(text, encoding="utf-8")
    tasks = TaskSet.from_jsonl(path)
    assert [(t.question, t.answer, t.level, t.kind, t.numeric) for t in tasks] == [
        ("What?", "a b", 2, "x", False),
        ("How many?", "3", 0, "task", True),
        ("Line\u2028separator", "#### 1,000", 0, "task", True),
    ]
    assert tasks.name == "tasks"
    array = tmp_path / "tasks.json"
    array.write_text(json.dumps([{"Body": "It is so", "Q": "Why?", "A": 1}], indent=2))
    joined = TaskSet.from_jsonl(array, question=("Body", "Q"), answer="A", name="mine")
    assert joined[0].question == "It is so. Why?" and joined.name == "mine"
    tasks.to_jsonl(tmp_path / "again.jsonl")
    assert TaskSet.from_jsonl(tmp_path / "again.jsonl").tasks == tasks.tasks


GOOD = '{"question": "q", "answer": "a"}'


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (GOOD + "\n\n{bad}\n", 3, "not valid JSON"),
        (GOOD + '\n{"question": "q"}', 2, "field 'answer' is missing"),
        (GOOD + '\n{"question": " ", "answer": "a"}', 2, "field 'question' is empty"),
        ('{"question": "q", "answer": null}', 1, "field 'answer' must be text or a number"),
        ('{"question": "q", "answer": true}', 1, "field 'answer'"),
        ('{"question": "q", "answer": NaN}', 1, "field 'answer'"),
        ('{"question": "q", "answer": "a", "level": -1}', 1, "level must be an integer >= 0"),
        ('{"question": "q", "answer": "a", "level": "2"}', 1, "level must be an integer >= 0"),
        ('{"question": "q", "answer": "a", "kind": 3}', 1, "kind must be non-empty text"),
        ("[1]", 1, "expected a JSON object, got int"),
        (f"[{GOOD},\n{GOOD}\n,\n 3]", 4, "expected a JSON object, got int"),
        (f"[{GOOD},\n{{]", 2, "not valid JSON"),
        (f"[{GOOD},\n]", 2, "not valid JSON"),
        (f"[{GOOD}\n{GOOD}]", 2, "expected ',' or ']'"),
        (f"[{GOOD}", 1, "expected ',' or ']'"),
        (f"[{GOOD}]\n]", 2, "text after the array"),
        ("[]", 1, "no records"),
        ("", 1, "no records"),
    ],
)
def test_a_bad_file_is_one_error_with_file_and_line(tmp_path, content, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        TaskSet.from_jsonl(path)
    assert str(error.value).startswith(f"{path}:{line}: ") and message in str(error.value)


def test_bad_encoding_missing_file_and_missing_number(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\xff\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: not valid UTF-8"):
        TaskSet.from_jsonl(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TaskSet.from_jsonl(tmp_path / "nowhere.jsonl")
    path.write_text(GOOD)
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: field 'answer' holds no number"):
        TaskSet.from_jsonl(path, numeric=True)


def test_text_corpus_splits_by_position(tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("".join(f"line {number}\n" for number in range(60)))
    second.write_text("".join(f"more {number}\n" for number in range(40)))
    corpus = TextCorpus.from_files([first, second])
    assert corpus.name == "first+second" and len(corpus.documents) == 2
    train, validation = corpus.split(0.2)
    assert "".join(train.documents + validation.documents) == "".join(corpus.documents)
    assert all(document.endswith("\n") for document in train.documents)
    assert abs(validation.num_characters / corpus.num_characters - 0.2) < 0.02
    assert list(corpus.lines())[60] == "more 0"
    assert len(list(train.lines())) + len(list(validation.lines())) == 100
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="validation_fraction"):
            corpus.split(fraction)
    with pytest.raises(ValueError, match="leaves one side"):
        TextCorpus("one line", ("no line end at all",)).split(0.5)
    first.write_text(" \n")
    with pytest.raises(ValueError, match=r"first\.txt:1: no text"):
        TextCorpus.from_files(first)
    with pytest.raises(ValueError, match="at least one file"):
        TextCorpus.from_files([])


def test_gsm8k_as_published(data_folder):
    tasks = load_gsm8k(data_folder / "gsm8k_train.jsonl")
    assert len(tasks) == 7473
    assert Counter(task.level for task in tasks)[2] == 2175  # the folder's README counts them so
    assert not any("<<" in task.answer for task in tasks)
    assert "<<" in load_gsm8k(data_folder / "gsm8k_train.jsonl", keep_annotations=True)[0].answer
    for task in tasks[:200]:
        number = task.answer.split("####")[1].strip().replace(",", "")
        assert verify(task, number) == 1.0 == verify(task, task.answer)
        assert verify(task, str(int(number) + 1)) == 0.0


def test_svamp_as_published(data_folder):
    tasks = load_svamp(data_folder / "svamp.json")
    assert len(tasks) == 999  # without the one wrong label
    assert Counter(task.kind for task in tasks) == {
        "svamp-subtraction": 531,
        "svamp-addition": 194,
        "svamp-common-division": 166,
        "svamp-multiplication": 108,
    }
    assert Counter(task.level for task in tasks)[1] in (236, 237)
    assert tasks[0].answer == "51" and verify(tasks[0], "51.0 dollars") == 1.0
    assert ". How much do you have to pay" in tasks[0].question


def test_shakespeare_by_position(data_folder):
    corpus = TextCorpus.from_files(data_folder / "tinyshakespeare.txt")
    _, validation = corpus.split(0.1)
    assert corpus.num_characters == 1_115_394
    assert corpus.documents[0].endswith(validation.documents[0])
    assert abs(validation.num_characters - 111_539) < 200

"""The SentencePiece tokenizer and its Transformers wrapping; SentencePiece itself is the oracle."""

import subprocess
import sys

import pytest
import sentencepiece
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dvpa.tasks import GradedTasks, TaskSet, TextCorpus, load_gsm8k, train_tokenizer
from dvpa.tasks.encoding import encode_task, encode_tasks
from dvpa.tasks.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS

TASKS = GradedTasks(0)
SPACE_MARK = "\u2581"
# Text the pieces can match as well as text they cannot, runs of one character above all: that is
# where a pair-ranked BPE and a score-ranked one could part.
PIECES = ["a", "b", "op", "copy", "ba", "base", " ", "  ", "\n", "\t", "1", "23", "=", "--", "\x00"]
TEXTS = st.text() | st.lists(st.sampled_from([*PIECES, "\u00e9", "\u3000"])).map("".join)
RUN_LINES = ["a" * (n % 9) + " " + "-" * (n % 11) + "ab" * (n % 4) for n in range(400)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of the demo's size, saved."""
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TASKS.training_lines(8000), 512, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    """The same, as a user loads it."""
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def oracle(folder):
    """SentencePiece on the same model file."""
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def run_tokenizer():
    """One with pieces that are runs of one character, "aa", "aaaa", "----"."""
    return train_tokenizer(RUN_LINES, 285)


def test_special_tokens_size_and_defaults(tokenizer, oracle):
    assert len(tokenizer) == 512 == oracle.get_piece_size()
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == list(SPECIAL_TOKENS)
    ids = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert (*ids, tokenizer.pad_token_id) == (0, 1, 2, 3)
    assert tokenizer("copy a =")["input_ids"][0] == tokenizer.bos_token_id
    batch = tokenizer(["a b", "a"], padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"][1][0] == 3 and batch["attention_mask"][1][0] == 0


@given(TEXTS)
@example("")
@example(" ")
@example("<0x41> \u2585 \u2028 \U0001f642\ufe0f e\u0301")
@settings(max_examples=400)
def test_ids_equal_sentencepiece(tokenizer, oracle, text):
    # SentencePiece cannot tell its own space mark from a space, and has no special tokens in text.
    text = text.replace(SPACE_MARK, "")
    assume(not any(token in text for token in SPECIAL_TOKENS))
    assert tokenizer.encode(text, add_special_tokens=False) == oracle.encode(text)


@given(TEXTS)
@example("\u2581\u2582 spark \u2581")
@example("   two  spaces\n\n\tand ends ")
@example("<unk><pad>")
@settings(max_examples=400)
def test_decoding_gives_the_text_back(tokenizer, text):
    text = text.replace("\ufdd0", "")  # the one noncharacter that is used as an escape
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    if not any(token in text for token in SPECIAL_TOKENS):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@given(
    st.lists(st.sampled_from(["a", "aa", "-", "---", "ab", "ba", " "]), max_size=30).map("".join)
)
@settings(max_examples=400)
def test_runs_of_one_character_equal_sentencepiece(run_tokenizer, run_oracle, text):
    assert run_tokenizer.encode(text, add_special_tokens=False) == run_oracle.encode(text)


@pytest.fixture(scope="module")
def run_oracle(tmp_path_factory):
    """SentencePiece's own view of run_tokenizer."""
    path = tmp_path_factory.mktemp("runs")
    train_tokenizer(RUN_LINES, 285, path)
    return sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))


@given(st.text(), st.text())
@settings(max_examples=200)
def test_parts_cut_at_a_space_encode_to_the_same_ids(tokenizer, left, right):
    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    # A special token spelt out swallows the space before it, unless split_special_tokens is set.
    assume(not any(token in left + " " + right for token in SPECIAL_TOKENS))
    if left and right:
        assert encode(left + " " + right) == encode(left) + encode(right)


def test_letters_digits_and_command_words_are_single_tokens(tokenizer):
    for letter in "abcdefghijklmnop":
        assert len(tokenizer.tokenize(letter)) == 1
    for word in ("copy", "reverse", "sort", "unique", "base", "fact", "="):
        assert tokenizer.tokenize(word) == [SPACE_MARK + word]
    assert tokenizer.tokenize("90=8") == [SPACE_MARK, "9", "0", "=", "8"]
    assert tokenizer.tokenize("a c p =") == [SPACE_MARK + piece for piece in "acp="]
    assert tokenizer.tokenize("a\nb")[1] == "<0x0A>"


def test_fact_prompts_have_one_length_at_every_level(tokenizer):
    lengths: dict[int, list[int]] = {}
    for task in TASKS.sample("test", 1500):
        if task.kind in {"recall", "hopeless"}:
            prompt, answer = encode_task(tokenizer, task.question, task.answer)
            lengths.setdefault(task.level, []).append(len(prompt))
            assert len(answer) == 2
    assert lengths.keys() == {0, 1, 2, 3, 4}
    for found in lengths.values():
        assert sum(length == 5 for length in found) >= 0.9 * len(found)


def test_encode_tasks_equals_encode_task_one_by_one(tokenizer):
    tasks = TASKS.sample("fit", 200)
    expected = [encode_task(tokenizer, task.question, task.answer) for task in tasks]
    assert encode_tasks(tokenizer, tasks) == expected
    prompt, answer = expected[0]
    text = f"{tasks[0].question} {tasks[0].answer}"
    assert prompt + answer == [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert tokenizer.decode(answer, skip_special_tokens=True) == tasks[0].answer
    assert prompt == tokenizer(tasks[0].question)["input_ids"]
    empty = TaskSet("bad", (tasks[0].create("", "a", 0, "task"),))
    with pytest.raises(ValueError, match="question must hold at least one token"):
        encode_tasks(tokenizer, empty)


def test_save_and_load_again_is_identical(tokenizer, tmp_path):
    tokenizer.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    text = "sort a c b = <\u00e9> 12\n \u2581"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.get_vocab() == tokenizer.get_vocab() and again.padding_side == "left"
    assert again.decode(again.encode(text, add_special_tokens=False)) == text


def test_the_same_lines_give_the_same_bytes(folder, tmp_path):
    train_tokenizer(TASKS.training_lines(8000), 512, tmp_path)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_training_is_silent_and_import_is_light(tmp_path):
    program = (
        "import sys, dvpa.tasks\n"
        "assert not {'torch', 'transformers', 'sentencepiece'} & set(sys.modules)\n"
        "from dvpa.tasks import train_tokenizer\n"
        "train_tokenizer(['a b c d'] * 50, 268)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and "trainer" not in result.stderr


@pytest.mark.parametrize(
    ("lines", "vocab_size", "message"),
    [
        (["a b"], MIN_VOCAB_SIZE, f"vocab_size must be > {MIN_VOCAB_SIZE}"),
        (["".join(map(chr, range(97, 123)))] * 20, 265, "vocab_size 265 does not fit"),
        ([], 300, "lines hold no text"),
        (["", "\n"], 300, "lines hold no text"),
    ],
)
def test_bad_arguments_are_named(lines, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(lines, vocab_size)
    with pytest.raises(ValueError, match="character_coverage"):
        train_tokenizer(["a b"], 300, character_coverage=2.0)


def test_a_small_corpus_gives_a_smaller_vocabulary(caplog):
    tokenizer = train_tokenizer(["a b a b"] * 30, 400)
    assert MIN_VOCAB_SIZE < len(tokenizer) < 400
    assert f"only {len(tokenizer)} of 400 tokens" in caplog.text


def test_real_text_at_a_real_size(data_folder):
    tasks = load_gsm8k(data_folder / "gsm8k_train.jsonl")
    corpus = TextCorpus.from_files(data_folder / "tinyshakespeare.txt")
    lines = [*(f"{t.question}\n{t.answer}" for t in tasks[:2000]), *list(corpus.lines())[:8000]]
    tokenizer = train_tokenizer(lines, 2000)
    assert len(tokenizer) == 2000
    for text in (tasks[-1].question, tasks[-1].answer, corpus.documents[0][-3000:]):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert 1.5 < len(text) / len(ids) < 6.0  # characters per token

"""The detokenizer against the whole decode, on byte-fallback and byte-level tokenizers."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dvpa.engine.detokenizer import Detokenizer
from dvpa.engine.sampling_params import SamplingParams
from dvpa.tasks import GradedTasks
from dvpa.tasks.tokenizer import train_tokenizer

EMOJI = "\U0001f600"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
LINES = GradedTasks(0).training_lines(2000)


def byte_level():
    """A GPT-2 like tokenizer: pieces are bytes, so one token may end inside a character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Text of many scripts, so that some pieces hold halves of characters.
    backend.train_from_iterator([*LINES, *["\u00e9\u00ea\u6c49\u5b57" + EMOJI] * 50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"byte_fallback": train_tokenizer(LINES, 420), "byte_level": byte_level()}
KINDS = st.sampled_from(sorted(TOKENIZERS))
PIECES = ["a", "b", "copy ", " ", "  ", "\n", "=", "\u00e9", "\u6c49", EMOJI, FAMILY, "\ufffd"]
TEXTS = st.text() | st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


def encode(kind, text):
    return TOKENIZERS[kind].encode(text, add_special_tokens=False)


def run(kind, ids, **params):
    """Push until stopped; gives the detokenizer, finished, and the pieces it gave."""
    detokenizer = Detokenizer(TOKENIZERS[kind], SamplingParams(max_tokens=None, **params))
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.stopped is not None:
            break
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text
    return detokenizer, pieces


@settings(max_examples=300)
@given(KINDS, TEXTS)
@example("byte_fallback", "\u6c49\u5b57" * 100)  # hundreds of byte tokens in a run
@example("byte_fallback", "\u6c49" * 11 + " copy a")  # settled by length just before a space
@example("byte_fallback", " " * 50 + "a")
@example("byte_level", EMOJI * 60)
def test_the_pieces_are_the_text(kind, text):
    ids = encode(kind, text)
    detokenizer, _ = run(kind, ids)
    assert detokenizer.text == TOKENIZERS[kind].decode(ids)
    assert detokenizer.stopped is None


@settings(max_examples=500)
@given(KINDS, st.lists(st.integers(0, 430), max_size=30), st.booleans())
@example("byte_fallback", [2, 261, 2, 300], True)
def test_any_tokens_give_the_whole_decode(kind, ids, skip):
    """Broken UTF-8, special and unknown tokens anywhere."""
    detokenizer, _ = run(kind, ids, skip_special_tokens=skip)
    whole = TOKENIZERS[kind].decode(ids, skip_special_tokens=skip)
    assert detokenizer.text == whole


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", [EMOJI, FAMILY, "a" + EMOJI + "b", "x \u00e9\u6c49 " + EMOJI])
def test_no_piece_shows_half_a_character(kind, text):
    ids = encode(kind, text)
    assert len(ids) > len(text) // 2
    _, pieces = run(kind, ids)
    assert len([piece for piece in pieces if piece]) >= len(text.split())
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_streams(kind):
    """Words come at once, and an uncovered script within a bounded delay."""
    _, pieces = run(kind, encode(kind, "copy a b c = a b c"))
    assert all(pieces[:-1]) and pieces[-1] == ""
    text = "\u0985\u0986\u0987" * 100
    ids = encode(kind, text)
    assert len(ids) > 600
    _, pieces = run(kind, ids)
    assert max(map(len, pieces)) <= 12 and "".join(pieces) == text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_garbage_stays_linear_and_streams(kind, monkeypatch):
    """A thousand invalid bytes never decode more than a bounded window."""
    tokenizer = TOKENIZERS[kind]
    bad = next(i for i in range(4, 300) if tokenizer.decode([i]) == "\ufffd")
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    windows, decode = [], type(tokenizer).decode

    def spy(self, token_ids, **kwargs):
        windows.append(len(token_ids))
        return decode(self, token_ids, **kwargs)

    monkeypatch.setattr(type(tokenizer), "decode", spy)
    for _ in range(1000):
        detokenizer.push(bad)
    assert len(detokenizer.text) > 800 and set(detokenizer.text) == {"\ufffd"}
    assert max(windows) <= 128


def first_stop(text, stops):
    """The stop string that is complete first when the text is read a character at a time."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), longest
    return None


STOPS = st.lists(st.text("ab =\n\u00e9" + EMOJI, min_size=1, max_size=4), max_size=4)


@settings(max_examples=500)
@given(KINDS, st.text("ab =\n\u00e9" + EMOJI, max_size=30), STOPS, st.booleans())
def test_a_stop_string_is_found_if_it_is_there(kind, text, stops, include):
    whole = TOKENIZERS[kind].decode(encode(kind, text))
    detokenizer, _ = run(kind, encode(kind, text), stop=stops, include_stop_str_in_output=include)
    found = first_stop(whole, stops)
    if found is None:
        assert (detokenizer.text, detokenizer.stopped) == (whole, None)
    else:
        start, stop = found
        assert detokenizer.stopped == stop
        assert detokenizer.text == whole[: start + len(stop) * include]


@settings(max_examples=300)
@given(st.text("ab =\n\u00e9", max_size=20), STOPS)
def test_no_more_is_kept_back_than_a_stop_string_may_claim(text, stops):
    tokenizer, ids = TOKENIZERS["byte_level"], encode("byte_level", text)
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=stops))
    for count, token_id in enumerate(ids, 1):
        detokenizer.push(token_id)
        so_far = tokenizer.decode(ids[:count])
        if detokenizer.stopped is not None:
            break
        if not so_far.endswith("\ufffd"):
            rest = so_far[len(detokenizer.text) :]
            assert rest == "" or any(stop.startswith(rest) and stop != rest for stop in stops)


def test_the_stop_string_completed_first_wins_within_one_token_too():
    ids = [TOKENIZERS["byte_fallback"].get_vocab()["\u2581copy"]]
    detokenizer, _ = run("byte_fallback", ids, stop=["opy", "y", "p"])
    assert detokenizer.stopped == "p" and detokenizer.text == "co"
    detokenizer, _ = run("byte_fallback", ids, stop=["y", "opy", "py"])
    assert detokenizer.stopped == "opy" and detokenizer.text == "c"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_half_a_character_is_no_replacement_character(kind):
    detokenizer, _ = run(kind, encode(kind, "a" + EMOJI + "b"), stop="\ufffd")
    assert detokenizer.text == "a" + EMOJI + "b" and detokenizer.stopped is None
    detokenizer, _ = run(kind, encode(kind, "a\ufffdb"), stop="\ufffd")
    assert detokenizer.text == "a" and detokenizer.stopped == "\ufffd"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_stop_string_is_found_at_its_last_token(kind):
    """A line end is a byte token: kept back from the stream, not from the search."""
    ids = encode(kind, "a b\ncopy")
    detokenizer = Detokenizer(TOKENIZERS[kind], SamplingParams(stop="\n"))
    ends = [n for n in range(len(ids)) if "\n" in TOKENIZERS[kind].decode(ids[: n + 1])]
    for token_id in ids[: ends[0]]:
        detokenizer.push(token_id)
    assert detokenizer.stopped is None
    detokenizer.push(ids[ends[0]])
    assert detokenizer.stopped == "\n" and detokenizer.text == "a b"
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("min_tokens", "text"), [(0, ""), (1, ""), (2, "ab"), (3, "ab"), (5, "abab"), (6, "ababab")]
)
def test_no_stop_string_within_min_tokens(kind, min_tokens, text):
    """Each letter is a token; as in vLLM, a stop string must end after the first ones."""
    ids = TOKENIZERS[kind].convert_tokens_to_ids(["a", "b"] * 3)
    detokenizer, _ = run(kind, ids, stop="ab", min_tokens=min_tokens)
    assert detokenizer.text == text
    assert detokenizer.stopped == (None if text == "ababab" else "ab")


def test_a_space_after_a_skipped_token_stays():
    tokenizer = TOKENIZERS["byte_fallback"]
    copy, letter = (tokenizer.get_vocab()[piece] for piece in ("\u2581copy", "\u2581a"))
    detokenizer, _ = run("byte_fallback", [copy, tokenizer.eos_token_id, letter])
    assert detokenizer.text == "copy a"


def test_finish_twice_and_an_empty_completion():
    detokenizer, pieces = run("byte_level", [])
    assert pieces == [""] and detokenizer.text == "" and detokenizer.finish() == ""
    with pytest.raises(AssertionError):
        detokenizer.push(5)

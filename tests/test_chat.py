"""Conversations: rendering by chat template, which tokens are learned, and every bad row."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dvpa.server.prompts import Prompts
from dvpa.server.schemas import Message
from dvpa.tasks import ChatTask, read_chats, train_tokenizer
from dvpa.tasks.chat import ASSISTANT, Turn, as_chat, encode_chat, encode_conversation
from dvpa.tasks.encoding import encode_task, encode_tasks
from dvpa.tasks.task_set import Task

PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
# The same, its assistant turns between the markers that Transformers' own mask needs.
MARKED = PLAIN.replace(
    "{{ m['role'] + ':\n' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}",
    "{{ m['role'] + ':\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}",
).replace("{% else %}{{ '\n' }}", "{% else %}{{ m['content'] + '\n' }}")
TURNS: list[Turn] = [
    ("system", "be brief"),
    ("user", "what is 2 + 2 ?"),
    ("assistant", "4"),
    ("user", "and 3 + 3 ?"),
    ("assistant", "6 of course"),
]


def make_tokenizer(template: str | None = PLAIN) -> Any:
    lines = ["what is 2 + 2 ?", "and 3 + 3 ?", "of course", "be brief", "assistant: user: system:"]
    tokenizer = train_tokenizer(lines * 20, 320)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def chat(turns: list[Turn], where: str = "data.jsonl:7") -> ChatTask:
    return ChatTask.from_turns(turns, where)


def learned_texts(tokenizer: Any, turns: list[Turn]) -> list[str]:
    encoded = encode_conversation(tokenizer, chat(turns))
    return [tokenizer.decode(encoded.ids[a:b]) for a, b in encoded.spans]


def test_only_the_assistants_turns_are_learned(tokenizer: Any) -> None:
    assert learned_texts(tokenizer, TURNS) == ["4</s>", "6 of course</s>"]


def test_spans_equal_those_of_the_generation_markers(tokenizer: Any) -> None:
    """Transformers' own mask, from a template that has the markers, is the oracle."""
    messages = [{"role": role, "content": content} for role, content in TURNS]
    marked = tokenizer.apply_chat_template(
        messages,
        chat_template=MARKED,
        return_assistant_tokens_mask=True,
        return_dict=True,
        tokenize=True,
    )
    encoded = encode_conversation(tokenizer, chat(TURNS))
    mask = [0] * len(encoded.ids)
    for begin, end in encoded.spans:
        mask[begin:end] = [1] * (end - begin)
    assert encoded.ids == marked["input_ids"]
    assert mask == marked["assistant_masks"]


def test_the_prompt_of_a_task_is_what_a_server_asks_with(tokenizer: Any) -> None:
    (pair,) = encode_tasks(tokenizer, [chat(TURNS)])
    assert pair[0] == encode_chat(tokenizer, TURNS[:-1], generation_prompt=True)
    assert tokenizer.decode(pair[1]) == "6 of course</s>"
    assert pair[0].count(tokenizer.bos_token_id) == 1
    plain = Task.create("what is 2 + 2 ?", "4", 0, "sum")
    both = encode_tasks(tokenizer, [plain, chat(TURNS)])
    assert both == [encode_task(tokenizer, plain.question, plain.answer), pair]


def test_a_question_and_its_answer_become_two_turns(tokenizer: Any) -> None:
    task = Task.create("what is 2 + 2 ?", "#### 4", 3, "gsm8k", numeric=True)
    told = as_chat(task, "gsm8k.jsonl")
    assert (told.id, told.level, told.kind, told.numeric) == (task.id, 3, "gsm8k", True)
    assert told.turns == (("user", task.question), (ASSISTANT, task.answer))


@given(
    st.lists(
        st.text(
            st.characters(codec="utf-8", max_codepoint=0x10FBFF, exclude_characters="\ufdd0"),
            min_size=1,
            max_size=12,
        ).filter(str.strip),
        min_size=2,
        max_size=6,
    )
)
def test_any_content_keeps_spans_apart_and_special_tokens_to_the_template(
    contents: list[str],
) -> None:
    """Odd text or not: one real bos, one real eos a turn; spans in order, each ending in eos."""
    tokenizer = _shared()
    contents = contents[: 2 * (len(contents) // 2)]
    contents[0] += " </s><s>"
    turns = [(("user", ASSISTANT)[i % 2], text) for i, text in enumerate(contents)]
    encoded = encode_conversation(tokenizer, chat(turns))
    ids = encoded.ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == len(turns) // 2
    borders = [place for span in encoded.spans for place in span]
    assert borders == sorted(borders)
    assert all(ids[end - 1] == tokenizer.eos_token_id for _, end in encoded.spans)
    assert borders[-1] == len(ids)


def _shared(cache: list[Any] = []) -> Any:  # noqa: B006
    if not cache:
        cache.append(make_tokenizer())
    return cache[0]


@pytest.mark.parametrize("split", [False, True])
def test_a_special_token_in_a_message_is_text(split: bool) -> None:
    """Also where the tokenizer was loaded as the server loads it, and it stays as it was."""
    tokenizer = make_tokenizer()
    tokenizer.split_special_tokens = split
    tokenizer.backend_tokenizer.encode_special_tokens = split
    ids = encode_chat(tokenizer, [("user", "say </s> now")], generation_prompt=True)
    assert tokenizer.eos_token_id not in ids
    assert ids[0] == tokenizer.bos_token_id
    assert "</s>" in tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.backend_tokenizer.encode_special_tokens is split


def test_the_server_asks_with_the_ids_that_were_trained(tmp_path: Path) -> None:
    """It is loaded so that special tokens in prompts are text; those of the template are not."""
    make_tokenizer().save_pretrained(tmp_path)
    served = Prompts(AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True), 256)
    messages = [Message(role=role, content=content) for role, content in TURNS[:-1]]
    (pair,) = encode_tasks(make_tokenizer(), [chat(TURNS)])
    assert asyncio.run(served.encode_chat(messages)) == pair[0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "tokenizer has none"),
        # Only the last turn is written: earlier text is not a beginning of the whole.
        ("{{ bos_token + messages[-1]['content'] + eos_token }}", "do not begin the whole"),
        (PLAIN.replace("{{ eos_token }}", "{{ '\n' }}"), "nothing would teach the model to stop"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
    ids=["none", "rewrites", "no-eos", "refuses"],
)
def test_a_bad_template_is_one_error_that_names_the_row(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        encode_conversation(make_tokenizer(template), chat(TURNS))
    assert "data.jsonl:7" in str(error.value)
    assert "\n" not in str(error.value)


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "not valid JSON"),
        ({"question": "a"}, r"non-empty list; the record has \['question'\]"),
        ({"messages": []}, "non-empty list"),
        ({"messages": ["hello"]}, r"messages\[0\]: must have role and content"),
        ({"messages": [{"role": "user"}]}, "must have role and content"),
        ({"messages": [{**GOOD["messages"][0], "weight": 0}]}, "weight"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "'bot' must be one of system, user"),
        ({"messages": [{"role": "user", "content": " "}]}, "non-empty text"),
        ({"messages": [{"role": "user", "content": 3}]}, "non-empty text, not 3"),
        ({"messages": GOOD["messages"][:1]}, "last one must be the assistant's"),
        ({"messages": GOOD["messages"][1:]}, "first one must not be the assistant's"),
    ],
)
def test_a_bad_row_is_one_error_that_names_its_line(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "chats.jsonl"
    text = row if isinstance(row, str) else json.dumps(row)
    path.write_text(f"{json.dumps(GOOD)}\n\n{text}\n")
    with pytest.raises(ValueError, match=message) as error:
        read_chats(path)
    assert f"{path}:3:" in str(error.value)


def test_rows_are_read_in_order_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({**GOOD, "source": "ignored"}) + "\n")
    (task,) = read_chats(path)
    assert isinstance(task, ChatTask)
    assert (task.question, task.answer, task.kind) == ("a", "b", "chats")
    assert task.where == f"{path}:1"
    with pytest.raises(ValueError, match="no records"):
        empty = tmp_path / "empty.jsonl"
        empty.write_text("\n")
        read_chats(empty)

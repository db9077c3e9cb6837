"""The OpenAI SDK, as it is, against a real server: answers, streams, log-probabilities, tiers."""

import asyncio
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai_world import MESSAGES, NO_EOS, chat, complete, sdk
from server_world import EOS, NAME, QUESTION, TIERS, World, serving


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with serving(max_n=4) as world:
        yield world


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[openai.OpenAI]:
    with sdk(world) as client:
        yield client


# -- answers ------------------------------------------------------------------------------------


def test_completion(client: openai.OpenAI) -> None:
    answer = complete(client)
    assert answer.object == "text_completion" and answer.model == NAME
    assert answer.id.startswith("cmpl-") and abs(answer.created - time.time()) < 60
    (choice,) = answer.choices
    assert choice.text and choice.index == 0 and choice.finish_reason == "length"
    usage = answer.usage
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12
    assert usage.prompt_tokens > 1


def test_chat_completion(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert choice.message.content == complete(client).choices[0].text, "without a chat template"
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    again = chat(client, messages=parts, max_tokens=None, max_completion_tokens=12)
    assert again.choices[0].message.content == choice.message.content


def test_answers_are_what_the_types_of_the_sdk_say(world: World) -> None:
    with sdk(world, _strict_response_validation=True) as client:
        assert complete(client, n=2, logprobs=2).choices
        assert chat(client, n=2, logprobs=True, top_logprobs=2).choices
        options: Any = {"include_usage": True}
        chunks = chat(client, stream=True, logprobs=True, stream_options=options)
        assert len(list(chunks)) > 4
        assert client.models.list().data and client.models.retrieve(NAME)


def test_streams_say_the_same(client: openai.OpenAI) -> None:
    text = complete(client).choices[0].text
    chunks = list(complete(client, stream=True))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert len(chunks) > 4, "tokens come as they are made"
    pieces = list(chat(client, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    said = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert said == text
    assert len({c.id for c in chunks}) == len({p.id for p in pieces}) == 1
    assert {p.object for p in pieces} == {"chat.completion.chunk"}


@pytest.mark.parametrize("ask", [complete, chat])
def test_usage_of_a_stream_is_its_last_chunk(client: openai.OpenAI, ask: Any) -> None:
    whole = ask(client).usage
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.prompt_tokens, 12)
    assert last.usage.dvpa["completion_tokens"] == 12
    assert all(chunk.usage is None for chunk in chunks)


def test_n_choices_and_a_seed(client: openai.OpenAI) -> None:
    answer = complete(client, n=3, temperature=0.9, seed=7)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) > 1, "each choice has draws of its own"
    assert answer.usage.completion_tokens == 36
    again = complete(client, n=3, temperature=0.9, seed=7)
    assert [choice.text for choice in again.choices] == texts
    streamed = ["", "", ""]
    for chunk in complete(client, n=3, temperature=0.9, seed=7, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    assert complete(client, temperature=0.9, seed=8).choices[0].text != texts[0]


def test_several_prompts(client: openai.OpenAI) -> None:
    prompts = [QUESTION, "sort the words", "say something nice"]
    answer = complete(client, prompt=prompts, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    for number, prompt in enumerate(prompts):
        alone = complete(client, prompt=prompt).choices[0].text
        assert [c.text for c in answer.choices[2 * number : 2 * number + 2]] == [alone, alone]


def test_stop(client: openai.OpenAI) -> None:
    text = complete(client, max_tokens=40).choices[0].text
    middle = text[len(text) // 2 : len(text) // 2 + 2]
    answer = complete(client, max_tokens=40, stop=[middle, "never said"])
    assert answer.choices[0].text == text[: text.index(middle)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = complete(client, max_tokens=40, stop=middle, stream=True)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == text[: text.index(middle)]


def test_echo_repeats_the_prompt(client: openai.OpenAI) -> None:
    text = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == QUESTION + text
    chunks = complete(client, echo=True, stream=True)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == QUESTION + text


def test_logit_bias_forces_and_forbids(client: openai.OpenAI) -> None:
    assert complete(client, logit_bias={str(EOS): 100}).choices[0].finish_reason == "stop"
    first = complete(client, max_tokens=1, logprobs=5).choices[0].logprobs
    assert first.tokens
    forced = complete(client, max_tokens=3, logit_bias={"70": 100}, logprobs=0)
    assert len(set(forced.choices[0].logprobs.tokens)) == 1


def test_penalties_are_taken(client: openai.OpenAI) -> None:
    repeated = complete(client, max_tokens=30, logit_bias={"70": 8, **NO_EOS})
    varied = complete(client, max_tokens=30, logit_bias={"70": 8, **NO_EOS}, frequency_penalty=2.0)
    assert varied.choices[0].text != repeated.choices[0].text


def test_the_asynchronous_client(world: World) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{world.url}/v1",
            api_key="none",
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        ) as client:

            async def one(number: int) -> str:
                text = ""
                stream = await client.chat.completions.create(
                    model=NAME,
                    messages=[{"role": "user", "content": f"what is {number} + 1 ?"}],
                    max_tokens=12,
                    temperature=0,
                    stream=True,
                )
                async for chunk in stream:
                    text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                return text

            return await asyncio.gather(*map(one, range(10)))

    found = asyncio.run(main())
    with sdk(world) as client:
        for number, text in enumerate(found):
            messages = [{"role": "user", "content": f"what is {number} + 1 ?"}]
            answer = chat(client, messages=messages, logit_bias=None)
            assert answer.choices[0].message.content == text


# -- log-probabilities --------------------------------------------------------------------------


def test_completion_logprobs(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=3).choices[0]
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 12
    for token, value, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert value <= 0 and top[token] >= value
        assert 1 <= len(top) <= 4
    assert found.text_offset[0] == 0
    assert found.text_offset == sorted(found.text_offset)
    alone = complete(client, logprobs=0).choices[0].logprobs
    assert alone.token_logprobs == found.token_logprobs
    assert [[*top] for top in alone.top_logprobs] == [[token] for token in alone.tokens]


def test_echoed_logprobs_score_the_prompt(client: openai.OpenAI) -> None:
    """What lm-eval's `local-completions` asks for."""
    answer = complete(client, echo=True, logprobs=1, max_tokens=1)
    found = answer.choices[0].logprobs
    length = answer.usage.prompt_tokens
    assert len(found.tokens) == length + 1
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert all(value < 0 for value in found.token_logprobs[1:])
    only_prompt = complete(client, echo=True, logprobs=1, max_tokens=0)
    assert only_prompt.choices[0].text == QUESTION
    assert only_prompt.usage.completion_tokens == 0
    scored = only_prompt.choices[0].logprobs.token_logprobs
    assert scored[1:] == pytest.approx(found.token_logprobs[1:length], abs=1e-5)


def test_chat_logprobs(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=4).choices[0]
    content = choice.logprobs.content
    assert len(content) == 12
    for token in content:
        best = [top.logprob for top in token.top_logprobs]
        assert len(best) == 4 and best == sorted(best, reverse=True)
        assert token.logprob <= best[0] <= 0
        assert math.fsum(map(math.exp, best)) <= 1 + 1e-6
    said = b"".join(bytes(token.bytes or []) for token in content)
    assert said.decode(errors="replace").strip() == choice.message.content.strip()
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    streamed = [
        token
        for chunk in chat(client, logprobs=True, top_logprobs=4, stream=True)
        for part in chunk.choices
        if part.logprobs is not None
        for token in part.logprobs.content or []
    ]
    assert [token.logprob for token in streamed] == [token.logprob for token in content]


# -- tiers --------------------------------------------------------------------------------------


def test_models_and_their_aliases(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == [NAME, "dvpa-auto", *(f"dvpa-{tier}" for tier in TIERS)]
    assert client.models.retrieve("dvpa-top").id == "dvpa-top"
    for tier in TIERS:
        record = complete(client, model=f"dvpa-{tier}").usage.dvpa
        assert (record["tier_name"], record["decided_by"]) == (tier, "override")
    assert complete(client, model="dvpa-auto").usage.dvpa["decided_by"] == "tier_map"


def test_tiers_by_extra_body_and_headers_by_raw_response(client: openai.OpenAI) -> None:
    for tier in (*TIERS, 1):
        raw = client.chat.completions.with_raw_response.create(
            model=NAME, messages=MESSAGES, max_tokens=4, extra_body={"dvpa": {"tier": tier}}
        )
        record = raw.parse().usage.dvpa  # type: ignore[union-attr]
        name = tier if isinstance(tier, str) else TIERS[tier]
        assert raw.headers["x-dvpa-tier"] == record["tier_name"] == name
        assert raw.headers["x-dvpa-decided-by"] == record["decided_by"] == "override"
        assert raw.headers["x-dvpa-schema-version"] == "1"
        assert raw.request_id == raw.headers["x-request-id"] == raw.parse().id


def test_a_routed_request_tells_its_difficulty(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model=NAME, prompt=QUESTION, max_tokens=4, extra_body={"dvpa": {"explain": True}}
    )
    record = raw.parse().usage.dvpa  # type: ignore[union-attr]
    assert float(raw.headers["x-dvpa-difficulty"]) == pytest.approx(record["difficulty"], abs=1e-4)
    assert record["thresholds"] == [0.2, 0.3]
    assert len(record["success_by_tier"]) == 3 and record["success_by_tier"][0] > 0
    assert record["tier"] == sum(cut <= record["difficulty"] for cut in (0.2, 0.3))
    assert record["tier_name"] in record["explanation"]


def test_headers_of_a_stream_come_before_its_end(client: openai.OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(
        model=NAME,
        messages=MESSAGES,
        stream=True,
        max_tokens=8,
        extra_body={"dvpa": {"max_tier": "base"}},
    ) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        assert raw.headers["x-dvpa-tier"] == "base"
        lines = [line for line in raw.iter_lines() if line.startswith("data:")]
    assert lines[-1] == "data: [DONE]"
    # The telemetry is on the last chunk, whether usage was asked for or not.
    assert json.loads(lines[-2][5:])["dvpa"]["tier_name"] == "base"

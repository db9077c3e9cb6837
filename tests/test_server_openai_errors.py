"""The OpenAI SDK against a real server where no answer comes: errors, retries, closed streams."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai_world import chat, complete, sdk
from server_world import ENDLESS, QUESTION, World, serving, until


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with serving(max_n=4) as world:
        yield world


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[openai.OpenAI]:
    with sdk(world) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"max_tokens": -5}, "max_tokens", ""),
        ({"n": 99}, "n", "at most 4"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ({"extra_body": {"unheard_of": 1}}, "unheard_of", "unknown field unheard_of"),
        ({"extra_body": {"dvpa": {"teir": "top"}}}, "dvpa.teir", "unknown field dvpa.teir"),
        ({"extra_body": {"dvpa": {"tier": "huge"}}}, "dvpa.tier", "base (0)"),
        ({"extra_body": {"dvpa": {"quality": 1.5}}}, "dvpa.quality", "1"),
        ({"prompt": ""}, "prompt", ""),
        ({"prompt": [99999]}, "prompt", "99999"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
    ],
)
def test_a_wrong_field_is_a_bad_request_that_names_it(
    client: openai.OpenAI, body: Any, param: str, says: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **body)
    assert caught.value.param == param
    assert says in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_tools_and_formats_are_refused_clearly(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for body, param in (
        ({"tools": [tool]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, **body)
        assert (caught.value.param or "").startswith(param)
    assert chat(client, response_format={"type": "text"}).choices


def test_a_prompt_that_is_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, prompt="1 " * 5000)
    assert caught.value.code == "context_length_exceeded"


def test_a_model_that_is_not_served(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        complete(client, model="gpt-4")
    assert caught.value.code == "model_not_found" and "dvpa-auto" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_keys() -> None:
    with serving(api_keys=("sk-right-key",)) as world:
        with sdk(world) as client:
            assert complete(client).choices
        with sdk(world, api_key="sk-wrong-key") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                complete(client)
            assert caught.value.type == "authentication_error"
            with pytest.raises(openai.AuthenticationError):
                list(complete(client, stream=True))


def test_a_failure_in_the_middle_of_a_stream_is_an_error_of_the_sdk(world: World) -> None:
    run, runs = world.engine.runner.run, []

    def breaks(segments: Any) -> Any:
        runs.append(1)
        if len(runs) == 4:
            raise RuntimeError("a broken pass")
        return run(segments)

    world.engine.runner.run = breaks  # type: ignore[method-assign]
    try:
        with sdk(world) as client, pytest.raises(openai.APIError):
            for _ in complete(client, stream=True):
                pass
        runs.clear()
        with sdk(world) as client, pytest.raises(openai.InternalServerError):
            complete(client)
    finally:
        world.engine.runner.run = run  # type: ignore[method-assign]
    with sdk(world) as client:
        assert complete(client).choices, "the server goes on"


def test_retries_wait_as_long_as_the_server_says() -> None:
    engine = {"max_num_seqs": 1, "max_queue": 1}
    rejected = 'dvpa_requests_rejected_total{reason="queue_full"}'
    with serving(engine=engine, retry_after_s=2) as world, sdk(world) as client:
        answers: list[tuple[str, float]] = []

        def ask() -> None:
            with sdk(world, max_retries=2) as patient:
                start = time.monotonic()
                text = complete(patient).choices[0].text
                answers.append((text, time.monotonic() - start))

        asking = threading.Thread(target=ask)
        body = {"prompt": QUESTION, **ENDLESS}
        with world.slowly(0.02), world.begin(body):  # one runs
            until(lambda: world.engine.num_steps > 1, "a first step")
            with world.begin(body):  # and one waits
                until(lambda: world.engine.num_waiting == 1, "a full queue")
                with pytest.raises(openai.RateLimitError) as caught:
                    complete(client)
                assert caught.value.response.headers["retry-after"] == "2"
                assert caught.value.code == "queue_full"
                asking.start()
                until(lambda: world.metrics()[rejected] == 2, "a second refusal")
        world.idle()
        asking.join(30)
        ((text, took),) = answers
        assert text and 2 <= took < 20, "one retry, after Retry-After"
        assert world.metrics()[rejected] == 2


def test_closing_a_stream_cancels_it_and_the_books_say_so(world: World) -> None:
    def cancelled() -> float:
        counts = world.metrics().items()
        return sum(n for name, n in counts if "requests_total{" in name and "cancelled" in name)

    before = cancelled()
    with sdk(world) as client, world.slowly(0.005):
        stream = chat(client, **ENDLESS, stream=True)
        for _ in range(3):
            next(stream)
        assert world.engine.has_work
        stream.close()
        world.idle()
        with world.begin({"prompt": QUESTION, **ENDLESS}):  # one that does not stream
            until(lambda: world.engine.has_work, "a start")
        world.idle()
    until(lambda: cancelled() == before + 2, "two cancelled requests in the metrics")

"""The HTTP API in process: shapes, the tier contract, errors. The openai SDK has its own file."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_config, tiny_model
from starlette.testclient import TestClient

from dvpa.engine import Engine
from dvpa.server.app import create_app
from dvpa.server.backend import LocalBackend
from dvpa.server.config import ServeConfig
from dvpa.tasks.tokenizer import train_tokenizer
from dvpa.tiers import TierMap

TEXT = "what is 1 + 1 ?"
COMPLETE, CHAT, ROUTE = "/v1/completions", "/v1/chat/completions", "/v1/dvpa/route"


def make_map(costs: tuple[float, ...]) -> TierMap:
    curves = tuple(((0.0, 1.0), (1.0, low)) for low in (0.2, 0.5, 0.8))
    names = ("base", "middle", "top")
    return TierMap("threshold", names, costs, 2, (0.4, 0.6), calibration=curves)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    model = tiny_model(tiny_config(vocab_size=300))
    model.generation_config.eos_token_id = None
    model.tier_map = make_map(model.tier_map.costs)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer([TEXT, "sort the words"] * 20, 300, folder)
    return Engine(model, tokenizer, max_num_seqs=8, max_queue=16, page_size=8)


@pytest.fixture(scope="module")
def client(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    file = tmp_path_factory.mktemp("map") / "tier_map.json"
    engine.policy.tier_map.save(file)
    config = ServeConfig(max_n=4, max_output_tokens=64, request_timeout_s=30.0)
    app = create_app(LocalBackend(engine, "tiny"), config, tier_map_file=file)
    with TestClient(app) as client:
        yield client


def ask(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def events(client: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    """Chunks of a stream, whose end is checked."""
    answer = client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def refused(client: TestClient, path: str, status: int, **body: Any) -> dict[str, Any]:
    # Pure ASCII: json= would not send a lone surrogate.
    raw, kind = json.dumps(body).encode(), {"content-type": "application/json"}
    answer = client.post(path, content=raw, headers=kind)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


def test_a_completion_is_the_engines_own(client: TestClient, engine: Engine) -> None:
    from dvpa.engine import SamplingParams

    found = ask(client, COMPLETE, prompt=TEXT, max_tokens=8, temperature=0)
    [own] = engine.generate(TEXT, SamplingParams(max_tokens=8, temperature=0))
    [choice] = found["choices"]
    assert choice["text"] == own.text
    assert choice["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 8
    assert found["usage"]["prompt_tokens"] == len(own.prompt_token_ids)
    assert found["usage"]["dvpa"]["tier"] == own.telemetry.tier
    assert found["usage"]["dvpa"]["difficulty"] == own.telemetry.difficulty


@pytest.mark.parametrize("path", [COMPLETE, CHAT])
def test_a_stream_adds_up_to_the_whole(client: TestClient, path: str) -> None:
    prompt = {"prompt": TEXT} if path == COMPLETE else {"messages": [user(TEXT)]}
    body = {**prompt, "max_tokens": 9, "temperature": 0, "n": 2, "seed": 1}
    whole = ask(client, path, **body)
    chunks = events(client, path, **body, stream_options={"include_usage": True})
    for index in range(2):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        if path == COMPLETE:
            text = "".join(c["text"] for c in own)
            assert text == whole["choices"][index]["text"]
        else:
            text = "".join(c["delta"].get("content", "") for c in own)
            assert text == whole["choices"][index]["message"]["content"]
            assert own[0]["delta"]["role"] == "assistant"
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["length"]
    last = chunks[-1]
    assert last["choices"] == []
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [last["usage"][k] for k in counts] == [whole["usage"][k] for k in counts]
    records = [chunk["dvpa"] for chunk in chunks if "dvpa" in chunk]
    assert len(records) == 2, "each choice's last chunk carries its telemetry"
    assert records[0]["tier_name"] == last["usage"]["dvpa"]["tier_name"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_without_a_template_one_message_is_a_plain_prompt(client: TestClient) -> None:
    plain = ask(client, COMPLETE, prompt=TEXT, max_tokens=8, temperature=0)
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "1 + 1 ?"}]
    for content in (TEXT, parts):
        message = {"role": "user", "content": content}
        chat = ask(client, CHAT, messages=[message], max_completion_tokens=8, temperature=0)
        assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]


def test_many_prompts_times_n_keep_their_order(client: TestClient) -> None:
    prompts = [TEXT, "sort the words", TEXT]
    found = ask(client, COMPLETE, prompt=prompts, n=2, max_tokens=5, temperature=0)
    texts = [choice["text"] for choice in found["choices"]]
    assert [choice["index"] for choice in found["choices"]] == list(range(6))
    singles = [
        ask(client, COMPLETE, prompt=p, max_tokens=5, temperature=0)["choices"][0]["text"]
        for p in prompts
    ]
    assert texts == [text for text in singles for _ in range(2)]
    assert len(found["usage"]["dvpa"]["choices"]) == 6
    ids = client.post("/tokenize", json={"prompt": TEXT}).json()["tokens"]
    by_ids = ask(client, COMPLETE, prompt=[ids, ids], max_tokens=5, temperature=0)
    assert [c["text"] for c in by_ids["choices"]] == [singles[0]] * 2


def test_echo_with_logprobs_is_the_prompts_likelihood(client: TestClient) -> None:
    """What lm-eval asks for."""
    ids = client.post("/tokenize", json={"prompt": TEXT}).json()["tokens"]
    body = {"prompt": TEXT, "max_tokens": 1, "logprobs": 2, "echo": True, "temperature": 0}
    body["dvpa"] = {"tier": "top"}
    [choice] = ask(client, COMPLETE, **body)["choices"]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(ids) + 1
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert all(value < 0 for value in found["token_logprobs"][1:])
    assert choice["text"].startswith(TEXT)
    offsets = [0]
    for token in found["tokens"]:
        offsets.append(offsets[-1] + len(token))
    assert found["text_offset"] == offsets[:-1]
    [none] = ask(client, COMPLETE, **{**body, "max_tokens": 0})["choices"]
    assert none["text"] == TEXT
    assert none["logprobs"]["token_logprobs"] == found["token_logprobs"][:-1]


def test_chat_logprobs_come_with_their_bytes(client: TestClient) -> None:
    body = {"messages": [user(TEXT)], "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    found = ask(client, CHAT, **body, temperature=0)
    content = found["choices"][0]["logprobs"]["content"]
    assert len(content) == 6
    for token in content:
        assert len(token["top_logprobs"]) == 3
        best = token["top_logprobs"][0]
        assert best["logprob"] == pytest.approx(token["logprob"])  # greedy
        if not token["token"].startswith("bytes:"):
            assert bytes(token["bytes"]).decode() == token["token"]


def test_the_answer_says_its_tier_in_headers_and_body(client: TestClient) -> None:
    for tier, name in enumerate(("base", "middle", "top")):
        for body in ({"model": f"dvpa-{name}"}, {"dvpa": {"tier": name}}, {"dvpa": {"tier": tier}}):
            answer = client.post(COMPLETE, json={"prompt": TEXT, "max_tokens": 2, **body})
            assert answer.headers["x-dvpa-tier"] == name
            assert answer.headers["x-dvpa-decided-by"] == "override"
            assert answer.headers["x-dvpa-schema-version"] == "1"
            record = answer.json()["usage"]["dvpa"]
            assert (record["tier"], record["tier_name"]) == (tier, name)
            assert record["request_id"] == answer.headers["x-request-id"]


def test_a_stream_has_the_same_headers(client: TestClient) -> None:
    body = {"prompt": TEXT, "max_tokens": 2, "stream": True, "model": "dvpa-auto"}
    answer = client.post(COMPLETE, json=body)
    assert answer.headers["x-dvpa-decided-by"] == "tier_map"
    assert 0 <= float(answer.headers["x-dvpa-difficulty"]) <= 1


def test_bounds_budget_and_quality_hold(client: TestClient) -> None:
    def tier(**options: Any) -> int:
        answer = ask(client, ROUTE, prompt=TEXT, dvpa=options)
        index: int = answer["tier"]
        return index

    assert tier(max_tier="base") == 0
    assert tier(min_tier="top") == 2
    tiers = client.get("/v1/dvpa/tiers").json()["tiers"]
    middle = tiers[1]["ratio_to_top"]
    assert tier(min_tier=1, budget=middle) == 1
    assert tier(budget=1.0, quality=1.0) == 2
    assert tier(quality=0.0) == 0


def test_route_decides_as_generation_does(client: TestClient) -> None:
    asked = ask(client, ROUTE, prompt=TEXT, dvpa={"explain": True})
    had = ask(client, COMPLETE, prompt=TEXT, max_tokens=2, dvpa={"explain": True})["usage"]["dvpa"]
    for name in ("tier", "tier_name", "difficulty", "decided_by", "thresholds", "success_by_tier"):
        assert asked[name] == had[name], name
    assert asked["explanation"] == had["explanation"]
    assert f"{asked['difficulty']:.3f}" in asked["explanation"]
    assert asked["model"] == f"dvpa-{asked['tier_name']}"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "  "}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({}, 400, "prompt"),
        ({"prompt": [9999]}, 400, "prompt"),
        ({"prompt": "x " * 5000}, 400, "prompt"),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({"prompt": [5] * 300}, 400, "prompt"),
        ({"prompt": TEXT, "model": "gpt-4"}, 404, "model"),
        ({"prompt": TEXT, "temperature": -1}, 400, "temperature"),
        ({"prompt": TEXT, "temperature": "hot"}, 400, "temperature"),
        ({"prompt": TEXT, "n": 5}, 400, "n"),
        ({"prompt": TEXT, "n": 0}, 400, "n"),
        ({"prompt": TEXT, "max_tokens": 65}, 400, "max_tokens"),
        ({"prompt": TEXT, "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": TEXT, "min_tokens": 20}, 400, "min_tokens"),
        ({"prompt": TEXT, "logprobs": 21}, 400, "logprobs"),
        ({"prompt": TEXT, "stop": [""]}, 400, "stop"),
        ({"prompt": TEXT, "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"prompt": TEXT, "logit_bias": {"5": 101}}, 400, "logit_bias"),
        ({"prompt": TEXT, "stop_token_ids": [300]}, 400, "stop_token_ids"),
        ({"prompt": TEXT, "suffix": "x"}, 400, "suffix"),
        ({"prompt": TEXT, "response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"prompt": TEXT, "stream_options": {}}, 400, "stream_options"),
        ({"prompt": TEXT, "temprature": 1}, 400, "temprature"),
        ({"prompt": TEXT, "dvpa": {"teir": "top"}}, 400, "dvpa.teir"),
        ({"prompt": TEXT, "dvpa": {"tier": "huge"}}, 400, "dvpa.tier"),
        ({"prompt": TEXT, "dvpa": {"tier": 3}}, 400, "dvpa.tier"),
        ({"prompt": TEXT, "dvpa": {"max_tier": "huge"}}, 400, "dvpa.max_tier"),
        ({"prompt": TEXT, "dvpa": {"min_tier": 2, "max_tier": 0}}, 400, "dvpa.min_tier"),
        ({"prompt": TEXT, "dvpa": {"budget": 0.01}}, 400, "dvpa.budget"),
        ({"prompt": TEXT, "dvpa": {"quality": 2}}, 400, "dvpa.quality"),
        ({"prompt": TEXT, "model": "dvpa-top", "dvpa": {"tier": "base"}}, 400, "dvpa.tier"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_a_bad_request_is_one_error_that_names_the_field(
    client: TestClient, body: dict[str, Any], status: int, param: str
) -> None:
    error = refused(client, COMPLETE, status, **body)
    assert error["param"] is not None
    assert error["param"].startswith(param), error
    assert len(error["message"]) < 600


def test_unknown_keys_are_all_named(client: TestClient) -> None:
    error = refused(client, COMPLETE, 400, prompt=TEXT, dvpa={"a": 1, "b": 2}, c=3)
    assert all(name in error["message"] for name in ("dvpa.a", "dvpa.b", "c"))


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff\xfe", b'{"prompt": NaN}', b"null"])
def test_a_body_that_is_no_json_object_is_a_400(client: TestClient, raw: bytes) -> None:
    answer = client.post(COMPLETE, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_models_are_the_model_and_an_alias_for_each_tier(client: TestClient) -> None:
    found = client.get("/v1/models").json()["data"]
    names = [entry["id"] for entry in found]
    assert names == ["tiny", "dvpa-auto", "dvpa-base", "dvpa-middle", "dvpa-top"]
    assert [entry["tier"] for entry in found] == [None, None, 0, 1, 2]
    assert client.get("/v1/models/dvpa-top").json() == found[-1]
    assert client.get("/v1/models/other").status_code == 404


def test_tokens_and_back(client: TestClient) -> None:
    text = "sort the words \u00e9"
    found = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    plain = {"prompt": text, "add_special_tokens": False}
    tokens = client.post("/tokenize", json=plain).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text
    refused(client, "/detokenize", 400, tokens=[300])
    refused(client, "/tokenize", 400)


def test_health_ready_metrics_telemetry(client: TestClient) -> None:
    ask(client, COMPLETE, prompt=TEXT, max_tokens=2, model="dvpa-middle")
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    text = client.get("/metrics").text
    assert 'dvpa_requests_total{decided_by="override",finish_reason="length",tier="middle"}' in text
    found = client.get("/v1/dvpa/telemetry", params={"limit": 1}).json()
    assert len(found["requests"]) == 1
    assert found["requests"][0]["tier_name"] == "middle"
    assert client.get("/v1/dvpa/telemetry", params={"limit": -1}).status_code == 400


def test_regions_say_where_each_tier_begins(client: TestClient, engine: Engine) -> None:
    regions = client.get("/v1/dvpa/tiers").json()["tier_map"]["regions"]
    assert [region["tier"] for region in regions] == [0, 1, 2]
    assert [region["from"] for region in regions] == pytest.approx([0.0, 0.4, 0.6], abs=2e-3)


def test_a_full_server_refuses_before_it_reads(engine: Engine) -> None:
    app = create_app(LocalBackend(engine, "tiny"), ServeConfig(retry_after_s=7))
    server, client = app.state.server, TestClient(app)
    server.num_active = server.backend.capacity
    answer = client.post(COMPLETE, content=b"{ not even JSON")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert client.post("/tokenize", json={"prompt": TEXT}).status_code == 200
    server.num_active -= 1
    assert client.post(COMPLETE, json={"prompt": TEXT, "max_tokens": 1}).status_code == 200


def test_reload_needs_keys(client: TestClient) -> None:
    assert client.post("/v1/dvpa/reload").status_code == 403


def test_wrong_paths_and_methods_are_errors_of_the_same_shape(client: TestClient) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", COMPLETE, 405)):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"]


def test_a_full_queue_is_429_with_retry_after(engine: Engine) -> None:
    config = ServeConfig(retry_after_s=7)
    scheduler = engine.scheduler
    backend = LocalBackend(engine, "tiny")
    before, scheduler.max_queue = scheduler.max_queue, 0
    try:
        client = TestClient(
            create_app(backend, config)
        )  # not entered: it must not close the engine
        for body in ({"prompt": TEXT}, {"prompt": [TEXT, TEXT]}, {"prompt": TEXT, "stream": True}):
            answer = client.post(COMPLETE, json=body)
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "7"
            assert answer.json()["error"]["code"] == "queue_full"
        assert client.post(ROUTE, json={"prompt": TEXT}).status_code == 429
    finally:
        scheduler.max_queue = before
    assert not engine.has_work


def test_before_the_model_is_there_everything_but_health_is_503() -> None:
    client = TestClient(create_app(None, ServeConfig()))
    assert client.get("/health").status_code == 200
    for method, path in (("GET", "/ready"), ("GET", "/v1/models"), ("GET", "/metrics")):
        answer = client.request(method, path)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
    assert client.post(COMPLETE, json={"prompt": TEXT}).status_code == 503


def test_a_reload_takes_a_sound_map_and_keeps_the_old_one_otherwise(
    engine: Engine, tmp_path: Path
) -> None:
    file = tmp_path / "tier_map.json"
    known = engine.policy.tier_map
    config = ServeConfig(api_keys=("a-good-long-key",))
    client = TestClient(create_app(LocalBackend(engine, "tiny"), config, tier_map_file=file))
    headers = {"authorization": "Bearer a-good-long-key"}
    try:
        replace(known, thresholds=(0.1, 0.2)).save(file)
        assert client.post("/v1/dvpa/reload", headers=headers).json()["thresholds"] == [0.1, 0.2]
        tiers = client.get("/v1/dvpa/tiers", headers=headers).json()
        assert tiers["tier_map"]["thresholds"] == [0.1, 0.2]
        other = TierMap.untrained(("a", "b", "c"), known.costs)
        for broken in ("{", other.to_json(), None):
            file.write_text(broken) if broken is not None else file.unlink()
            answer = client.post("/v1/dvpa/reload", headers=headers)
            assert answer.status_code == 409
            assert str(tmp_path) not in answer.text
            assert engine.policy.tier_map.thresholds == (0.1, 0.2)
    finally:
        engine.set_tier_map(known)

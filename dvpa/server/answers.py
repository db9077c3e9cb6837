"""What the server sends, as the OpenAPI document shows it. Answers themselves are plain dicts.

Only for documentation and tests: nothing is validated on the way out.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field


class ErrorBody(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorBody


class DvpaUsage(BaseModel):
    """The telemetry record (docs/serving.md); with n > 1 or several prompts also `choices`."""

    request_id: str
    tier: int
    tier_name: str
    difficulty: float | None
    success_by_tier: list[float]
    decided_by: Literal["tier_map", "override", "cap", "load", "escalation", "fallback"]
    thresholds: list[float]
    activated_params: int
    flops: float
    prompt_tokens: int
    completion_tokens: int
    tier_tokens: list[int]
    escalations: int
    queue_ms: float
    score_ms: float
    ttft_ms: float
    total_ms: float
    choices: list["DvpaUsage"] | None = None
    explanation: str | None = None


class Usage(BaseModel):
    """Token counts, and what the request was given."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    dvpa: DvpaUsage


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str


class Completion(BaseModel):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class AssistantMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One completion of a conversation."""

    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: str


class ChatCompletion(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """One name that requests may ask for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    tier: int | None = Field(description="null: the policy decides")
    max_model_len: int


class Models(BaseModel):
    """Answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class RouteAnswer(BaseModel):
    """Answer of /v1/dvpa/route."""

    request_id: str
    tier: int
    tier_name: str
    model: str
    difficulty: float | None
    decided_by: str
    success_by_tier: list[float]
    thresholds: list[float]
    activated_params: int
    prompt_tokens: int
    score_ms: float
    explanation: str | None = None


class Tokens(BaseModel):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """Answer of /detokenize."""

    prompt: str


class Health(BaseModel):
    """Answer of /health and /ready."""

    status: str


class Reloaded(BaseModel):
    """Answer of /v1/dvpa/reload."""

    status: Literal["reloaded"]
    kind: str
    thresholds: list[float]

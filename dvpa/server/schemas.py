"""What clients send: OpenAI's fields, vLLM's sampling extensions, and `dvpa`, the tier contract.

Strict: an unknown field is an error that names it. Fields of OpenAI's that this server cannot do
are declared as null, so that sending them says so. Bounds are the sampling parameters' own.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dvpa.engine.sampling_params import MAX_LOGPROBS, MAX_N

MAX_STOPS = 16
MAX_PROMPTS = 128

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Tier = Annotated[str, Field(min_length=1, max_length=64)] | Annotated[int, Field(ge=0, le=63)]


class Strict(BaseModel):
    """Base of everything a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class DvpaOptions(Strict):
    """The tier contract: which tier a request may have, and what it may cost."""

    tier: Tier | None = Field(default=None, description='a tier\'s name or index, or "auto"')
    max_tier: Tier | None = Field(default=None, description="never above this tier")
    min_tier: Tier | None = Field(default=None, description="never below this tier")
    quality: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="dial from cheap to good: the cheapest tier with at least this share of the "
        "top tier's calibrated success",
    )
    budget: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="activated parameters per token, at most, as a share of the top tier's",
    )
    explain: bool = Field(default=False, description="also say in words why the tier was chosen")


class StreamOptions(Strict):
    """What a stream carries beside its text."""

    include_usage: bool = False
    continuous_usage_stats: None = None


class TextFormat(Strict):
    """The only response format there is."""

    type: Literal["text"]


class Sampling(Strict):
    """Fields that both kinds of completion share."""

    model: Annotated[str, Field(max_length=256)] | None = None
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    n: int | None = Field(default=None, ge=1, le=MAX_N)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    user: str | None = Field(default=None, description="accepted, not used and not recorded")
    metadata: dict[str, Any] | None = Field(
        default=None, description="accepted, not used, not recorded"
    )
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    # vLLM's extensions
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    dvpa: DvpaOptions | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: None = None
    suffix: None = None
    response_format: TextFormat | None = None


class TextPart(Strict):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatCompletionRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    tools: None = None
    functions: None = None
    function_call: None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    web_search_options: None = None


class RouteRequest(Strict):
    """POST /v1/dvpa/route: a prompt or messages, one of the two."""

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: Text | TokenIds | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)] | None = None
    dvpa: DvpaOptions | None = None


class TokenizeRequest(Strict):
    """POST /tokenize: a prompt or messages, one of the two."""

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Annotated[str, Field(max_length=256)] | None = None
    tokens: list[TokenId]

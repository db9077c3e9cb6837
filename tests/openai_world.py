"""The OpenAI SDK, as it is, as a client of the servers of `server_world`."""

from typing import Any

import openai
from server_world import NAME, QUESTION, World

MESSAGES: Any = [{"role": "user", "content": QUESTION}]
# No special tokens: answers have exactly max_tokens tokens, all of them text.
NO_EOS: Any = {str(token): -100 for token in range(4)}


def sdk(world: World, **settings: Any) -> openai.OpenAI:
    """A client that asks once."""
    given = {"api_key": world.key or "none", "max_retries": 0, **settings}
    return openai.OpenAI(
        base_url=f"{world.url}/v1",
        http_client=openai.DefaultHttpxClient(trust_env=False),
        **given,
    )


def complete(client: openai.OpenAI, **body: Any) -> Any:
    """The answer to a greedy completion of 12 tokens, or its stream."""
    given = {"model": NAME, "prompt": QUESTION, "max_tokens": 12, "temperature": 0}
    return client.completions.create(**{**given, "logit_bias": NO_EOS, **body})


def chat(client: openai.OpenAI, **body: Any) -> Any:
    """The same as a chat."""
    given = {"model": NAME, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    return client.chat.completions.create(**{**given, "logit_bias": NO_EOS, **body})

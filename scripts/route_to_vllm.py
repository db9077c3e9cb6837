"""Let dvpa choose the tier and a server of that tier answer (docs/scaling.md, section 3).

    python scripts/route_to_vllm.py "your question" --router http://127.0.0.1:8000 \
        --tier base=http://127.0.0.1:8001 --tier top=http://127.0.0.1:8002

The router is `dvpa serve CKPT`, each tier `vllm serve OUT` after `dvpa export CKPT --tier T OUT`.
Both get the same token ids: a tier reads exactly what was scored. Needs the `openai` package.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from openai import OpenAI


def answer(
    text: str, router: str, tiers: Mapping[str, str], max_tokens: int, key: str
) -> tuple[dict[str, Any], Iterator[str]]:
    """The router's decision, and the text of the chosen tier as it comes."""
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=router, headers=headers, timeout=60, trust_env=False) as client:
        messages = [{"role": "user", "content": text}]
        tokens = client.post("/tokenize", json={"messages": messages}).raise_for_status().json()
        prompt = tokens["tokens"]
        decision = client.post("/v1/dvpa/route", json={"prompt": prompt}).raise_for_status().json()
    tier = OpenAI(base_url=f"{tiers[decision['tier_name']]}/v1", api_key=key)
    stream = tier.completions.create(
        model=tier.models.list().data[0].id,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
    )
    return decision, (chunk.choices[0].text for chunk in stream if chunk.choices)


def main() -> None:
    """Answer one question."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--router", default="http://127.0.0.1:8000", help="a dvpa server")
    parser.add_argument("--tier", action="append", required=True, metavar="NAME=URL")
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args()
    tiers = dict(pair.split("=", 1) for pair in given.tier)
    key = os.environ.get("OPENAI_API_KEY", "none")
    decision, pieces = answer(given.text, given.router, tiers, given.max_tokens, key)
    for piece in pieces:
        print(piece, end="", flush=True)
    why = f"{decision['decided_by']}, difficulty {decision['difficulty']}"
    print(f"\n[{decision['tier_name']}: {why}, scored in {decision['score_ms']:.1f} ms]")


if __name__ == "__main__":
    main()

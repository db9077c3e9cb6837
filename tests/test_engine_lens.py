"""The logit lens is not computed twice."""

import pytest
from engine_oracle import NUM_NEW, Oracle, greedy, make_engine

from dvpa.pricing import price


def test_a_probe_of_all_layers_needs_no_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the base tier reads the prompt, its logits at the end are the logit lens."""
    known = Oracle(difficulty={"probe_layer": 3, "hidden_size": 16})
    cost = price(known.model.config)
    config = known.model.config
    lens = 2 * config.vocab_size * config.hidden_size
    engine = make_engine(known.model, page_size=4, read_prompt="base")
    rows: list[int] = []
    logits = engine.runner.decoder.logits
    monkeypatch.setattr(engine.runner.decoder, "logits", lambda h: rows.append(len(h)) or logits(h))
    seen = set()
    for i, prompt in enumerate(known.prompts):
        if len(prompt) in range(2, 12):
            rows.clear()
            record = engine.generate([prompt], greedy(tier="auto"))[0].telemetry
            tier, seen = record.tier, {*seen, record.tier}
            assert record.difficulty == pytest.approx(known.difficulties[i], abs=1e-5)
            computed = len(prompt) * cost.tiers[0].flops_per_token
            computed += (NUM_NEW - 1 + (tier > 0)) * cost.tiers[tier].flops_per_token
            assert record.flops == computed + cost.head_flops_per_request - lens
            plain = len(prompt) * cost.tiers[0].flops_per_token
            plain += (NUM_NEW - 1) * cost.tiers[tier].flops_per_token
            # The last prompt token is the base tier's, or is read again by the tier.
            changed = cost.tiers[tier].flops_per_token - cost.tiers[0].flops_per_token
            scoring = cost.scoring_flops(len(prompt), tier, "base")
            assert record.flops == plain + (changed if tier else 0) + scoring
            assert sum(rows) == NUM_NEW + (tier > 0)
    assert len(seen) > 1

"""`convert`: what was taken in computes what the source computes, at the top tier."""

from pathlib import Path

import pytest
import torch
from source_world import FAMILIES, logits_of, make_source, reversed_text, text

from dvpa.checkpoint import convert_checkpoint
from dvpa.model import DvpaForCausalLM

TOLERANCE = 1e-5  # of the logits' scale


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_top_tier_is_the_source_and_the_base_tier_runs(family: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", family)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out", text())
    ours = DvpaForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = reversed_text()
    theirs = logits_of(source, ids)
    assert (
        logits_of(ours, ids, tiers="top") - theirs
    ).abs().max() <= TOLERANCE * theirs.abs().max()
    base = logits_of(ours, ids, tiers=0)
    assert base.isfinite().all()
    assert (base - theirs).abs().max() > 0.01  # another model, not the same one again
    held_out = text().held_out
    for i, tier in enumerate(report.tiers):
        loss = ours(held_out, labels=held_out, tiers=i, use_cache=False).loss
        assert tier.nll == pytest.approx(float(loss), rel=1e-4)
    assert any(order != sorted(order) for order in report.expert_order.values())
    assert torch.equal(
        ours.generate(ids[:1], tiers="top", max_new_tokens=4, do_sample=False)[0, :24], ids[0]
    )

"""The training benchmark: both contenders compute the same, and its page says what was measured."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
bench_training = import_module("bench_training")
training_page = import_module("training_page")


@pytest.mark.slow
def test_it_measures_what_its_page_says(tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    threads = torch.get_num_threads()
    try:
        bench_training.main(
            "--model model/pico.yaml --examples 4 --length 16 --rounds 1 --steps 2 --threads 1 "
            f"--out {out}".split()
        )
    finally:
        torch.set_num_threads(threads)
    result = json.loads(out.read_text())
    ours, theirs = result["first_losses"]
    assert ours == pytest.approx(theirs, rel=1e-4)
    rows = result["rows"]
    peer = f"transformers {result['experts_implementation']}"
    assert set(rows) == {"dvpa", "transformers eager", "transformers grouped_mm", "dvpa joint"}
    assert rows["dvpa"]["tokens_per_step"] == rows[peer]["tokens_per_step"] == 4 * 16
    # Equal work: our own count of FLOPs is the one that the peer is given.
    assert rows["dvpa"]["flops_per_step"] == pytest.approx(rows[peer]["flops_per_step"])
    assert rows["dvpa joint"]["tokens_per_step"] == 2 * 4 * 16
    assert rows[peer]["step_seconds"] <= rows["transformers eager"]["step_seconds"]
    text, head, lines = training_page.training_part(result)
    assert f"{result['ratio']['tokens_per_second']:.2f}x" in text
    assert len(lines) == 4 and all(len(line) == len(head) for line in lines)


def test_our_labels_are_the_peers() -> None:
    ids = torch.arange(12).view(2, 6)
    batch = bench_training.our_batch({"input_ids": ids})
    assert batch["labels"][:, :-1].equal(ids[:, 1:])  # what Transformers shifts inside
    assert (batch["labels"][:, -1] == bench_training.IGNORED).all()
    assert batch["scored"].tolist() == [10, 0]

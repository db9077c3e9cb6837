"""lm-eval's `local-completions` against the server, beside Transformers on the exported tier.

A multiple-choice task (log-likelihoods: echo and logprobs) and a generation task, both from local
files. Needs lm-eval (`pip install 'dvpa[eval]'`), which is not part of the test environment.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from server_world import TIERS, checkpoint, serving

from dvpa.checkpoint.export import export_tier

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: dvpa[eval]")
pytest.importorskip("tenacity", reason="lm-eval's API client is not installed: dvpa[eval]")

CHOICE = """
task: dvpa_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATE = """
task: dvpa_generate
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["a"], max_gen_toks: 8, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write_tasks(folder: Path) -> Path:
    """Both tasks over the same 24 questions."""
    draws = random.Random(0)
    rows = []
    for _ in range(24):
        a, b = draws.randrange(10), draws.randrange(10)
        choices = [str(a + b), str(a + b + 1), str(abs(a - b))]
        rows.append({"question": f"what is {a} + {b} ?", "choices": choices, "label": 0})
    data = folder / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({**row, "answer": row["choices"][0]}) + "\n" for row in rows)
    )
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (tasks / f"{name}.yaml").write_text(text % data)
    return tasks


def evaluate(model: Any, tasks: Path) -> dict[str, list[Any]]:
    """The model's raw answers to each task, in the order of its rows."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=["dvpa_choice", "dvpa_generate"], task_manager=manager, log_samples=True,
        bootstrap_iters=0,
    )  # fmt: skip
    assert found is not None
    return {
        name: [sample["filtered_resps"] for sample in sorted(rows, key=lambda s: s["doc_id"])]
        for name, rows in found["samples"].items()
    }


@pytest.mark.parametrize("tier", [0, 2])
def test_the_server_scores_as_the_exported_tier_does(tmp_path: Path, tier: int) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    exported = tmp_path / "exported"
    export_tier(checkpoint(), tier, exported)
    tasks = write_tasks(tmp_path)
    here = evaluate(
        HFLM(
            pretrained=str(exported),
            device="cpu",
            dtype="float32",
            batch_size=4,
            add_bos_token=True,
        ),
        tasks,
    )
    with serving() as world:
        there = evaluate(
            LocalCompletionsAPI(
                base_url=f"{world.url}/v1/completions",
                model=f"dvpa-{TIERS[tier]}",
                tokenizer=str(checkpoint()),
                tokenizer_backend="huggingface",
                add_bos_token=True,
                num_concurrent=4,
                batch_size=4,
                max_length=256,
            ),
            tasks,
        )
    assert here["dvpa_generate"] == there["dvpa_generate"]
    for ours, theirs in zip(there["dvpa_choice"], here["dvpa_choice"], strict=True):
        for (logprob, is_greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
            assert logprob == pytest.approx(expected, abs=1e-3)
            assert is_greedy == expected_greedy

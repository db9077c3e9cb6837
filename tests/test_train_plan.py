"""Training on paper: parts against prices and by hand, layouts, the command."""

import json
import math
import re
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpa.architecture import Architecture, load_architecture
from dvpa.cli import main
from dvpa.plan import MACHINES, Assumptions, Layout, Machine, TrainStage, Wishes, plan_training
from dvpa.plan.memory import predict_memory, total
from dvpa.plan.predict import predict
from dvpa.plan.stage_model import stage_model
from dvpa.plan.traffic import expert_exchange, weight_exchange
from dvpa.pricing import price, split

ROOT = Path(__file__).resolve().parent.parent
BIG = "model/dvpa-7b-32b.yaml"
MODELS = sorted((ROOT / "configs" / "model").glob("*.yaml"))
H100 = MACHINES["h100"]
PAIRED = TrainStage("joint", 4, 100, 2048, 4096, (0.4, 0.3, 0.3, 0.0), True, 0.25)
FIRST = TrainStage("foundation", 1, 100, 4096, 4096)


@pytest.fixture(scope="module")
def big() -> Architecture:
    """Without its multi-token prediction module."""
    config = load_architecture(BIG)
    config.num_nextn_predict_layers = 0
    return config


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """One line on stderr, exit code 2."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_parts_add_up_to_the_price(path: Path) -> None:
    config = load_architecture(path)
    for tier, priced in enumerate(price(config).tiers):
        assert split(config, tier).total == priced.tier_params


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_flops_are_the_tiers_prices_in_the_stages_mix(path: Path) -> None:
    """Three passes' worth of what `price` says; the parts that are split off never exceed it."""
    config = load_architecture(path)
    config.num_nextn_predict_layers = 0
    count = config.num_tiers
    stage = TrainStage("mix", count, 1, 8, 128, tuple(range(1, count + 1)))
    weights = [t / sum(range(1, count + 1)) for t in range(1, count + 1)]
    model, priced = stage_model(config, stage), price(config, 64).tiers
    forward = sum(w * t.flops_per_token for w, t in zip(weights, priced, strict=True))
    assert model.flops_per_token == pytest.approx(3 * forward)
    assert model.layer_flops_per_token + 2 * model.parts.head == pytest.approx(forward)
    base = replace(stage, num_tiers=1, tier_weights=())
    grown = [price(config, 64).tiers[0].flops_per_token]
    assert stage_model(config, base).flops_per_token == pytest.approx(3 * grown[0])
    assert 0 < model.expert_flops_per_token < model.layer_flops_per_token


def test_multi_token_prediction_is_one_more_layer_and_one_more_head(big: Architecture) -> None:
    config = load_architecture(BIG)
    plain, more = stage_model(big, PAIRED), stage_model(config, PAIRED)
    hidden, parts = config.hidden_size, plain.parts
    assert more.dense_params - plain.dense_params == (
        plain.moe_layer_params + 2 * hidden**2 + 3 * hidden
    )
    assert more.routed_params - plain.routed_params == 256 * parts.expert
    assert more.num_moe_layers == plain.num_moe_layers + 1
    added = (more.flops_per_token - plain.flops_per_token) / 6
    least = parts.attention + parts.shared_experts + parts.head + plain.mean_top_k * parts.expert
    assert least < added < 1.2 * least


def tiny() -> Architecture:
    """Small enough to do in the head: one dense and one MoE layer, hidden 8, 4 experts of 4."""
    tiers = [
        {"name": n, "num_groups": g, "top_k": k, "topk_group": g, "routed_scaling_factor": 1.0}
        for n, g, k in (("low", 1, 1), ("top", 2, 3))
    ]
    return Architecture(
        vocab_size=10, hidden_size=8, intermediate_size=16, moe_intermediate_size=4,
        num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=2, n_shared_experts=1,
        n_routed_experts=4, n_group=2, kv_lora_rank=4, qk_rope_head_dim=2, qk_nope_head_dim=2,
        v_head_dim=2, tiers=tiers, pad_token_id=None, max_position_embeddings=64,
    )  # fmt: skip


def test_memory_by_hand() -> None:
    config = tiny()
    stage = TrainStage("s", 2, 1, 8, 5, (0.5, 0.5))  # mean k 2
    numbers = stage_model(config, stage)
    # A layer's attention: queries 8 x 8, latent 8 x (4 + 2) and its norm 4, keys and values
    # 4 x 8, output 4 x 8; two norms of 8.
    attention = 64 + 48 + 4 + 32 + 32 + 16
    expert, dense, shared, router = 3 * 8 * 4, 3 * 8 * 16, 3 * 8 * 4, 4 * 8
    total_params = 2 * 80 + 8 + 2 * attention + dense + shared + router + 4 * expert
    assert numbers.parts.total == total_params == price(config).total_params
    assume = Assumptions(imbalance=1.0, reserved_bytes=7.0)
    lines = predict_memory(numbers, stage, Layout(2, 4, True), 2, assume)
    value = {line.name: line.value for line in lines}
    assert value["weights, gradients, optimizer"] == 16 * total_params / 4
    tokens = 10
    assert value["activations kept"] == tokens * 2 * 8 * 2
    # bf16: norms 4 + 2 + 2 bytes a value; queries, keys, keys-and-values, mixed values; 4 bytes of
    # log-sum-exp a head. MoE: shared 4 x 4 values, scores, the router's fp32 input, table, rows.
    kept = 2 * 8 * 8 + 8 * 4 + 2 * (2 * (4 + 4 + 4 + 2) + 4)
    kept += 2 * 4 * 4 + 4 * 4 + 4 * 8
    kept += 3 * (16 + 12 + 1) + 2 * 24 + 2 * 2 * (2 * 8 + 2 * 4)
    rows = tokens * 2
    layer = attention + shared + router + 4 * expert / 2
    in_layer = tokens * kept + rows * 2 * (3 * 4 + 8) + 2 * rows * 2 * 8 + layer * (2 + 2 + 4 + 2)
    at_loss = tokens * 10 * 12 + 80 * (2 + 2 + 4)
    assert value["working memory"] == max(in_layer, at_loss)
    assert total(lines) == sum(value.values())
    assert value["reserved"] == 7


def test_all_to_all_by_hand_and_in_proportion_to_tokens(big: Architecture) -> None:
    model, layout = stage_model(big, PAIRED), Layout(8, 64, False)
    low = 0.875 * (0.4 * 5 + 0.3 * 15 + 0.3 * 27) + 0.125 / 4 * (5 + 15 + 27 + 48)
    assert model.mean_top_k == pytest.approx((48 + low) / 2)
    found = expert_exchange(model, layout, 1000, H100, Assumptions())
    # dispatch and combine, forward and backward; seven of eight rows leave the rank
    assert found.sent_bytes == pytest.approx(46 * 1000 * model.mean_top_k * 4096 * 2 * 4 * 7 / 8)
    assert found.seconds == pytest.approx(found.sent_bytes / 450e9 * 1.1 / 0.8)
    double = expert_exchange(model, layout, 2000, H100, Assumptions())
    assert double.sent_bytes == pytest.approx(2 * found.sent_bytes)
    far = expert_exchange(model, Layout(16, 64, False), 1000, H100, Assumptions())
    assert far.seconds > 4 * found.seconds  # half of the rows go over the network
    assert expert_exchange(model, Layout(1, 64, False), 1000, H100, Assumptions()).sent_bytes == 0


def test_weight_exchange_by_hand(big: Architecture) -> None:
    model = stage_model(big, PAIRED)
    found = weight_exchange(model, Layout(8, 64, True), H100, Assumptions())
    dense, experts = model.dense_params * 8, model.routed_params / 8 * 8
    assert found.sent_bytes == pytest.approx(dense * 63 / 64 + experts * 7 / 8)
    # dense: eight ranks of a node share what comes in; experts: each of its own
    seconds = max(dense * 63 / 64 / 450e9, dense * (1 - 8 / 64) / 8 / 50e9)
    seconds += experts * 7 / 8 / 50e9
    assert found.seconds == pytest.approx(seconds / 0.8)
    alone = weight_exchange(model, Layout(1, 1, True), H100, Assumptions())
    assert (alone.sent_bytes, alone.seconds) == (0, 0)


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 4, 8, 16, 32]),
    nodes=st.integers(0, 5),
    micro=st.sampled_from([1, 2]),
    checkpointed=st.booleans(),
    stage=st.sampled_from([FIRST, PAIRED]),
)
def test_more_gpus_never_need_more_memory_and_tokens_cost_in_proportion(
    ranks: int, nodes: int, micro: int, checkpointed: bool, stage: TrainStage
) -> None:
    model, assume = stage_model(load_architecture(BIG), stage), Assumptions()
    needs = []
    for world in (8 * 2**nodes, 16 * 2**nodes):
        if world % ranks:
            return
        layout = Layout(ranks, world, checkpointed)
        needs.append(total(predict_memory(model, stage, layout, micro, assume)))
    assert needs[1] <= needs[0]
    one, two = (
        predict(model, stage, layout, m, 16 * 2**nodes, H100, assume) for m in (micro, 2 * micro)
    )
    # The same step in fewer pieces: as many rows travel, weights half as often, memory grows.
    assert two.alltoall_bytes == pytest.approx(one.alltoall_bytes)
    assert two.memory_bytes > one.memory_bytes
    assert 0 < one.mfu < 0.5 and 0 < two.mfu < 0.5
    assert one.step_seconds == pytest.approx(sum(line.value for line in one.time))


def test_recomputing_trades_time_for_memory(big: Architecture) -> None:
    model = stage_model(big, PAIRED)
    kept, again = (
        predict(model, PAIRED, Layout(2, 64, flag), 1, 64, H100, Assumptions())
        for flag in (False, True)
    )
    assert again.memory_bytes < kept.memory_bytes
    assert again.step_seconds > kept.step_seconds and again.mfu < kept.mfu


@pytest.mark.parametrize("num_gpus", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("has_mtp", [False, True])
def test_the_large_model_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, num_gpus: int, has_mtp: bool
) -> None:
    model, recipe = BIG, "train/dvpa-7b-32b.yaml"
    if not has_mtp:
        model = str(tmp_path / "model.yaml")
        text = (ROOT / "configs" / BIG).read_text()
        Path(model).write_text(
            re.sub("num_nextn_predict_layers: 1", "num_nextn_predict_layers: 0", text)
        )
        text = (ROOT / "configs" / recipe).read_text()
        recipe = str(tmp_path / "recipe.yaml")
        text = re.sub("(?m)^mtp: .*$", "mtp: null", text).replace(
            f"model: {BIG}", f"model: {model}"
        )
        Path(recipe).write_text(text)
    assert main(["plan", model, "--train", recipe, "--gpus", str(num_gpus), "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    layout = plan["layout"]
    assert plan["model_params"] > (155e9 if has_mtp else 152e9)
    assert 32 % layout["expert_parallel"] == 0
    assert num_gpus % layout["shard"] == 0 == layout["shard"] % layout["expert_parallel"]
    names = ["foundation", "grow-13b", "grow-20b", "grow-32b", "joint"]
    assert [stage["name"] for stage in plan["stages"]] == names
    for stage in plan["stages"]:
        assert stage["memory_bytes"] < 80e9
        assert stage["memory_bytes"] == pytest.approx(sum(m["value"] for m in stage["memory"]))
        assert all(line["formula"] for line in stage["memory"] + stage["time"] + stage["traffic"])
        assert 0.1 < stage["mfu"] < 0.5
        paired = 2 if stage["name"] == "joint" else 1
        examples = stage["micro_batch"] * stage["accumulate"] * num_gpus
        assert examples * paired * 4096 == stage["tokens_per_step"]
    assert plan["gpu_hours"] == pytest.approx(24 * plan["days"] * num_gpus)
    assert min(plan["days_by_expert_parallel"].values()) == pytest.approx(plan["days"])
    assert sum(plan["passed_over"].values()) > 20


def test_the_search_finds_the_fastest(big: Architecture) -> None:
    """Against every layout, one by one, through the planner's own wishes."""
    stages = [FIRST, PAIRED]
    found = plan_training(big, stages, H100, 128)
    best = math.inf
    for ranks in (1, 2, 4, 8, 16, 32):
        for shard in (8, 16, 32, 64, 128):
            for flag in (False, True):
                wishes = Wishes(ranks, shard, None, flag, 0)
                if shard % ranks:
                    continue
                try:
                    best = min(best, plan_training(big, stages, H100, 128, None, wishes).days)
                except ValueError as error:
                    assert "too large" in str(error)
    assert found.days == pytest.approx(best)


def test_the_table_explains_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", BIG, "--train", "--gpus", "64", "--explain", "joint"]
    assert main([*command, "--assume", "efficiency=0.4"]) == 0
    text = capsys.readouterr().out
    assert "156.1B parameters" in text and "efficiency 0.4" in text
    assert "weights, gradients, optimizer 39.02 GB = 16 B x 156G parameters / 64 ranks" in text
    for word in ("layout: expert_parallel", "expert all-to-all", "waiting for weights", "MFU"):
        assert word in text
    assert "too large" in text and "does not divide a group's experts" in text
    assert "host memory, start, each rank: 0.0336 GB" in text  # 4 B x 2 x 1024 x 4096
    assert "checkpoint, each rank: 29.3 GB = a copy while it is written: 12 B x 156G" in text
    assert "calibration, first rank: 624 GB = the whole model: 4 B x 156G" in text
    table = text[text.index("stage") : text.index("other layouts")]
    assert max(map(len, table.splitlines())) <= 80


def test_the_plan_meets_the_wishes(capsys: pytest.CaptureFixture[str]) -> None:
    wishes = "--gpus 256 --expert-parallel 8 --shard 128 --micro-batch 1 --checkpointing on"
    command = ["plan", BIG, "--train", "train/dvpa-7b-32b.yaml", *wishes.split(), "--json", "-"]
    assert main([*command, "--sequence", "2048", "--loss-chunk", "512"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["layout"] == {
        "expert_parallel": 8, "shard": 128, "is_checkpointed": True, "loss_chunk": 512,
    }  # fmt: skip
    assert {stage["micro_batch"] for stage in plan["stages"]} == {1}
    assert plan["stages"][0]["tokens_per_step"] == 4096 * 2048
    assert plan["stages"][0]["weight_bytes"] > 0


def test_a_machine_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    data = {
        "memory_bytes": 16e9, "peak_flops": 1e11, "memory_bandwidth": 1e10,
        "link_bandwidth": 1e10, "network_bandwidth": 1e9, "gpus_per_node": 1,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(data))
    command = ["plan", "model/nano.yaml", "--train", "--gpus", "2", "--gpu-file", str(path)]
    assert main([*command, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["name"] == "mine"
    path.write_text(yaml.safe_dump({**data, "peak_flops": -1}))
    assert "peak_flops: -1" in fails(capsys, *command)
    path.write_text(yaml.safe_dump({**data, "speed": 1}))
    assert "speed: unknown key" in fails(capsys, *command)
    del data["peak_flops"]
    path.write_text(yaml.safe_dump(data))
    assert "peak_flops: missing" in fails(capsys, *command)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "--gpus"),
        ("--gpus 60", "gpus: 60 must fill whole nodes of 8"),
        ("--gpus 0", "gpus: 0"),
        ("--gpus 96", "gpus: 96 must divide the examples of a step, 4096"),
        ("--gpus 8", "no layout for 8 x h100"),
        ("--gpus 64 --expert-parallel 64", "must divide a group's 32 experts"),
        ("--gpus 64 --expert-parallel 3", "must divide a group's 32 experts"),
        ("--gpus 8 --expert-parallel 16", "expert_parallel: 16 must divide the 8 ranks"),
        ("--gpus 64 --shard 48", "shard: 48 must divide the 64 ranks"),
        ("--gpus 64 --shard 8 --expert-parallel 16", "shard: 8 must be a multiple"),
        ("--gpus 64 --micro-batch 7", "micro_batch: 7 must divide the 64 examples"),
        ("--gpus 64 --loss-chunk -1", "loss_chunk: -1"),
        ("--gpus 64 --sequence 0", "sequence: 0 must be positive"),
        ("--gpus 64 --sequence 32768", "max_position_embeddings = 16384"),
        ("--gpus 64 --gpu b200", "'b200' must be one of h100"),
        ("--gpus 64 --gpu h100 --gpu-file x.yaml", "give one of the two"),
        ("--gpus 64 --gpu-file nowhere.yaml", "nowhere.yaml"),
        ("--gpus 64 --assume speed=2", "'speed' must be one of efficiency"),
        ("--gpus 64 --assume efficiency=2", "efficiency: 2.0 must be in"),
        ("--gpus 64 --assume efficiency=fast", "'fast' must be a number"),
        ("--gpus 64 --explain last", "'last' must be one of foundation"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: str, named: str) -> None:
    assert named in fails(capsys, "plan", BIG, "--train", *arguments.split())


def test_other_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--gpus: needs --train" in fails(capsys, "plan", BIG, "--gpus", "64")
    assert "--assume: needs --train" in fails(capsys, "plan", BIG, "--assume", "imbalance=2")
    other = fails(capsys, "plan", BIG, "--train", "train/nano.yaml", "--gpus", "64")
    assert "trains model/nano.yaml, not dvpa-7b-32b.yaml" in other
    unnamed = fails(capsys, "plan", "model/bench-500m.yaml", "--train", "--gpus", "8")
    assert "train/bench-500m.yaml" in unnamed
    with pytest.raises(ValueError, match="num_tiers: 9"):
        stage_model(load_architecture(BIG), replace(FIRST, num_tiers=9))
    with pytest.raises(ValueError, match="stages: must not be empty"):
        plan_training(load_architecture(BIG), [], H100, 64)
    with pytest.raises(ValueError, match="tier_weights: needs 1"):
        replace(FIRST, tier_weights=(0.5, 0.5))
    with pytest.raises(ValueError, match="memory_bytes: nan"):
        Machine("x", math.nan, 1.0, 1.0, 1.0, 1.0)


def test_the_benchmark_compares_like_with_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are the recipes' stages, and a prediction stands beside each measurement."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    bench = import_module("bench_plan")
    for row, (model, _, num_tiers, examples, sequence, _) in bench.ROWS.items():
        if model == "110M":
            continue
        recipe = yaml.safe_load((ROOT / "configs" / "train" / f"{model}.yaml").read_text())
        name = row.split(", ")[1]
        stage = next(s for s in recipe["stages"] if s["name"] == name)
        assert (num_tiers, examples) == (stage["num_tiers"], stage["batch_size"])
        assert sequence == recipe["data"].get("max_length", 64)
    measured = {"step_seconds": 1.0, "memory_bytes": 4e7, "saved_bytes": 2e7}
    row = bench.compare("pico, joint", MACHINES["cpu"], 0.5, measured)
    assert set(measured) <= set(row["predicted"])
    assert sum(row["time"].values()) == pytest.approx(row["predicted"]["step_seconds"])
    assert sum(row["memory"].values()) == pytest.approx(row["predicted"]["memory_bytes"])
    found = bench.measure("pico, joint", "time", 1)
    assert 0 < found["step_seconds"] < 30

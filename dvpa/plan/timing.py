"""Seconds of one step on the slowest rank."""

from dvpa.plan.machine import Machine
from dvpa.plan.memory import dense_layer_bytes, logit_bytes, moe_layer_bytes
from dvpa.plan.stage_model import Line, StageModel, amount
from dvpa.plan.traffic import expert_exchange, replica_exchange, weight_exchange
from dvpa.plan.workload import Assumptions, Layout, TrainStage


def predict_time(
    model: StageModel,
    stage: TrainStage,
    layout: Layout,
    micro_batch: int,
    world: int,
    machine: Machine,
    assume: Assumptions,
) -> tuple[Line, ...]:
    """Time of one optimizer step: lines that add up to it."""
    tokens = micro_batch * stage.rows_per_example * stage.sequence
    times = stage.examples // (world * micro_batch)
    products = _products(model, layout, tokens, machine, assume)
    states = _states(model, stage, layout, tokens, machine, assume)
    launches = _launches(model, layout, machine)
    computing = products.value + states.value + launches.value
    exchange = expert_exchange(model, layout, tokens, machine, assume)
    weights = weight_exchange(model, layout, machine, assume)
    waited = max(0.0, weights.seconds - assume.weights_overlap * computing)
    lines = [Line(line.name, times * line.value, f"{times} x ({line.formula})")
             for line in (products, states, launches) if line.value]  # fmt: skip
    if layout.expert_parallel > 1:
        lines.append(
            Line(
                "expert all-to-all",
                times * exchange.seconds * (1 - assume.alltoall_overlap),
                f"{times} x {amount(exchange.sent_bytes)}B sent in {exchange.seconds:.3g} s, "
                f"{assume.alltoall_overlap:.0%} hidden",
            )
        )
    if layout.shard > 1:
        lines.append(
            Line(
                "waiting for weights",
                times * waited,
                f"{times} x max(0, {weights.seconds:.3g} s for {amount(weights.sent_bytes)}B - "
                f"{assume.weights_overlap:g} x {computing:.3g} s of computing)",
            )
        )
    if world > layout.shard:
        replicas = replica_exchange(model, layout, world, machine, assume)
        lines.append(Line("replicas' gradients", replicas.seconds, replicas.formula))
    lines.append(_optimizer(model, layout, machine, assume))
    return tuple(lines)


def _products(
    model: StageModel, layout: Layout, tokens: int, machine: Machine, assume: Assumptions
) -> Line:
    """Matrix products; the routed experts' take no less than reading their weights does."""
    repeats = 4 if layout.is_checkpointed else 3
    speed = machine.peak_flops * assume.efficiency
    again = model.layer_flops_per_token if layout.is_checkpointed else 0.0
    if layout.loss_chunk:
        again += 2 * model.parts.head * (1 + model.mtp_layers)
    experts = repeats * model.expert_flops_per_token * tokens
    rest = (model.flops_per_token + again) * tokens - experts
    read = model.routed_params / layout.expert_parallel * assume.compute_bytes * repeats
    multiply = experts * assume.imbalance / speed
    fetch = read / (machine.memory_bandwidth * assume.memory_efficiency)
    formula = (
        f"({amount(rest)} + experts {amount(experts)} x {assume.imbalance:g}) FLOPs / "
        f"({amount(machine.peak_flops)} x {assume.efficiency:g})"
    )
    if fetch > multiply:
        formula = (
            f"{amount(rest)} FLOPs / ({amount(machine.peak_flops)} x {assume.efficiency:g}) + "
            f"experts' weights {amount(read)}B read, which takes longer than multiplying them"
        )
    return Line("matrix products", rest / speed + max(multiply, fetch), formula)


def _states(
    model: StageModel,
    stage: TrainStage,
    layout: Layout,
    tokens: int,
    machine: Machine,
    assume: Assumptions,
) -> Line:
    """Everything that is not a product: bound by memory, so counted in bytes."""
    layers = model.parts.num_dense_layers * dense_layer_bytes(model, assume)
    layers += model.num_moe_layers * moe_layer_bytes(model, layout, assume)
    passes = 3 if layout.is_checkpointed else 2
    logits = model.config.vocab_size * logit_bytes(model, stage)
    moved = 2 * tokens * (passes * layers + logits)
    formula = (
        f"{amount(tokens)} tokens x 2 (written, read) x ({passes} passes x {amount(layers)}B of "
        f"activations + {amount(logits)}B of logits) / ({amount(machine.memory_bandwidth)}B/s x "
        f"{assume.memory_efficiency:g})"
    )
    return Line(
        "norms, routing, loss",
        moved / (machine.memory_bandwidth * assume.memory_efficiency),
        formula,
    )


def _launches(model: StageModel, layout: Layout, machine: Machine) -> Line:
    layers = model.parts.num_dense_layers + model.num_moe_layers
    passes = 4 if layout.is_checkpointed else 3  # a backward pass counts twice
    seconds = passes * layers * machine.layer_seconds
    formula = f"{passes} passes x {layers} layers x {machine.layer_seconds:.3g} s"
    return Line("launches", seconds, formula)


def _optimizer(model: StageModel, layout: Layout, machine: Machine, assume: Assumptions) -> Line:
    """AdamW reads all of its state and writes all but the gradient back."""
    params = (model.dense_params + model.routed_params) / layout.shard
    each = 2 * assume.state_bytes - assume.compute_bytes
    formula = f"{amount(params)} parameters x {each:g} B read and written"
    seconds = params * each / (machine.memory_bandwidth * assume.memory_efficiency)
    return Line("optimizer", seconds, formula)

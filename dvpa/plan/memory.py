"""Bytes one rank holds at the worst moment of a step, part by part.

Activations are what autograd keeps of the modules in `dvpa.model` (tests count it there), in the
training precision, with flash attention. Letters: D hidden, H heads, S sequence, K slots, F width.
"""

from dvpa.plan.stage_model import Line, StageModel, amount
from dvpa.plan.workload import Assumptions, Layout, TrainStage

FP32, INT64 = 4, 8
MOMENTS = 2  # of AdamW, in fp32 as the weights are
PIECE = 1 << 22  # numbers drawn or read at a time at the start, or one expert
# Bytes per logit at the loss, as `dvpa_train` computes it in fp32. Forward: the logits, their
# scored copy, that copy in fp32 (in fp32 it is the same) and the log-probabilities; backward: the
# log-probabilities, their gradient, and its way back to the logits. Both come to as much.
LOGIT_BYTES = 12
# Paired rows, per logit of both: the student's and the teacher's softened log-probabilities and the
# divergence's terms, in fp32, of which each row has half.
PAIRED_LOGIT_BYTES = 10


def predict_memory(
    model: StageModel,
    stage: TrainStage,
    layout: Layout,
    micro_batch: int,
    assume: Assumptions,
) -> tuple[Line, ...]:
    """Memory of one rank: lines that add up to what it needs."""
    tokens = micro_batch * stage.rows_per_example * stage.sequence
    params = model.dense_params + model.routed_params
    state = assume.state_bytes * params / layout.shard
    config, moe, dense = model.config, model.num_moe_layers, model.parts.num_dense_layers
    dense_layer = dense_layer_bytes(model, assume)
    moe_layer = moe_layer_bytes(model, layout, assume)
    every = dense * dense_layer + moe * moe_layer + _norm(config.hidden_size, assume)
    inputs = assume.compute_bytes * config.hidden_size * (moe + dense)
    if layout.is_checkpointed:
        kept = Line(
            "activations kept",
            tokens * inputs,
            f"{tokens} tokens x {moe + dense} layer inputs x {config.hidden_size} x "
            f"{assume.compute_bytes:g} B",
        )
        recomputed = tokens * max(moe_layer, dense_layer)
    else:
        kept = Line(
            "activations kept",
            tokens * every,
            f"{tokens} tokens x ({dense} dense layers x {amount(dense_layer)}B + {moe} MoE x "
            f"{amount(moe_layer)}B), mean k {model.mean_top_k:.3g}",
        )
        recomputed = 0.0
    return (
        Line(
            "weights, gradients, optimizer",
            state,
            f"{assume.state_bytes:g} B x {amount(params)} parameters / {layout.shard} ranks",
        ),
        kept,
        _working(model, stage, layout, tokens, recomputed, assume),
        Line("reserved", assume.reserved_bytes, "driver, NCCL, fragmentation (assumed)"),
    )


def total(lines: tuple[Line, ...]) -> float:
    """Their sum."""
    return sum(line.value for line in lines)


def predict_host_memory(model: StageModel, layout: Layout) -> tuple[Line, ...]:
    """Memory beside the accelerators of what `dvpa_train` (fsdp2) keeps there; not a sum.

    Nobody needs the whole model but who fits the difficulty head and the tier map.
    """
    params = model.dense_params + model.routed_params
    expert = 2 * model.config.moe_intermediate_size * model.config.hidden_size
    state = FP32 * (1 + MOMENTS) * params / layout.shard
    return (
        Line(
            "start, each rank",
            float(FP32 * max(PIECE, expert)),
            "one piece being drawn or read; the rank's slices go to the accelerator",
        ),
        Line(
            "checkpoint, each rank",
            state,
            f"a copy while it is written: {FP32 * (1 + MOMENTS)} B x {amount(params)} parameters "
            f"/ {layout.shard} ranks",
        ),
        Line(
            "difficulty head and calibration, first rank",
            float(FP32 * params),
            f"the whole model: {FP32} B x {amount(params)}; none with calibration: null",
        ),
    )


def _working(
    model: StageModel,
    stage: TrainStage,
    layout: Layout,
    tokens: int,
    recomputed: float,
    assume: Assumptions,
) -> Line:
    """What is alive for a moment: at the loss, or while one MoE layer is in its backward pass."""
    chunk = min(tokens, layout.loss_chunk or tokens)
    per_logit = logit_bytes(model, stage)
    loss = chunk * model.config.vocab_size * per_logit
    # Weights, their gradients, and those in the dtype they travel in.
    travelling = 0.0 if layout.shard == 1 else 2 * assume.compute_bytes + assume.reduce_bytes
    head = model.parts.head * travelling
    rows = tokens * model.mean_top_k * assume.imbalance
    width, hidden = model.config.moe_intermediate_size, model.config.hidden_size
    # Gradients of the hidden rows (2F), the weighted rows (F) and the rows themselves (D).
    backward = rows * assume.compute_bytes * (3 * width + hidden)
    exchange = 0.0
    if layout.expert_parallel > 1:  # rows out and back, while the copies above are alive
        exchange = 2 * rows * assume.compute_bytes * hidden
    layer = float(model.moe_layer_params)
    layer += model.parts.num_experts * model.parts.expert / layout.expert_parallel
    if travelling:  # the next layer's weights are on their way already
        travelling += assume.compute_bytes
    in_layer = recomputed + backward + exchange + layer * travelling
    if loss + head >= in_layer:
        formula = (
            f"at the loss: {chunk} positions x {model.config.vocab_size} logits x {per_logit:g} B"
            f" + gathered head {amount(head)}B (one layer in backward: {amount(in_layer)}B)"
        )
        return Line("working memory", loss + head, formula)
    formula = (
        f"a layer in backward: recomputed {amount(recomputed)}B + gradients of "
        f"{amount(rows)} rows {amount(backward)}B + all-to-all buffers {amount(exchange)}B + "
        f"{amount(layer)} gathered parameters x {travelling:g} B (at the loss: "
        f"{amount(loss + head)}B)"
    )
    return Line("working memory", in_layer, formula)


def logit_bytes(model: StageModel, stage: TrainStage) -> float:
    """Bytes per logit at the loss; multi-token prediction has logits of its own."""
    paired = PAIRED_LOGIT_BYTES if stage.rows_per_example > 1 else 0
    return (1 + model.mtp_layers) * LOGIT_BYTES + paired


def dense_layer_bytes(model: StageModel, assume: Assumptions) -> float:
    """Kept for the backward pass by one dense layer, per token."""
    mlp = 4 * assume.compute_bytes * model.config.intermediate_size  # gate, silu, up, product
    return _attention(model, assume) + mlp


def moe_layer_bytes(model: StageModel, layout: Layout, assume: Assumptions) -> float:
    """Kept for the backward pass by one MoE layer, per token of the mean k."""
    config, size = model.config, assume.compute_bytes
    shared = 4 * size * config.n_shared_experts * config.moe_intermediate_size
    # Scores in fp32; the router's input too, which in fp32 is the normed state itself.
    router = FP32 * model.parts.num_experts + (FP32 * config.hidden_size if size < FP32 else 0)
    # Table: indices twice, weights three times over, mask; rows: token, expert and position.
    slots = model.max_top_k * (2 * INT64 + 3 * FP32 + 1) + model.mean_top_k * 3 * INT64
    width, hidden = config.moe_intermediate_size, config.hidden_size
    if not assume.experts_are_fused:
        values = 3 * hidden + 4 * width
    elif layout.expert_parallel > 1:  # rows as received, and as returned to be weighted
        values = 2 * hidden + 2 * width
    else:
        values = 2 * width
    rows = model.mean_top_k * assume.imbalance * size * values
    return _attention(model, assume) + shared + router + slots + rows


def _attention(model: StageModel, assume: Assumptions) -> float:
    """One layer's attention and both of its norms, per token."""
    config, size = model.config, assume.compute_bytes
    heads = config.num_attention_heads
    query = config.qk_nope_head_dim + config.qk_rope_head_dim
    if config.kv_lora_rank is None:  # queries twice (before and after rotation), keys likewise
        mixed = size * (2 * heads * query + config.kv_width * 3 // 2 + heads * config.v_head_dim)
        norms = _norm(heads * query + config.kv_width // 2, assume) if config.qk_norm else 0
        return 2 * _norm(config.hidden_size, assume) + mixed + norms + heads * FP32
    expanded = config.qk_nope_head_dim + config.v_head_dim  # values are a view of it
    mixed = heads * (size * (2 * query + expanded + config.v_head_dim) + FP32)
    latents = _norm(config.kv_lora_rank, assume)
    latents += _norm(config.q_lora_rank, assume) if config.q_lora_rank else 0
    return 2 * _norm(config.hidden_size, assume) + latents + mixed


def _norm(width: int, assume: Assumptions) -> float:
    """An RMS norm: its input in fp32, the normed state and the scaled one."""
    return (FP32 + 2 * assume.compute_bytes) * width

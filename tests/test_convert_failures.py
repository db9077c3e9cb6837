"""What `convert_checkpoint` refuses: one line naming the tensor or key, and nothing on the disk."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from source_world import make_source, read_folder, text
from test_checkpoint import edited
from torch import Tensor

from dvpa.checkpoint import ShardWriter, convert_checkpoint
from dvpa.checkpoint.calibration_text import CalibrationText
from dvpa.checkpoint.layer_stream import LayerStream
from dvpa.checkpoint.pools import parse_tiers
from dvpa.checkpoint.shards import INDEX_FILE
from dvpa.cli import main
from dvpa.model import DvpaForCausalLM

GATE = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.2.mlp.experts.7.up_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sharded DeepSeek-V3 checkpoint."""
    make_source(tmp_path / "source")
    return tmp_path / "source"


def refused(source: Path, message: str, **options: Any) -> None:
    """Converting fails with this message and leaves nothing."""
    beside = set(source.parent.iterdir())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert_checkpoint(source, source.parent / "out", options.pop("text", None), **options)
    assert set(source.parent.iterdir()) == beside


def rewrite(source: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """One file in place of the shards, after `change` had its way with the tensors."""
    tensors = read_folder(source)
    change(tensors)
    for path in [*source.glob("model-*.safetensors"), source / INDEX_FILE]:
        path.unlink()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing expert": (lambda t: t.pop(EXPERT), f"{EXPERT}: missing"),
    "missing bias": (lambda t: t.pop(BIAS), f"{BIAS}: missing"),
    "missing head": (lambda t: t.pop("lm_head.weight"), "lm_head.weight: missing"),
    "unknown": (lambda t: t.update({"model.extra": torch.zeros(2)}), "model.extra: unknown tensor"),
    "one expert too many": (
        lambda t: t.update({EXPERT.replace(".7.", ".16."): t[EXPERT].clone()}),
        "experts.16.up_proj.weight: unknown tensor",
    ),
    "packed experts": (
        lambda t: t.update({"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(16, 32, 32)}),
        "model.layers.1.mlp.experts.gate_up_proj: unknown tensor",
    ),
    "router rows": (lambda t: t.update({GATE: t[GATE][:8]}), f"{GATE}: shape \\(8, 32\\)"),
    "transposed": (lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}), f"{EXPERT}: shape"),
    "integers": (lambda t: t.update({EXPERT: t[EXPERT].int()}), f"{EXPERT}: dtype I32"),
    "undeclared FP8": (
        lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}),
        f"{EXPERT}: FP8, but config.json says nothing",
    ),
    "not a number": (lambda t: t[EXPERT].fill_(torch.nan), "layer 2: .* not finite"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_wrong_tensor(kind: str, source: Path) -> None:
    change, message = DAMAGE[kind]
    rewrite(source, change)
    refused(source, message, text=text())


def test_fp8_scales(source: Path) -> None:
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config(source, quantization_config=quantization)
    scale = f"{EXPERT}_scale_inv"
    rewrite(source, lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}))
    refused(source, f"{scale}: missing")
    tensors = read_folder(source)
    for wrong in (torch.ones(1, 2), torch.ones(1, 1, dtype=torch.bfloat16)):
        save_file({**tensors, scale: wrong}, source / "model.safetensors")
        refused(source, rf"{scale}: .* expected F32 \(1, 1\)")


def test_a_truncated_shard(source: Path) -> None:
    path = sorted(source.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    refused(source, rf"{path.name}: .* bytes of data")


def test_a_missing_shard(source: Path) -> None:
    path = sorted(source.glob("model-*.safetensors"))[1]
    path.unlink()
    refused(source, path.name)


def test_an_entry_missing_from_the_index(source: Path) -> None:
    """Its shard is named by others, so the tensor is there; one whose shard is not is missing."""
    index = json.loads((source / INDEX_FILE).read_text())
    lost = index["weight_map"][EXPERT]
    index["weight_map"] = {n: file for n, file in index["weight_map"].items() if file != lost}
    (source / INDEX_FILE).write_text(json.dumps(index))
    first = next(name for name in read_folder(source) if name not in index["weight_map"])
    assert first
    refused(source, "missing")


def test_an_unknown_dtype(source: Path) -> None:
    rewrite(source, lambda tensors: None)
    edited(lambda header: header[EXPERT].update(dtype="F7"))(source / "model.safetensors")
    refused(source, f"{EXPERT}: unknown dtype F7")


def config(source: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    path = source / "config.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type: 'llama' must be one of deepseek, deepseek_v2"),
        ({"model_type": None}, "model_type: None must be one of"),
        ({"model_type": ["a"]}, r"model_type: \['a'\] must be one of"),
        ({"scoring_func": "softmax"}, "scoring_func: 'softmax' must be 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method: 'greedy' must be 'noaux_tc'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: 2 must be 1"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' must be 'silu'"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 48}, "model.embed_tokens.weight: shape"),
        ({"n_group": 3}, "n_group: 3 must divide the 16 routed experts"),
        ({"topk_group": 5}, r"topk_group: 5 must be in 1 \.\. n_group = 4"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok: 9 must be in 1 \.\. 8"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace: 4 must be in"),
        ({"num_nextn_predict_layers": 2}, None),  # nothing of it is there
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method: 'awq' must be 'fp8'"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            r"weight_block_size: \[64, 64\] must be \[128, 128\]",
        ),
    ],
    ids=str,
)
def test_a_config_that_ours_cannot_be(
    changes: dict[str, Any], message: str | None, source: Path
) -> None:
    config(source, **changes)
    if message is None:
        convert_checkpoint(source, source.parent / "out", None)
    else:
        refused(source, message)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: True must be False"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias: True must be False"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: 8.0 must be None"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window: True must be False"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "mlp_only_layers, decoder_sparse_step: .* after"),
        ("mixtral", {"sliding_window": 64}, "sliding_window: 64 must be None"),
    ],
    ids=str,
)
def test_what_ours_does_not_compute(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_source(tmp_path / "source", family)
    config(tmp_path / "source", **changes)
    refused(tmp_path / "source", message)


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ("6:2,16:4", "base: a pool of 6 experts must be a multiple of 4"),
        ("8:2,16:5", "top: 16:5 must be the source's own 16:4"),
        ("8:2,12:4", "top: 12:4 must be the source's own 16:4"),
        ("8:9,16:4", r"tiers\[0\].top_k: 9 must be in 1 \.\. 8"),
        ("8:3,12:2,16:4", r"tiers\[1\].top_k: 2 must not be below the tier before"),
        ("12:2,8:3,16:4", r"tiers\[1\].num_groups: 2 must be in 4"),
        ("a=8:2,a=16:4", "names must differ"),
        ("8:2,16:4:9.0", "top: scale 9.0 must be the source's own 2.5"),
        ("0:1,16:4", "base: a pool of 0 experts"),
        ("8,16:4", r"'8' must be \[NAME=\]POOL:TOP_K"),
        ("8:x,16:4", "'8:x' must be"),
        ("", "'' must be"),
    ],
)
def test_tiers_that_do_not_fit(tiers: str, message: str, source: Path) -> None:
    beside = set(source.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, source.parent / "out", None, tiers=parse_tiers(tiers))
    assert set(source.parent.iterdir()) == beside


def test_pools_without_a_common_divisor(tmp_path: Path) -> None:
    make_source(tmp_path / "source", "qwen3_moe")
    refused(tmp_path / "source", "pools 5, 16 must have a common", tiers=parse_tiers("5:1,16:4"))
    refused(tmp_path / "source", "striped is for routers that keep only", pool="striped")


def test_other_options(source: Path) -> None:
    refused(source, "dtype: 'int8' must be one of auto, bfloat16, .*, fp8", dtype="int8")
    refused(source, "pool: 'round' must be 'auto' or one of prefix", pool="round")
    refused(
        source,
        "token 64 must be below vocab_size = 64",
        text=CalibrationText(torch.full((4, 8), 64), "too large"),
    )


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/config.json: no such checkpoint"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out", None)
    (tmp_path / "empty").mkdir()
    for content, message in (("{", "not valid JSON"), ("[]", "must hold a mapping")):
        (tmp_path / "empty" / "config.json").write_text(content)
        refused(tmp_path / "empty", message)


def test_a_full_folder_is_never_touched(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    with pytest.raises(ValueError, match="out: exists and is not empty"):
        convert_checkpoint(source, out, text())
    assert (out / "config.json").read_text() == "mine"


def test_the_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["convert", str(source), out]) == 2
    assert "no tokenizer there" in capsys.readouterr().err
    for argv, named in (
        ([str(tmp_path / "nowhere"), out, "--keep-order"], "nowhere"),
        ([str(source), str(source), "--keep-order"], "OUT"),
        ([str(source), out, "--keep-order", "--tiers", "6:2,16:4"], "multiple of 4"),
        ([str(source), out, "--keep-order", "--text", "a.txt"], "--text has no use"),
        ([str(source), out, "--tokens", "3"], "--tokens"),
        ([str(source), out, "--pool", "round"], "--pool"),
    ):
        assert main(["convert", *argv]) == 2
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(source), out, "--keep-order"]) == 0
    assert "top" in capsys.readouterr().out
    assert DvpaForCausalLM.from_pretrained(out).config.tier_names == ["base", "middle", "top"]


def test_kill_minus_9_leaves_nothing_that_looks_complete(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "out", ShardWriter.write
    child = os.fork()
    if child == 0:
        left = iter(range(90))

        def write_or_die(self: ShardWriter, name: str, tensor: Tensor) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, name, tensor)

        signal.alarm(60)
        torch.set_num_threads(1)  # a forked process has none of its parent's
        monkeypatch.setattr(ShardWriter, "write", write_or_die)
        convert_checkpoint(source, out, None, shard_bytes=30_000)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / "out.incomplete").is_dir()
    convert_checkpoint(source, out, None)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    DvpaForCausalLM.from_pretrained(out)


def test_one_layer_in_memory_at_a_time(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of the layer that is running no layer has weights; nor has embedding or head."""
    run, seen = LayerStream.run, []

    def watching(self: LayerStream, layer: Any, *args: Any, **kwargs: Any) -> None:
        loaded = {
            name.split(".")[2]
            for name, tensor in self.model.named_parameters()
            if tensor.device.type != "meta" and "layers" in name
        }
        others = [
            name
            for name, tensor in self.model.named_parameters()
            if tensor.device.type != "meta" and "layers" not in name
        ]
        assert others == []
        seen.append(loaded)
        run(self, layer, *args, **kwargs)

    monkeypatch.setattr(LayerStream, "run", watching)
    convert_checkpoint(source, source.parent / "out", text())
    assert all(len(loaded) == 1 for loaded in seen)
    assert {next(iter(loaded)) for loaded in seen} == {"0", "1", "2"}


MEASURED = """
import sys, threading
from pathlib import Path
import torch
from dvpa.checkpoint import ShardWriter, convert_checkpoint
from dvpa.checkpoint.calibration_text import CalibrationText


def anonymous():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())


torch.set_num_threads(1)
ids = torch.randint(3, 64, (4, 16))
done, peak = threading.Event(), [0]
convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[3]), CalibrationText(ids, "warm-up"))
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
convert_checkpoint(Path(sys.argv[2]), Path(sys.argv[4]), CalibrationText(ids, "measured"))
done.set()
print(peak[0] - before)
"""


@pytest.mark.slow
def test_memory_follows_the_layer_not_the_model(source: Path, tmp_path: Path) -> None:
    """Twelve layers of 25 MB: 300 MB on the disk, hardly more than two layers in memory."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 512, "num_hidden_layers": 13}
    make_source(tmp_path / "large", **sizes)
    layer = 16 * 3 * 256 * 512 * 4
    argv = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "large")]
    argv += [str(tmp_path / "one"), str(tmp_path / "two")]
    # Freed at once: of arrays this small the C library would keep some for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # A layer's stack, the tensor just read, and what the allocator keeps.
    assert int(done.stdout) < 2.5 * layer

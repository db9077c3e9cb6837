"""The engine over FP8 checkpoints: the numbers of the dequantised one, read band by band."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_world import (
    EXPERT,
    KV,
    MISFITS,
    QUANTIZATION,
    SCALE,
    by_hand,
    edit_config,
    make_fp8_source,
    quantise_folder,
    rewrite,
    same,
    write_shards,
)
from helpers import mtp_model
from hypothesis import given
from hypothesis import strategies as st
from residency_world import MEASURE_RSS, large_config, run_alone
from source_world import read_folder, text

from dvpa.checkpoint import ShardReader, ShardWriter, TensorInfo, convert_checkpoint
from dvpa.checkpoint.fp8 import CODES, dequantise, scale_shape
from dvpa.checkpoint.number_format import stored_as
from dvpa.checkpoint.pools import parse_tiers
from dvpa.checkpoint.shards import DTYPES
from dvpa.config import DvpaConfig
from dvpa.engine import Engine, SamplingParams, fp8_bands
from dvpa.engine.fp8_bands import bands, read_bands
from dvpa.engine.residency import _group_bytes, load_resident
from dvpa.engine.weights import WeightFiles, other_bytes
from dvpa.model import DvpaForCausalLM
from dvpa.model.tensor_names import tensor_shapes

PLENTY = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours in FP8, its base pool half of the experts; beside it `plain` in bf16.

    About three tensors in a shard.
    """
    source = make_fp8_source(tmp_path_factory.mktemp("fp8") / "source")
    for name, dtype in (("dvpa", "auto"), ("plain", "bfloat16")):
        out = source.parent / name
        options: dict[str, Any] = {"tiers": parse_tiers("4:1,8:2"), "pool": "prefix"}
        convert_checkpoint(source, out, text(), dtype=dtype, shard_bytes=70_000, **options)
    return source.parent / "dvpa"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    (tmp_path / "dvpa").mkdir()
    for path in folder.iterdir():
        (tmp_path / "dvpa" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "dvpa"


@given(
    rows=st.integers(0, 400), columns=st.integers(1, 900), most=st.sampled_from([128, 300, 32768])
)
def test_bands_cover_a_matrix_in_order(rows: int, columns: int, most: int) -> None:
    """Each lies in the file in one piece, and its scales are its own."""
    expected = 0
    for high, wide in bands(rows, columns, most):
        height, width = high.stop - high.start, wide.stop - wide.start
        assert 0 < height * width <= most
        assert high.start * columns + wide.start == expected
        expected += height * width
        assert width == columns or (height == 1 and wide.start % 128 == 0)
        whole = high.start % 128 == 0 and (high.stop % 128 == 0 or high.stop == rows)
        assert whole or high.start // 128 == (high.stop - 1) // 128
    assert expected == rows * columns


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 400),
    most=st.sampled_from([128, 1000, 20_000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_bands_are_the_whole(
    rows: int, columns: int, most: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 126, (rows, columns), generator=generator, dtype=torch.uint8)
    codes = codes.view(torch.float8_e4m3fn)
    scale_inv = torch.rand(scale_shape((rows, columns)), generator=generator)

    def read(first: int, out: torch.Tensor) -> None:
        out.copy_(codes.view(-1)[first : first + len(out)])

    out = torch.full((rows, columns), float("nan"), dtype=dtype)
    read_bands(read, scale_inv, out, torch.empty(most, dtype=torch.uint8))
    assert same(out, dequantise(codes, scale_inv, dtype))


def test_bands_for_another_device_are_bounded_too() -> None:
    """As on a GPU, with `meta` in its place: codes go there, and are numbers only there."""
    sizes = []

    def read(first: int, out: torch.Tensor) -> None:
        sizes.append(out.numel())

    out = torch.empty(2000, 7168, dtype=torch.bfloat16, device="meta")
    scale_inv = torch.ones(scale_shape(tuple(out.shape)))
    read_bands(read, scale_inv, out, torch.empty(1 << 22, dtype=torch.uint8))
    assert sum(sizes) == out.numel()
    assert 128 * 7168 == max(sizes) <= fp8_bands.GPU_BAND


@pytest.mark.parametrize("drop_page_cache", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_weight(
    folder: Path, dtype: torch.dtype, drop_page_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read with its bytes counted, never more than a band at a time."""
    sizes = []

    def counting(codes: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(codes.numel())
        return dequantise(codes, *rest)

    monkeypatch.setattr(fp8_bands, "dequantise", counting)
    monkeypatch.setattr(fp8_bands, "CPU_BAND", 3000)
    stored, config = read_folder(folder), DvpaConfig.from_pretrained(folder)
    weights = WeightFiles(folder, config, drop_page_cache=drop_page_cache)
    names = [name for name in stored if not name.endswith(SCALE)]
    assert weights.count_fp8(config) == len(stored) - len(names) > 30
    for name in names:
        out = torch.full(stored[name].shape, float("nan"), dtype=dtype)
        num_bytes = weights.read_into(name, out)
        scale_inv = stored.get(name + SCALE)
        if scale_inv is None:
            assert same(out, stored[name].to(dtype)), name
            assert num_bytes == stored[name].nbytes
        else:
            assert same(out, dequantise(stored[name], scale_inv, dtype)), name
            assert num_bytes == stored[name].nbytes + scale_inv.nbytes
    weights.close()
    assert 0 < max(sizes) <= 3000


def test_several_threads(folder: Path) -> None:
    stored, config = read_folder(folder), DvpaConfig.from_pretrained(folder)
    weights, wrong = WeightFiles(folder, config), []
    names = [name for name in stored if name + SCALE in stored]

    def read(seed: int) -> None:
        draws = random.Random(seed)
        for name in draws.choices(names, k=60):
            out = torch.empty(stored[name].shape, dtype=torch.bfloat16)
            weights.read_into(name, out)
            if not torch.equal(out, by_hand(stored[name], stored[name + SCALE])):
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    weights.close()
    assert not wrong


COUNT_THREADS = """
import os
import threading
import torch
from dvpa.engine.fp8_bands import read_bands
from dvpa.fp8 import scale_shape

torch.set_num_threads(2)
found = []

def read():
    found.append(len(os.listdir("/proc/self/task")))
    for shape in ((256, 2048), (256, 7168), (3, 40000)):
        out = torch.empty(shape, dtype=torch.bfloat16)
        buffer = torch.empty(1 << 16, dtype=torch.uint8)
        read_bands(lambda first, codes: None, torch.ones(scale_shape(shape)), out, buffer)
    found.append(len(os.listdir("/proc/self/task")))

thread = threading.Thread(target=read)
thread.start()
thread.join()
assert found[0] == found[1], found
"""


def test_a_reader_starts_no_threads_of_its_own() -> None:
    """They would compete with those of the step; PyTorch shares out 32768 numbers and more."""
    run_alone(COUNT_THREADS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_onto_a_gpu(folder: Path) -> None:
    stored, config = read_folder(folder), DvpaConfig.from_pretrained(folder)
    weights = WeightFiles(folder, config, "cuda")
    for name in stored:
        if name + SCALE in stored:
            out = torch.empty(stored[name].shape, dtype=torch.bfloat16, device="cuda")
            weights.read_into(name, out)
            assert same(out.cpu(), by_hand(stored[name], stored[name + SCALE])), name
    weights.close()


def least_bytes(folder: Path, extra_groups: int = 0) -> int:
    """The smallest bound that is accepted, and some groups more."""
    config, dtype = DvpaConfig.from_pretrained(folder), torch.bfloat16
    groups = config.num_units + extra_groups  # of the one MoE layer
    return other_bytes(config, dtype) + groups * _group_bytes(config, dtype)


@pytest.mark.parametrize("extra_groups", [None, 0])
def test_answers_are_those_of_the_bf16_checkpoint(
    folder: Path, extra_groups: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    draws = random.Random(0)
    prompts = [[draws.randrange(3, 64) for _ in range(draws.randrange(1, 20))] for _ in range(8)]
    params = [
        SamplingParams(max_tokens=6, temperature=0, tier=draws.choice([0, 1]), ignore_eos=True)
        for _ in prompts
    ]
    bound = None if extra_groups is None else least_bytes(folder, extra_groups)
    answers, stats = [], []
    for name in ("dvpa", "plain"):
        engine = Engine(folder.parent / name, max_resident_bytes=bound)
        assert engine.model.dtype == torch.bfloat16
        answers.append([out.token_ids for out in engine.generate(prompts, params)])
        stats.append(engine.store.stats if engine.store is not None else None)
        engine.close()
    assert answers[0] == answers[1]
    said = [record.getMessage() for record in caplog.records if "dequantised" in record.msg]
    assert len(said) == 1
    assert said[0].startswith(f"{folder}: 40 weights dequantised from FP8 to bfloat16")
    if stats[0] is not None and stats[1] is not None:
        assert stats[0].resident_bytes == stats[1].resident_bytes <= (bound or 0)
        assert stats[0].group_loads == stats[1].group_loads > 0
        reader = ShardReader(folder)
        config = DvpaConfig.from_pretrained(folder)
        group = [
            info.num_bytes
            for name, info in reader.tensors.items()
            if any(f".experts.{config.n_routed_experts - 1 - i}." in name for i in range(4))
        ]
        per_group = sum(group) * config.unit_size // 4
        assert stats[0].bytes_read == stats[0].group_loads * per_group


@pytest.mark.parametrize("bound", [None, PLENTY])
def test_a_head_decides_and_a_module_stays_on_the_disk(
    bound: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The module for multi-token prediction, FP8 too, is neither loaded nor missed."""
    mtp_model(tie_word_embeddings=True).save_pretrained(tmp_path / "made")
    quantise_folder(tmp_path / "made", tmp_path / "fp8")
    DvpaForCausalLM.from_pretrained(tmp_path / "fp8").save_pretrained(tmp_path / "plain")
    caplog.clear()
    prompts = [[5, 6, 7], [9, 8, 7, 6], [11]]
    answers = []
    for name in ("fp8", "plain"):
        engine = Engine(tmp_path / name, max_resident_bytes=bound)
        params = SamplingParams(max_tokens=5, temperature=0, tier="auto", ignore_eos=True)
        outs = engine.generate(prompts, params)
        answers.append([(out.token_ids, out.telemetry.difficulty) for out in outs])
        engine.close()
    assert answers[0] == answers[1]
    said = [record.args for record in caplog.records if "dequantised" in record.msg]
    stored = read_folder(tmp_path / "fp8")
    count = sum(name.endswith(SCALE) for name in stored)
    skipped = sum(name.endswith(SCALE) and ".layers.3." in name for name in stored)
    assert skipped > 40
    assert [each[1] for each in said if each] == [count - skipped]


def test_resident_memory_stays_below_the_bound(tmp_path: Path) -> None:
    """64M parameters in FP8, run in fp32 in a process of its own: a quarter may stay."""
    config, plan = large_config(), {}
    for name, shape in tensor_shapes(config).items():
        plan |= stored_as(name, name, TensorInfo("F32", shape), "fp8")
    with ShardWriter(tmp_path, plan, 20_000_000) as writer:
        for name, info in plan.items():
            if info.dtype == CODES:  # 2^-6 .. 1.875, of both signs
                codes = torch.randint(0, 0x40, info.shape, dtype=torch.uint8)
                codes |= torch.randint(0, 2, info.shape, dtype=torch.uint8) << 7
                writer.write(name, codes.view(torch.float8_e4m3fn))
            else:
                writer.write(name, torch.full(info.shape, 0.05).to(DTYPES[info.dtype]))
    config.save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config=QUANTIZATION)
    run_alone(MEASURE_RSS, tmp_path, 64 << 20, "float32")


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    **MISFITS,
    "integers": (lambda t: t.update({EXPERT: t[EXPERT].view(torch.int8)}), f"{EXPERT}: dtype I8"),
    "a router": (
        lambda t: t.update(
            {
                "model.layers.1.mlp.gate.weight": torch.zeros(8, 160).to(torch.float8_e4m3fn),
                f"model.layers.1.mlp.gate.weight{SCALE}": torch.ones(1, 2),
            }
        ),
        r"gate\.weight: FP8, in which a router is never stored",
    ),
    "scales of nothing": (
        lambda t: t.update({f"lm_head.weight{SCALE}": torch.ones(1, 2)}),
        f"lm_head.weight{SCALE}: unknown tensor",
    ),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_what_does_not_fit_is_named(kind: str, copy: Path) -> None:
    change, message = DAMAGE[kind]
    rewrite(copy, change)
    with pytest.raises(ValueError, match=message):
        load_resident(copy, dtype=torch.bfloat16, max_resident_bytes=PLENTY)


def test_undeclared_fp8_is_refused(copy: Path) -> None:
    edit_config(copy, quantization_config=None)
    for bound in (None, PLENTY):
        with pytest.raises(ValueError, match=r"FP8, but config\.json says nothing of it"):
            Engine(copy, max_resident_bytes=bound)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_shard_with_scales_that_cannot_be_read(
    folder: Path, copy: Path, damage: Callable[[Path], object]
) -> None:
    """Of an upper expert it costs that expert; of anything else it is refused."""
    tensors = read_folder(folder)
    index = {name: f"{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    index[EXPERT + SCALE] = "upper.safetensors"
    index[KV + SCALE] = "other.safetensors"
    write_shards(copy, tensors, index)
    damage(copy / "upper.safetensors")
    weights = WeightFiles(copy, DvpaConfig.from_pretrained(copy))
    with pytest.raises(ValueError, match=r"upper\.safetensors"):
        weights.read_into(EXPERT, torch.empty(144, 160))
    weights.read_into(EXPERT.replace(".6.", ".7."), torch.empty(144, 160))
    weights.close()
    damage(copy / "other.safetensors")
    with pytest.raises(ValueError, match=rf"{KV}: .*other\.safetensors"):
        WeightFiles(copy, DvpaConfig.from_pretrained(copy))


def test_a_shard_that_changes_while_serving(copy: Path) -> None:
    weights = WeightFiles(copy, DvpaConfig.from_pretrained(copy))
    path, _ = ShardReader(copy).locate(EXPERT)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{path.name}: {EXPERT}.*: the file has changed"):
        weights.read_into(EXPERT, torch.empty(144, 160))
    weights.close()

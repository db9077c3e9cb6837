"""Packed rows: every token once, documents apart, one order for any number of processes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from dvpa.config import load_model_config
from dvpa.tasks import train_tokenizer
from dvpa_train.batches import IGNORED, assign_tiers, collate
from dvpa_train.config import Recipe, StageConfig, load_recipe
from dvpa_train.examples import make_source
from dvpa_train.main import run_recipe
from dvpa_train.mixture import Mixture
from dvpa_train.packed import PackedDataset, PackedRow
from dvpa_train.packed_source import PackedSource
from dvpa_train.permutation import Permutation
from dvpa_train.prepare import PrepareOptions, prepare
from dvpa_train.token_shards import MANIFEST, Manifest, TokenShardWriter
from dvpa_train.tokenizer_files import check_tokenizer, load_tokenizer

GOLDEN_ORDER = [78, 469, 91, 110, 454, 346]  # of 1000, key (0, 0)
GOLDEN_PATTERN = [0, 1, 0, 2, 0, 1, 0, 2, 1, 0]
Documents = list[list[int]]
documents_of = st.lists(
    st.lists(st.integers(3, 63), min_size=1, max_size=30), min_size=1, max_size=12
)


def _write(folder: Path, documents: Documents, shard_tokens: int) -> Path:
    """A prepared folder of given ids."""
    folder.mkdir(parents=True)
    writer = TokenShardWriter(folder, "uint16", shard_tokens)
    for document in documents:
        writer.add(document)
    writer.close()
    total = sum(map(len, documents))
    shards = tuple(writer.shards)
    manifest = Manifest(
        "uint16", 64, None, None, "hash", total, len(documents), {}, shards, sources=()
    )
    (folder / MANIFEST).write_text(json.dumps(manifest.to_dict()))
    return folder


def _naive(documents: Documents, length: int) -> list[dict[str, list[int]]]:
    """The windows, token by token."""
    tokens = [(i, place, t) for i, ids in enumerate(documents) for place, t in enumerate(ids)]
    windows = []
    for start in range(0, len(tokens), length):
        row: dict[str, list[int]] = {"ids": [], "labels": [], "positions": []}
        for number in range(start, min(start + length, len(tokens))):
            document, _, token = tokens[number]
            row["ids"].append(token)
            following = tokens[number + 1] if number + 1 < len(tokens) else (None, 0, 0)
            row["labels"].append(following[2] if following[0] == document else IGNORED)
            first = next(n for n in range(start, number + 1) if tokens[n][0] == document)
            row["positions"].append(number - first)
        windows.append(row)
    return windows


@given(documents=documents_of, shard=st.integers(1, 60), length=st.integers(1, 40))
def test_windows_equal_the_definition(
    tmp_path_factory: pytest.TempPathFactory, documents: Documents, shard: int, length: int
) -> None:
    folder = _write(tmp_path_factory.mktemp("packed") / "x", documents, shard)
    dataset = PackedDataset(folder, length, seed=3)
    expected = _naive(documents, length)
    assert len(dataset) == len(expected)
    for number, row in enumerate(expected):
        window = dataset.window(number)
        assert window.input_ids.tolist() == row["ids"]
        assert window.labels.tolist() == row["labels"]
        assert window.position_ids.tolist() == row["positions"]
    for epoch in range(2):  # every window, so every token, once
        order = dataset.order(epoch * len(dataset), (epoch + 1) * len(dataset))
        assert sorted(order.tolist()) == list(range(len(dataset)))


@given(size=st.integers(1, 3000), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_the_order_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    permutation = Permutation(size, (seed, epoch))
    whole = permutation(np.arange(size))
    assert sorted(whole.tolist()) == list(range(size))
    assert permutation([size // 2])[0] == whole[size // 2]  # no state


def test_orders_differ_by_seed_and_epoch_and_look_random() -> None:
    size = 10_000
    orders = [Permutation(size, key)(np.arange(size)) for key in ((0, 0), (0, 1), (1, 0))]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (orders[first] == orders[second]).mean() < 0.002
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
        assert (np.abs(np.diff(order)) == 1).mean() < 0.002
    large = Permutation(10**12, (0, 0))(np.arange(5))  # no memory
    assert len(set(large.tolist())) == 5
    assert large.max() > 10**10


def test_the_order_never_changes_between_versions() -> None:
    """A run that resumes under a later version must go on in the same order."""
    assert Permutation(1000, (0, 0))(np.arange(6)).tolist() == GOLDEN_ORDER
    pattern = Mixture([0.5, 0.3, 0.2]).pattern.tolist()
    assert pattern == GOLDEN_PATTERN


def test_numbers_outside_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size: 0"):
        Permutation(0, (0,))
    with pytest.raises(ValueError, match=r"0 \.\. 4"):
        Permutation(5, (0,))([5])
    dataset = PackedDataset(_write(tmp_path / "x", [[5, 6, 7]], 10), 2)
    with pytest.raises(IndexError, match="window 2"):
        dataset.window(2)
    with pytest.raises(ValueError, match="sequence_length: 0"):
        PackedDataset(tmp_path / "x", 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_gives_every_document_the_logits_it_has_alone(
    tmp_path: Path, attention: str
) -> None:
    documents = [[5, 9, 11, 8], [7], [20, 21, 22, 23, 24, 25, 26], [30, 31], [32], [33, 34, 35]]
    dataset = PackedDataset(_write(tmp_path / "x", documents, 9), 32)
    model = tiny_model()
    model.set_attn_implementation(attention)
    batch = collate([dataset.window(0), dataset.window(0)], pad_id=0, prompt_loss=False)
    for tier in range(3):
        with torch.no_grad():
            packed = model(
                batch["input_ids"], position_ids=batch["position_ids"], tiers=tier, use_cache=False
            ).logits
            mixed = model(batch["input_ids"], tiers=tier, use_cache=False).logits
            start = 0
            for document in documents:
                alone = model(torch.tensor([document]), tiers=tier, use_cache=False).logits[0]
                for row in range(2):
                    torch.testing.assert_close(
                        packed[row, start : start + len(document)], alone, atol=1e-5, rtol=1e-5
                    )
                start += len(document)
        # Without positions the documents do see each other: the test can fail.
        assert not torch.allclose(mixed[0, 4:], packed[0, 4:], atol=1e-2)


def test_gradients_of_a_packed_row_are_the_documents_own(tmp_path: Path) -> None:
    documents = [[5, 9, 11, 8], [20, 21, 22, 23, 24, 25, 26], [33, 34, 35]]
    dataset = PackedDataset(_write(tmp_path / "x", documents, 100), 14)
    model = tiny_model()
    batch = collate([dataset.window(0)], pad_id=0, prompt_loss=False)

    def gradient(losses: list[torch.Tensor]) -> torch.Tensor:
        model.zero_grad()
        sum(losses, torch.zeros(())).backward()  # type: ignore[no-untyped-call]
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    out = model(
        batch["input_ids"], position_ids=batch["position_ids"], tiers=2, use_cache=False
    ).logits
    packed = gradient([F.cross_entropy(out[0], batch["labels"][0], reduction="sum")])
    alone = []
    for document in documents:
        logits = model(torch.tensor([document]), tiers=2, use_cache=False).logits[0]
        alone.append(F.cross_entropy(logits[:-1], torch.tensor(document[1:]), reduction="sum"))
    torch.testing.assert_close(packed, gradient(alone), atol=1e-5, rtol=1e-4)


def test_short_last_windows_are_padded_without_a_tier(tmp_path: Path) -> None:
    dataset = PackedDataset(_write(tmp_path / "x", [[5, 6, 7, 8, 9], [10, 11]], 100), 5)
    batch = collate([dataset.window(0), dataset.window(1)], pad_id=3, prompt_loss=False)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [10, 11, 3, 3, 3]]
    x = IGNORED
    assert batch["labels"].tolist() == [[6, 7, 8, 9, x], [11, x, x, x, x]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    stage = StageConfig("s", "joint", 3, 1, distillation=0.5)
    rows = assign_tiers(batch, stage, 0, 0)
    assert rows.position_ids is not None
    assert rows.position_ids.shape == rows.input_ids.shape == (4, 5)
    assert (rows.tiers[[1, 3], 2:] == -1).all()
    assert rows.num_tokens == 14


# A whole recipe: real text, a given tokenizer, two sources, evaluation from a file beside.


def _recipe(folder: Path, text: str, changes: tuple[str, ...] = ()) -> Recipe:
    if not (folder / "tokenizer").exists():
        lines = text.splitlines()
        cut = round(0.8 * len(lines))
        train_tokenizer((line for line in lines[:cut] if line), 320, folder / "tokenizer")
        options = PrepareOptions(unit="paragraph", shard_tokens=4000)
        for name, part in (("early", lines[: cut // 2]), ("late", lines[cut // 2 : cut])):
            (folder / f"{name}.txt").write_text("\n".join(part))
            file = str(folder / f"{name}.txt")
            prepare([file], folder / "tokenizer", folder / name, options)
        (folder / "held.txt").write_text("\n".join(lines[cut:]))
    sources = f"{{path: {folder / 'early'}, weight: 3}}, {{path: {folder / 'late'}, name: second}}"
    return load_recipe(
        "train/pico.yaml",
        [
            f"tokenizer={folder / 'tokenizer'}",
            f"data={{files: [{{path: {folder / 'held.txt'}, format: text}}]}}",
            f"data.packed={{sources: [{sources}], sequence_length: 48}}",
            "stages.joint.mixture={second: 1.0}",
            *changes,
        ],
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prepared folders, their tokenizer and a held-out file, of made-up text."""
    folder = tmp_path_factory.mktemp("prepared")
    words = ["the", "cat", "dog", "sees", "a", "red", "blue", "house", "in", "one", "two", "three"]
    draws = np.random.default_rng(0)
    lines = []
    for number in range(1200):
        lines.append(" ".join(draws.choice(words, int(draws.integers(3, 12)))))
        lines += [""] * (number % 4 == 3)
    _recipe(folder, "\n".join(lines))
    return folder


def _first_ids(rows: list[Any]) -> list[tuple[int, ...]]:
    return [tuple(row.input_ids.tolist()) for row in rows]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_any_number_of_processes_reads_the_same_order(prepared: Path, world: int) -> None:
    source = make_source(_recipe(prepared, ""))
    batch, steps = 24, 6
    alone = _first_ids(source.train_batch(0, batch * steps))
    joined = []
    for step in range(steps):
        size = batch // world
        for rank in range(world):
            # Each process opens the data itself, and starts in the middle of the run.
            start = step * batch + rank * size
            joined += _first_ids(source.train_batch(start, start + size))
    assert joined == alone
    fresh = make_source(_recipe(prepared, ""))  # resumed at a sample: no replay, no state
    assert _first_ids(fresh.train_batch(77, 101)) == alone[77:101]


def test_stages_draw_by_their_own_mixture_and_no_window_repeats(prepared: Path) -> None:
    recipe = _recipe(prepared, "")
    source: Any = make_source(recipe)
    before = sum(s.steps * s.batch_size for s in recipe.stages[:2])
    total = before + recipe.stages[2].steps * recipe.stages[2].batch_size
    sources, within = source.schedule.locate(np.arange(total))
    assert abs((sources[:before] == 0).sum() - 0.75 * before) < 1
    assert (sources[before:] == 1).all()
    for index, dataset in enumerate(source.datasets):
        windows = dataset.windows_of(within[sources == index])
        whole = len(windows) // len(dataset) * len(dataset)
        for start in range(0, whole, len(dataset)):
            epoch = windows[start : start + len(dataset)].tolist()
            assert sorted(epoch) == list(range(len(dataset)))
        assert len(set(windows[whole:].tolist())) == len(windows) - whole


def test_held_out_text_is_the_file_beside(prepared: Path) -> None:
    source = make_source(_recipe(prepared, ""))
    parts = source.held_out({"head": 50, "fit": 50, "calibrate": 50, "test": 50})
    held = (prepared / "held.txt").read_text()
    assert all(len(tasks) >= 5 for tasks in parts.values())
    for tasks in parts.values():
        assert all(task.question.splitlines()[0] in held for task in tasks)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer=", "tokenizer: packed data needs"),
        ("data.packed.sequence_length=1", "sequence_length: 1 must be in 2 .. 256"),
        ("data.packed.sequence_length=257", "sequence_length: 257 must be in 2 .. 256"),
        ("data.packed.sources=[]", "different names, not none"),
        ("data.packed.sources.1.name=early", "different names"),
        ("data.packed.sources.1.weight=0", "second: weight 0"),
        ("data.packed.sources.1.wait=0", "wait"),
        ("stages.grow.mixture={third: 1}", "third is not one of early, second"),
        ("stages.grow.mixture={early: -1}", "early: weight -1"),
        ("stages.grow.level_weights=[1, 1, 1, 1]", "only graded tasks have levels"),
        ("data.packed=null", "only packed data is mixed"),
        ("data.files=[]", "graded or files"),
    ],
)
def test_bad_recipes_are_one_error(prepared: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        _recipe(prepared, "", (override,))
    assert "\n" not in str(error.value)


def test_what_does_not_fit_the_run_is_refused(prepared: Path, tmp_path: Path) -> None:
    def run(recipe: Recipe) -> None:
        out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        run_recipe(recipe, out, Console(quiet=True))

    with pytest.raises(FileNotFoundError, match="not a prepared folder"):
        run(_recipe(prepared, "", (f"data.packed.sources.0.path={tmp_path}",)))
    with pytest.raises(FileNotFoundError, match=r"tokenizer: .*: no tokenizer\.json"):
        run(_recipe(prepared, "", (f"tokenizer={tmp_path}",)))
    train_tokenizer(["another corpus, with other pieces in it"] * 9, 290, tmp_path / "other")
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        run(_recipe(prepared, "", (f"tokenizer={tmp_path / 'other'}",)))


def test_a_tokenizer_must_fit_the_model(prepared: Path, tmp_path: Path) -> None:
    config, tokenizer = load_model_config("model/pico.yaml"), load_tokenizer(prepared / "tokenizer")
    check_tokenizer(tokenizer, config, "t")
    config.pad_token_id = 0
    with pytest.raises(ValueError, match="t: pad_token_id is 3; the model config says 0"):
        check_tokenizer(tokenizer, config, "t")
    config.vocab_size = 270
    with pytest.raises(ValueError, match="vocab_size = 270"):
        check_tokenizer(tokenizer, config, "t")


def test_a_whole_recipe_on_real_text_stopped_and_resumed(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, head, calibrate; a run that breaks off at a sample ends with the same weights."""
    path = data_folder / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip(f"no real text: {path} is missing")
    text = path.read_text()
    spoken = [line for line in text[-30_000:].splitlines() if 20 < len(line) < 60]
    pairs = zip(spoken[::2], spoken[1::2], strict=False)
    rows = [json.dumps({"question": first, "answer": second}) for first, second in pairs]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    changes = [f"data.files.0={{path: {tmp_path / 'pairs.jsonl'}, format: jsonl}}"]
    changes += ["difficulty.items=35", "calibration.items=35"]
    sizes = {"foundation": 8, "grow": 8, "joint": 4}
    changes += [f"stages.{name}.batch_size={size}" for name, size in sizes.items()]
    recipe = _recipe(tmp_path, text[:60_000], tuple(changes))
    trained = run_recipe(recipe, tmp_path / "whole", Console(quiet=True))
    assert trained.model.tier_map.is_fitted
    assert [stage.name for stage in trained.stages] == ["foundation", "grow", "joint"]
    assert trained.stages[0].tokens == 12 * 8 * 48  # full rows, no padding
    assert trained.stages[2].tokens == 12 * 4 * 48 * 2  # every row at two tiers

    read = PackedSource.train_batch
    asked: list[int] = []

    def breaks_off(self: PackedSource, start: int, stop: int, *rest: Any) -> list[PackedRow]:
        if start >= 18 * 8 + 8 * 4:  # step 8 of the last stage; its checkpoint is of step 5
            raise RuntimeError("the disk is gone")
        return read(self, start, stop, *rest)

    def watched(self: PackedSource, start: int, stop: int, *rest: Any) -> list[PackedRow]:
        asked.append(start)
        return read(self, start, stop, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(PackedSource, "train_batch", breaks_off)
        with pytest.raises(RuntimeError, match="the disk is gone"):
            run_recipe(recipe, tmp_path / "broken", Console(quiet=True))
        patch.setattr(PackedSource, "train_batch", watched)
        resumed = run_recipe(recipe, tmp_path / "broken", Console(quiet=True))
    assert min(asked) == 18 * 8 + 5 * 4  # the exact sample after the checkpoint
    first, second = (load_file(r.checkpoint / "model.safetensors") for r in (trained, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)

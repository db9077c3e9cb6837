"""Experts that cannot be read from disk: their group is lost, and nothing else is wrong."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import left_padded
from residency_world import (
    LAYERS,
    PLENTY,
    UPPER,
    assert_same,
    never_hand_over,
    page,
    random_table,
    stores,
    truncate,
    unpaged,
    upper_shard,
    wait_until,
    write_tiny,
)

from dvpa.checkpoint import ShardReader
from dvpa.engine.residency import ExpertStore, GroupUnavailable, load_resident
from dvpa.model import DvpaForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("residency"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def open_store() -> Iterator[Callable[..., ExpertStore]]:
    with stores() as make:
        yield make


@pytest.fixture(autouse=True)
def only_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    never_hand_over(monkeypatch)


def flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_header, Path.unlink])
@torch.no_grad()
def test_a_broken_shard_costs_its_group_only(
    folder: Path, copy: Path, damage: Callable[[Path], None]
) -> None:
    broken = upper_shard(copy, 2, 3)
    damage(broken)
    whole = DvpaForCausalLM.from_pretrained(folder)
    model, store = load_resident(copy, dtype=torch.float32, max_resident_bytes=PLENTY)
    batch = left_padded([9, 12])._asdict()
    with pytest.raises(GroupUnavailable, match=f"layer 2, expert group 3: .*{broken.name}") as info:
        page(model, store)(**batch, tiers=2)
    assert (info.value.layer, info.value.group) == (2, 3)
    for tier in (0, 1):
        assert_same(model(**batch, tiers=tier).logits, whole(**batch, tiers=tier).logits)
    index, weight = random_table(9, [0, 1, 2], seed=0)
    x = torch.randn(9, 32)
    assert_same(store.experts(2, x, index, weight), unpaged(whole, 2, x, index, weight))
    store.prefetch(2)  # leaves the known failure alone
    wait_until(lambda: store.stats.group_loads == LAYERS * UPPER - 1)
    assert [key for key, _ in store.stats.failed_groups] == [(2, 3)]
    assert store.stats.failed_loads == 1
    store.close()


@pytest.mark.parametrize("damage", [truncate, flip_header])
@torch.no_grad()
def test_a_shard_that_breaks_while_serving(
    copy: Path, open_store: Callable[..., ExpertStore], damage: Callable[[Path], None]
) -> None:
    store = open_store(copy, UPPER)
    path = upper_shard(copy, 1, 2)
    damage(path)
    index, weight = random_table(9, [0, 2], seed=0)
    with pytest.raises(GroupUnavailable, match=f"group 2: .*{path.name}: .*has changed since"):
        store.experts(1, torch.randn(9, 32), index, weight)
    index, weight = random_table(9, [0, 1, 3], seed=0)
    assert store.experts(1, torch.randn(9, 32), index, weight).isfinite().all()
    assert store.stats.failed_groups[0][0] == (1, 2)


def test_a_failed_read_is_tried_again(
    copy: Path, open_store: Callable[..., ExpertStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(copy, UPPER)
    index, weight = random_table(9, [0, 2], seed=0)

    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", fail)
        with pytest.raises(GroupUnavailable, match=r"group 2: .*Input/output error"):
            store.experts(1, torch.randn(9, 32), index, weight)
    store.experts(1, torch.randn(9, 32), index, weight)
    assert store.stats.failed_groups == () and store.stats.failed_loads == 1


def test_nothing_is_read_after_close(folder: Path, open_store: Callable[..., ExpertStore]) -> None:
    store = open_store(folder, UPPER)
    x = torch.randn(9, 32)
    store.experts(1, x, *random_table(9, [0, 1], seed=0))
    store.close()
    store.prefetch(2)
    store.experts(1, x, *random_table(9, [0, 1], seed=1))
    with pytest.raises(GroupUnavailable, match="group 2: the weights are closed"):
        store.experts(1, x, *random_table(9, [0, 2], seed=0))


@pytest.mark.parametrize("damage", [truncate, flip_header, Path.unlink])
def test_a_broken_base_pool_is_refused(copy: Path, damage: Callable[[Path], None]) -> None:
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    damage(ShardReader(copy).locate(name)[0])
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\..*model-.*safetensors"):
        load_resident(copy, dtype=torch.float32, max_resident_bytes=PLENTY)

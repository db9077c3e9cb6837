"""The picture of the experts' load, and the numbers in it."""

import io

import numpy as np
import pytest
from helpers import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dvpa.config import DvpaConfig, load_model_config
from dvpa_train.load_figure import load_png, load_table, relative_load


def some_load(config: DvpaConfig, layers: int, seed: int = 0) -> np.ndarray:
    """Random counts inside every tier's pool."""
    random = np.random.default_rng(seed)
    load = np.zeros((layers, config.num_tiers, config.n_routed_experts), dtype=np.int64)
    for tier in range(config.num_tiers):
        pool = config.pool_size(tier)
        load[:, tier, :pool] = random.integers(0, 50, (layers, pool))
    return load


@given(seed=st.integers(0, 100), layers=st.integers(1, 4))
def test_relative_load_has_mean_one_in_the_pool_and_nothing_outside(seed: int, layers: int) -> None:
    config = tiny_config()
    load = some_load(config, layers, seed)
    load[0, 1] = 0  # this tier has not run
    relative = relative_load(load, config)
    for tier in range(config.num_tiers):
        pool = config.pool_size(tier)
        assert np.isnan(relative[:, tier, pool:]).all()
        for layer in range(layers):
            if load[layer, tier].any():
                assert relative[layer, tier, :pool].mean() == pytest.approx(1)
            else:
                assert np.isnan(relative[layer, tier]).all()


def test_the_table_names_layers_tiers_and_groups() -> None:
    config = tiny_config()
    load = some_load(config, 2)
    table = load_table(load, config)
    assert len(table["rows"]) == 2 * (4 + 8 + 16)  # each tier's pool, in two layers
    assert sum(table["rows"]) == load.sum()
    line = dict(zip(table, next(zip(*table.values(), strict=True)), strict=True))
    assert line == {"layer": 1, "tier": "base", "group": 0, "expert": 0, "rows": load[0, 0, 0]}
    assert table["layer"][-1] == 2  # the dense layer has no experts
    assert table["group"][-1] == 3
    with_mtp = load_table(some_load(config, 3), config)
    assert with_mtp["layer"][-1] == 3  # the multi-token prediction module comes after the layers


@pytest.mark.parametrize(("model", "layers"), [("pico", 1), ("nano", 3)])
def test_the_colours_of_the_picture_are_those_of_the_load(model: str, layers: int) -> None:
    """Busy experts are red, idle ones blue, those outside the pool grey."""
    config = load_model_config(f"model/{model}.yaml")
    even = np.zeros((layers, config.num_tiers, config.n_routed_experts), dtype=np.int64)
    for tier in range(config.num_tiers):
        even[:, tier, : config.pool_size(tier)] = 10
    uneven = even.copy()
    uneven[0, -1, -1] = 1000
    pictures = [
        np.asarray(Image.open(io.BytesIO(load_png(load, config, "x"))).convert("RGB")).astype(int)
        for load in (even, uneven)
    ]
    assert pictures[0].shape[1] == pictures[1].shape[1] == 990
    red, blue = [], []
    for picture in pictures:
        inside = picture[:, :880]  # without the scale of colours
        red.append(int((inside[..., 0] - inside[..., 2] > 60).sum()))
        blue.append(int((inside[..., 2] - inside[..., 0] > 60).sum()))
    assert red[0] == blue[0] == 0
    assert red[1] > 0
    assert blue[1] > red[1]  # all the others of that tier
    grey = (abs(pictures[0] - np.array([0xE4, 0xE6, 0xE9])).max(-1) <= 2).sum()
    assert grey > 1000

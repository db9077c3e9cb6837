"""Selective answering: how wrong the answers are that a router is surest of."""

from typing import Any

import numpy as np
import numpy.typing as npt


def risk_coverage(
    confidence: npt.ArrayLike, quality: npt.ArrayLike, points: int = 20
) -> dict[str, Any]:
    """Risk (1 - mean quality) among the surest share of requests, at `points` shares up to 1.

    confidence, quality: [N]. `aurc`: mean risk over every share (El-Yaniv, Wiener 2010); equal
    confidences count as in random order. `aurc_oracle`: of the order that knows the quality.
    ValueError without requests.
    """
    sure, good = np.asarray(confidence, dtype=float), np.asarray(quality, dtype=float)
    if sure.shape != good.shape or sure.ndim != 1 or not sure.size:
        raise ValueError(f"confidence and quality must be [N >= 1], got {sure.shape}, {good.shape}")
    _, run = np.unique(-sure, return_inverse=True)  # surest first; equal ones share their mean
    expected = (np.bincount(run, weights=good) / np.bincount(run))[run]
    counts = np.arange(1, len(good) + 1)
    risk = 1 - np.cumsum(expected[np.argsort(run, kind="stable")]) / counts
    best = 1 - np.cumsum(np.sort(good)[::-1]) / counts
    at = np.maximum(np.round(np.linspace(1 / points, 1, points) * len(good)).astype(int), 1)
    return {
        "coverage": (at / len(good)).tolist(),
        "risk": risk[at - 1].tolist(),
        "aurc": float(risk.mean()),
        "aurc_oracle": float(best.mean()),
    }

"""A made-up graph of six classes, for tests of what is trained on its nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_graph(path: Path, nodes: Sequence[int] = (12,) * 6) -> Path:
    """So many nodes of each class, with features and edges that tell the classes apart, some better than others."""
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(len(nodes)), nodes)
    telling = (np.arange(24) // 4 == labels[:, None]) * 0.12 * labels[:, None]
    features = rng.random((len(labels), 24)) < 0.2 + telling
    np.savez(
        path,
        edge_index=rng.integers(0, len(labels), (2, 40)),
        feat_indptr=np.concatenate([[0], features.sum(1).cumsum()]),
        feat_indices=features.nonzero()[1],
        feat_data=np.ones(features.sum(), np.float32),
        feat_shape=np.array(features.shape),
        labels=labels,
        train_classes=[0, 1], val_classes=[2, 3], test_classes=[4, 5],
    )  # fmt: skip
    return path

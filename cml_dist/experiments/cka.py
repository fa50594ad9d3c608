"""Centred kernel alignment with a linear kernel: how alike two sets of features of the same examples are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LEAST = 4
"""Examples of a minibatch that the unbiased estimate needs."""


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """The unbiased estimate of the Hilbert-Schmidt independence criterion of two Gram matrices ``[n, n]``, a scalar.

    It may be negative. n is 4 or more.

    Source: Song et al., JMLR 13 (2012), eq. 5; Nguyen et al. (2010.15327), eq. 3.
    """
    n = len(k)
    k, l = (gram - gram.diag().diag() for gram in (k, l))  # noqa: E741
    whole = k.sum() * l.sum() / ((n - 1) * (n - 2))
    return ((k * l).sum() + whole - 2 / (n - 2) * (k.sum(0) @ l.sum(0))) / (n * (n - 3))


def terms(x: Tensor, y: Tensor) -> Tensor:
    """What a minibatch adds to :func:`cka`: HSIC of x with y, x with x, and y with y; ``[3]`` float64.

    Args:
        x, y: ``[n, ...]`` features of the same n examples.
    """
    k, l = (flat @ flat.T for flat in (features.flatten(1).double() for features in (x, y)))  # noqa: E741
    return torch.stack([hsic(k, l), hsic(k, k), hsic(l, l)])


def cka(parts: np.ndarray) -> np.ndarray:
    """CKA over minibatches, ``[...]``, from their :func:`terms` ``[minibatches, ..., 3]``: sums first, then one ratio.

    1 for features that are alike up to rotation and scale; about 0 for independent ones; NaN where features of one side
    do not vary.

    Source: Nguyen, Raghu, Kornblith (ICLR 2021, 2010.15327), eq. 2.
    """
    both, ours, theirs = np.moveaxis(parts.sum(0), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return both / np.sqrt(np.where((ours > 0) & (theirs > 0), ours * theirs, np.nan))

"""Few-shot episodes of the nodes of one graph: classification with cross-entropy and accuracy.

Support and query are node ids until :meth:`GraphNodesDomain.prepare` puts what they see of the graph beside them, so
that workers hand over nothing but ids. Transductive: edges between support, query and all other nodes stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cml_dist.config.schema import GraphNodesConfig
from cml_dist.data import sampling
from cml_dist.data.base import SPLITS, ClassificationDomain, Progress, episode_rng
from cml_dist.data.class_splits import class_split, num_class_splits
from cml_dist.data.graph_files import Graph, Rows, read_graph
from cml_dist.errors import ConfigError, DataError
from cml_dist.types import Batch, Episode

MASKED_STEPS, MASKED_UNITS = 32, 64
"""Of dropout: inner steps with masks of their own, after which they begin again, and hidden units that it can reach."""

DENSE = 1 / 3
"""The part of entries from which on a matrix takes less memory in full."""


class GraphNodesDomain(ClassificationDomain):
    """N-way K-shot episodes over the classes of a graph's nodes; the graph is at ``settings.root``.

    Nodes that a class lends to support are never its query. Labels are ``0..ways-1`` in the order in which the classes
    were drawn; support and query are ordered class by class.

    Args:
        seeds: of each split.

    Raises:
        DataError: the file is missing or no sound graph. ConfigError: it has no such split of its classes.
    """

    def __init__(
        self, settings: GraphNodesConfig, seeds: Mapping[str, int], processes: int = 1, progress: Progress | None = None
    ) -> None:
        self.settings, self.graph, self._seeds = settings, read_graph(settings.root), seeds
        self.input_shape = (self.graph.features.width,)
        self.output_dim, self.chance = settings.ways, 1 / settings.ways
        self.splits, short = _split_classes(settings, self.graph), []
        self._nodes: dict[str, list[np.ndarray]] = {}
        for split, classes in self.splits.items():
            nodes = {c: np.flatnonzero(self.graph.labels == c) for c in classes}
            enough = {c: ids for c, ids in nodes.items() if len(ids) >= settings.shots + self._queries(split)}
            self._nodes[split] = list(enough.values())
            named = ((self.graph.class_names[c], len(nodes[c])) for c in classes if c not in enough)
            short += [f"{name} ({split}) has {count}" for name, count in named]
        self.remarks = (
            *self.graph.notes,
            *([f"Classes with too few nodes for an episode are left out: {', '.join(short)}"] if short else []),
        )
        self._degrees = np.diff(self.graph.edges.indptr) + 1.0  # each node sees itself
        self._features: dict[tuple[torch.device, torch.dtype], _OnDevice] = {}

    def _queries(self, split: str) -> int:
        """Query nodes a class."""
        other = split != "train" and self.settings.eval_queries is not None
        return self.settings.eval_queries if other else self.settings.queries

    def check_splits(self, splits: Collection[str]) -> None:
        """Raises DataError where a split has too few classes of enough nodes."""
        for split in splits:
            if (count := len(self._nodes[split])) < self.settings.ways:
                each = self.settings.shots + self._queries(split)
                raise DataError(
                    f"domain.ways is {self.settings.ways}, but split {split!r} of {self.settings.root} has {count} of "
                    f"{len(self.splits[split])} classes with the {each} nodes that an episode takes of each",
                    "lower domain.ways, shots or queries, or choose another domain.split or split_sizes",
                )

    # ------------------------------------------------------------------ episodes

    def episode(self, split: str, index: int) -> Episode:
        ways, shots, rng = self.settings.ways, self.settings.shots, episode_rng(self._seeds[split], split, index)
        sizes = np.array([len(ids) for ids in self._nodes[split]])
        classes, drawn = sampling.draw(rng, sizes, ways, shots + self._queries(split))
        nodes = np.stack([self._nodes[split][c][numbers] for c, numbers in zip(classes, drawn, strict=True)])
        batches = []
        for part in (nodes[:, :shots], nodes[:, shots:]):
            labels = torch.arange(ways).repeat_interleave(part.shape[1])
            batches.append(Batch(torch.from_numpy(part.reshape(-1)), labels))
        return Episode(*batches, split, index, ways=ways)

    def prepare(self, episode: Episode, device: torch.device, dtype: torch.dtype) -> Episode:
        drawn = episode_rng(self._seeds[episode.split], episode.split, episode.index).spawn(3)
        pairs = zip((episode.support, episode.query), drawn[:2], strict=True)
        support, query = (self._seen(batch, rng, device, dtype) for batch, rng in pairs)
        if episode.split == "train" and (rate := self.settings.dropout):
            shape = (MASKED_STEPS, support.inputs.shape[1], MASKED_UNITS)
            keep = torch.from_numpy((drawn[2].random(shape, np.float32) >= rate).astype(np.float32) / (1 - rate))
            support = replace(support, by_step={"keep": keep.to(device)})
        return replace(episode, support=support, query=query)

    def _seen(self, batch: Batch, rng: np.random.Generator, device: torch.device, dtype: torch.dtype) -> Batch:
        """Nodes with what they see of the graph, as :class:`cml_dist.nets.gcn.GCN` reads it."""
        nodes = batch.inputs.numpy()
        near, inputs = self._neighbourhood(nodes)
        features = self._on_device(device, dtype).rows(near)
        inputs = torch.from_numpy(inputs).to(device, dtype)
        return Batch(inputs, batch.targets.to(device), {"features": features})

    def _neighbourhood(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ``[M]`` nodes that some see, themselves too, ascending, and the ``[N, M]`` entries of the adjacency."""
        places, owner = self.graph.edges.places(nodes)
        others = np.concatenate([nodes, self.graph.edges.indices[places]])
        row = np.concatenate([np.arange(len(nodes)), owner])
        near, column = np.unique(others, return_inverse=True)
        inputs = np.zeros((len(nodes), len(near)))
        inputs[row, column] = self._weights(nodes[row], others, self._degrees)
        return near, inputs

    def _weights(self, rows: np.ndarray, columns: np.ndarray, degrees: np.ndarray) -> np.ndarray:
        """Entries of the normalised adjacency, whose ``degrees`` count the node itself."""
        if self.settings.adjacency == "row":
            return 1 / degrees[rows]
        return 1 / np.sqrt(degrees[rows] * degrees[columns])

    # ------------------------------------------------------------------ features

    def _on_device(self, device: torch.device, dtype: torch.dtype) -> _OnDevice:
        """The features that the network reads, A X, made and moved when they are first asked for."""
        if (device, dtype) not in self._features:
            self._features[device, dtype] = _OnDevice(self._propagated(), device, dtype)
        return self._features[device, dtype]

    def _propagated(self) -> Tensor:
        """A X in float64, in full or sparse: nothing that is learned is in it."""
        edges, count = self.graph.edges, self.graph.num_nodes
        rows = np.concatenate([np.repeat(np.arange(count), np.diff(edges.indptr)), np.arange(count)])
        columns = np.concatenate([edges.indices, np.arange(count)])
        weights = self._weights(rows, columns, self._degrees)
        adjacency = _sparse(rows, columns, weights, (count, count))
        with warnings.catch_warnings():  # the product of two sparse matrices uses a form "in beta state"
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse.mm(adjacency, _as_tensor(self.graph.features))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_features": {}}

    # ------------------------------------------------------------------ what is said

    def fingerprint(self) -> str:
        return self.graph.fingerprint()

    def describe(self) -> dict[str, Any]:
        graph = self.graph
        return {
            "graph": f"{self.settings.root}: {graph.num_nodes:,} nodes, {graph.num_edges:,} edges, "
            f"{graph.features.width:,} features",
            "classes": {split: [graph.class_names[c] for c in classes] for split, classes in self.splits.items()},
            "input_shape": list(self.input_shape),
        }


class _OnDevice:
    """A matrix on a device, whose rows are asked for in full."""

    def __init__(self, matrix: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self._dense, self._width = None, matrix.shape[1]
        if matrix.is_sparse and matrix._nnz() > DENSE * matrix.numel():
            matrix = matrix.to_dense()
        if not matrix.is_sparse:
            self._dense = matrix.to(device, dtype)
            return
        matrix = matrix.coalesce()
        row, column = matrix.indices()
        starts = torch.searchsorted(row, torch.arange(matrix.shape[0] + 1)).numpy()
        self._rows = Rows(starts, np.empty(0), np.empty(0), self._width)
        self._columns, self._values = column.to(device), matrix.values().to(device, dtype)

    def rows(self, ids: np.ndarray) -> Tensor:
        """``[M, width]`` of row numbers ``[M]``."""
        if self._dense is not None:
            return self._dense[torch.from_numpy(ids).to(self._dense.device)]
        places, owner = (torch.from_numpy(part).to(self._values.device) for part in self._rows.places(ids))
        found = self._values.new_zeros(len(ids) * self._width)
        found[owner * self._width + self._columns[places]] = self._values[places]
        return found.view(len(ids), self._width)


def _sparse(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> Tensor:
    indices, entries = torch.from_numpy(np.stack([rows, columns])), torch.from_numpy(values.astype(np.float64))
    return torch.sparse_coo_tensor(indices, entries, shape, check_invariants=True).coalesce()


def _as_tensor(rows: Rows) -> Tensor:
    """In float64, sparse or in full."""
    owner = np.repeat(np.arange(len(rows.indptr) - 1), np.diff(rows.indptr))
    shape = (len(rows.indptr) - 1, rows.width)
    sparse = _sparse(owner, rows.indices, rows.values, shape)
    return sparse.to_dense() if sparse._nnz() > DENSE * sparse.numel() else sparse


def _split_classes(settings: GraphNodesConfig, graph: Graph) -> dict[str, tuple[int, ...]]:
    """The classes of each split, as ``domain.split`` says.

    Raises:
        ConfigError: the file has no split of its own, or there are fewer ways to divide the classes.
    """
    count, k = len(graph.class_names), settings.split
    sizes = list(settings.split_sizes or map(len, graph.splits.values()))
    if k == "own" and graph.splits:
        return dict(graph.splits)
    if not sizes or k == "own":
        raise ConfigError(
            f"{settings.root} has no split of its classes (train_classes, val_classes, test_classes)",
            f"set domain.split=0 and domain.split_sizes to three numbers of its {count} classes",
        )
    if k >= (ways := num_class_splits(count, sizes)):
        raise ConfigError(
            f"domain.split is {k}, but {count} classes can be divided into {sizes} in {ways:,} ways",
            f"give 0 to {ways - 1}" if ways else "lower domain.split_sizes",
        )
    return dict(zip(SPLITS, class_split(count, sizes, k), strict=True))

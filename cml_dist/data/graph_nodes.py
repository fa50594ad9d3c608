"""Few-shot episodes of the nodes of one graph: classification with cross-entropy and accuracy.

Support and query are node ids until :meth:`GraphNodesDomain.prepare` puts what they see of the graph beside them, so
that workers hand over nothing but ids. Transductive: edges between support, query and all other nodes stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cml_dist.config.schema import GraphNodesConfig
from cml_dist.data import sampling
from cml_dist.data.base import SPLITS, ClassificationDomain, Progress, episode_rng, unlabelled_rng
from cml_dist.data.class_splits import class_split, num_class_splits
from cml_dist.data.graph_files import Graph, read_graph
from cml_dist.errors import ConfigError, DataError
from cml_dist.types import Batch, Episode

MASKED_STEPS, MASKED_UNITS = 32, 64
"""Of dropout: inner steps with masks of their own, after which they begin again, and hidden units that it can reach."""


PUBLISHED = {"citeseer": (3327, 3703), "amazon_computers": (13_752, 767), "cora_full": (19_793, 8710)}
"""Nodes and features of graphs by the names of the recipes' files; those of ``torch_geometric.datasets``."""


@dataclass(frozen=True)
class Rows:
    """A sparse matrix by rows: row v has ``values[starts[v] : starts[v + 1]]`` in ``columns[...]``."""

    starts: Tensor
    columns: Tensor
    values: Tensor
    width: int

    @classmethod
    def of(cls, matrix: Tensor, device: torch.device, dtype: torch.dtype) -> Rows:
        """The rows of a sparse tensor or one in full."""
        matrix = matrix.to_sparse().coalesce()
        row, column = matrix.indices().contiguous()
        starts = torch.searchsorted(row, torch.arange(matrix.shape[0] + 1))
        return cls(starts.to(device), column.to(device), matrix.values().to(device, dtype), matrix.shape[1])

    def take(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of rows ``[M]``: position of the row in ``ids``, column, value."""
        counts = self.starts[ids + 1] - self.starts[ids]
        owner = torch.arange(len(ids), device=ids.device).repeat_interleave(counts)
        at = (self.starts[ids] - counts.cumsum(0) + counts)[owner] + torch.arange(len(owner), device=ids.device)
        return owner, self.columns[at], self.values[at]

    def dense(self, ids: Tensor) -> Tensor:
        """``[M, width]``."""
        owner, columns, values = self.take(ids)
        return values.new_zeros(len(ids), self.width).index_put_((owner, columns), values)


def episode_that_sees(
    settings: GraphNodesConfig, seen: Callable[[int], int], features: int, dtype: torch.dtype
) -> Episode:
    """Shapes and types of an episode on the meta device, of which so many nodes see ``seen`` ones."""

    def batch(each: int, classes: int = settings.ways) -> Batch:
        nodes = classes * each
        near = torch.empty(seen(nodes), features, dtype=dtype)
        return Batch(torch.empty(nodes, len(near), dtype=dtype), torch.empty(nodes).long(), {"features": near})

    with torch.device("meta"):
        support, query = batch(settings.shots), batch(max(settings.queries, settings.eval_queries or 0))
        unlabelled = batch(settings.unlabelled, settings.ways + settings.distractors) if settings.unlabelled else None
        masks = torch.empty(MASKED_STEPS, support.inputs.shape[1], MASKED_UNITS, dtype=dtype)
    support = replace(support, by_step={"keep": masks} if settings.dropout else {})
    return Episode(support, query, "train", 0, ways=settings.ways, unlabelled=unlabelled)


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
        self.input_shape = (self.graph.features.shape[1],)
        self.output_dim, self.chance = settings.ways, 1 / settings.ways
        self.splits, short = _split_classes(settings, self.graph), []
        self.num_splits = num_class_splits(len(self.graph.class_names), list(map(len, self.splits.values())))
        self._nodes: dict[str, list[np.ndarray]] = {}
        for split, classes in self.splits.items():
            nodes = {self.graph.class_names[c]: np.flatnonzero(self.graph.labels.numpy() == c) for c in classes}
            self._nodes[split] = [ids for ids in nodes.values() if len(ids) >= self._nodes_a_class(split)]
            short += [f"{c} ({split}) has {len(n)}" for c, n in nodes.items() if len(n) < self._nodes_a_class(split)]
        left_out = f"Classes with too few nodes for an episode are left out: {', '.join(short)}"
        self.remarks = (*self.graph.notes, *[left_out] * bool(short))
        self._matrices: dict[tuple[torch.device, torch.dtype], tuple[Rows, Rows]] = {}

    def _nodes_a_class(self, split: str) -> int:
        """Of an episode."""
        queries = self.settings.queries if split == "train" else self.settings.eval_queries or self.settings.queries
        return self.settings.shots + queries

    def check_splits(self, splits: Collection[str]) -> None:
        """Raises DataError where a split has too few classes of enough nodes."""
        for split in splits:
            if (count := len(self._nodes[split])) < self.settings.ways:
                enough = f"have the {self._nodes_a_class(split)} nodes that an episode takes of each"
                raise DataError(
                    f"domain.ways is {self.settings.ways}, but of the {len(self.splits[split])} classes of split "
                    f"{split!r} of {self.settings.root} {count} {enough}",
                    "lower domain.ways, shots or queries, or choose another domain.split or split_sizes",
                )
            if not (each := self.settings.unlabelled):
                continue
            if (others := count - self.settings.ways) < self.settings.distractors:
                what = f"domain.distractors is {self.settings.distractors}, but beside domain.ways split {split!r} has "
                raise DataError(f"{what}{others} classes", f"lower domain.distractors to at most {others}")
            if (fewest := min(map(len, self._nodes[split])) - self._nodes_a_class(split)) < each:
                what = f"domain.unlabelled is {each}, but of a class of {split!r} an episode leaves {fewest} nodes"
                raise DataError(what, f"lower domain.unlabelled to at most {fewest}")

    # ------------------------------------------------------------------ episodes

    def episode(self, split: str, index: int) -> Episode:
        ways, shots, rng = self.settings.ways, self.settings.shots, episode_rng(self._seeds[split], split, index)
        sizes = np.array([len(ids) for ids in self._nodes[split]])
        classes, drawn = sampling.draw(rng, sizes, ways, self._nodes_a_class(split))
        nodes = np.stack([self._nodes[split][c][numbers] for c, numbers in zip(classes, drawn, strict=True)])
        support, query = (
            Batch(torch.from_numpy(part.flatten()), torch.arange(ways).repeat_interleave(part.shape[1]))
            for part in (nodes[:, :shots], nodes[:, shots:])
        )
        unlabelled = None
        if self.settings.unlabelled:
            own, how = unlabelled_rng(self._seeds[split], split, index), (classes, drawn, self.settings.unlabelled)
            pairs = zip(*sampling.draw_unlabelled(own, sizes, *how, self.settings.distractors), strict=True)
            ids = torch.from_numpy(np.concatenate([self._nodes[split][c][numbers] for c, numbers in pairs]))
            unlabelled = Batch(ids, torch.full_like(ids, -1))
        return Episode(support, query, split, index, ways=ways, unlabelled=unlabelled)

    def prepare(self, episode: Episode, device: torch.device, dtype: torch.dtype) -> Episode:
        if (device, dtype) not in self._matrices:
            self._matrices[device, dtype] = tuple(Rows.of(matrix, device, dtype) for matrix in self._propagated())
        drawn = episode_rng(self._seeds[episode.split], episode.split, episode.index).spawn(5)
        matrices, streams = self._matrices[device, dtype], iter((drawn[0], drawn[1], drawn[4]))
        episode = episode.to(device).each(lambda batch: self._seen(batch, next(streams), *matrices))
        if episode.split == "train" and (rate := self.settings.dropout):
            shape = (MASKED_STEPS, episode.support.inputs.shape[1], MASKED_UNITS)
            keep = torch.from_numpy(drawn[2].random(shape, np.float32) >= rate).to(device, dtype) / (1 - rate)
            episode = replace(episode, support=replace(episode.support, by_step={"keep": keep}))
        return episode

    def _propagated(self) -> tuple[Tensor, Tensor]:
        """The normalised adjacency, and what is read of nodes: A X, in which nothing is learned, or X of subgraphs."""
        count = len(self.graph.labels)
        row, column = torch.cat([self.graph.edges, torch.arange(count).expand(2, -1)], 1)
        weights = self._weights(row, column, row.bincount(minlength=count))
        adjacency = torch.sparse_coo_tensor(torch.stack([row, column]), weights, (count, count), check_invariants=True)
        with warnings.catch_warnings():  # the product of two sparse matrices uses a form "in beta state"
            warnings.simplefilter("ignore", UserWarning)
            whole = self.settings.base == "gcn"
            return adjacency, torch.sparse.mm(adjacency, self.graph.features) if whole else self.graph.features

    def _weights(self, row: Tensor, column: Tensor, degrees: Tensor) -> Tensor:
        """Entries of the normalised adjacency; degrees count the node itself."""
        ours = degrees.double()[row]
        return 1 / ours if self.settings.adjacency == "row" else (ours * degrees.double()[column]).rsqrt()

    def _seen(self, batch: Batch, rng: np.random.Generator, adjacency: Rows, features: Rows) -> Batch:
        """Nodes with what they see of the graph, as :class:`cml_dist.nets.gcn.GCN` reads it."""
        if self.settings.base == "g_meta":
            pairs = [self._subgraph(node, rng, adjacency, features) for node in batch.inputs.split(1)]
            seen, inputs = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            inputs = torch.block_diag(*inputs.split([len(part) for part, _ in pairs]))
            return Batch(inputs, batch.targets, {"features": seen})
        owner, columns, values = adjacency.take(batch.inputs)
        near, at = columns.unique(return_inverse=True)
        inputs = values.new_zeros(len(batch.inputs), len(near)).index_put_((owner, at), values)
        return Batch(inputs, batch.targets, {"features": features.dense(near)})

    def _subgraph(
        self, node: Tensor, rng: np.random.Generator, adjacency: Rows, features: Rows
    ) -> tuple[Tensor, Tensor]:
        """Of the subgraph S round a node A_S X_S ``[|S|, F]``, and the row ``[|S|]`` that the read-out makes of A_S.

        The mean over S is such a row too, of the means of A_S: what comes after A_S is linear.
        """
        hops, cap, readout = self.settings.hops, self.settings.cap, self.settings.readout
        ids = node
        for _ in range(hops):
            ids = adjacency.take(ids)[1].unique()  # each node sees itself
        if cap is not None and len(ids) > cap:
            others = ids[ids != node]
            drawn = torch.from_numpy(rng.choice(len(others), cap - 1, replace=False))
            ids = torch.cat([node, others[drawn.to(node.device)]]).sort().values
        row, column, value = adjacency.take(ids)
        place = torch.searchsorted(ids, column).clamp_max(len(ids) - 1)
        inside = ids[place] == column
        row, column, value = row[inside], place[inside], value[inside]
        if readout == "centre":
            value = self._weights(row, column, row.bincount()).to(value)
        matrix = torch.sparse_coo_tensor(torch.stack([row, column]), value, (len(ids),) * 2, check_invariants=True)
        of = ids == node if readout == "centre" else torch.full_like(ids, 1 / len(ids), dtype=value.dtype)
        return matrix @ features.dense(ids), matrix.T @ of.to(value)

    def largest_episode(self, dtype: torch.dtype) -> Episode:
        """An upper bound, of nodes that see most: from the degrees alone, as if no two saw the same."""
        settings, (row, column), count = self.settings, self.graph.edges, len(self.graph.labels)
        whole, reach = settings.base == "gcn", torch.ones(count, dtype=torch.float64)
        for _ in range(1 if whole else settings.hops):
            reach = (reach + torch.zeros_like(reach).index_add(0, row, reach[column])).clamp_max(count)
        reach = (reach if whole else reach.clamp_max(settings.cap or count)).sort(descending=True).values

        def seen(nodes: int) -> int:
            return int(reach[:nodes].sum().clamp_max(count if whole else torch.inf))

        return episode_that_sees(settings, seen, self.input_shape[0], dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrices": {}}

    # ------------------------------------------------------------------ what is said

    def fingerprint(self) -> str:
        return self.graph.fingerprint()

    def class_names(self, split: str) -> Sequence[str]:
        return [self.graph.class_names[c] for c in self.splits[split]]

    def describe(self) -> dict[str, Any]:
        classes = {split: self.class_names(split) for split in self.splits}
        return {
            "graph": f"{self.settings.root}: {self.graph.name}",
            "classes": "; ".join(f"{split}: {', '.join(names)}" for split, names in classes.items()),
            "input_shape": list(self.input_shape),
        }


def _split_classes(settings: GraphNodesConfig, graph: Graph) -> dict[str, Collection[int]]:
    """The classes of each split, as ``domain.split`` says.

    Raises:
        ConfigError: the file has no split of its own, or there are fewer ways to divide the classes.
    """
    count, k = len(graph.class_names), 0 if settings.split == "all" else settings.split
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

"""Graphs with features and labels of their nodes, as files hold them: checked, and in one form."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cml_dist.data.base import SPLITS
from cml_dist.data.free_memory import check_room
from cml_dist.data.pyg_files import read_saved
from cml_dist.errors import DataError

NEEDED = ("feat_data", "feat_indices", "feat_indptr", "feat_shape", "edge_index", "labels")


@dataclass(frozen=True)
class Graph:
    """An undirected graph without loops.

    Attributes:
        edges: ``[2, E]`` int64, from and to; each edge both ways, in order, none twice.
        features: ``[nodes, F]``, sparse, float64.
        labels: the class of each node, ``[nodes]`` int64.
        class_names: one for each class.
        splits: the file's own classes by split; empty where it has none.
        notes: what was changed on reading, a line each.
    """

    edges: Tensor
    features: Tensor
    labels: Tensor
    class_names: Sequence[str]
    splits: Mapping[str, Sequence[int]]
    notes: Sequence[str] = ()

    @property
    def name(self) -> str:
        """Its size in words."""
        nodes, features = self.features.shape
        return f"{nodes:,} nodes, {self.edges.shape[1] // 2:,} edges, {features:,} features"

    def fingerprint(self) -> str:
        """SHA-256 of structure, features, labels and splits."""
        digest = hashlib.sha256(repr(sorted(self.splits.items())).encode())
        for tensor in (self.edges, self.features.indices(), self.features.values(), self.labels):
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()


def read_graph(path: str) -> Graph:
    """The graph in a file, whose suffix says of what kind, or in the folder of a set of torch_geometric.

    Raises:
        DataError: it cannot be read, or is no sound graph; with what is wrong, and where.
    """
    found = path if Path(path).is_file() else str(Path(path, "processed", "data.pt"))
    if not Path(found).is_file():
        remedy = "give domain.root a file, or what torch_geometric wrote: Planetoid('data', 'Cora') writes data/Cora"
        raise DataError(f"there is no graph at {path}, nor {found}", f"{remedy} (docs/how-to/nodes.md)")
    if (suffix := Path(found).suffix) not in READERS:
        raise DataError(f"{path} ends in {suffix or 'nothing'}", f"use a file that ends in {' or '.join(READERS)}")
    state = Path(found).stat()
    return _read_once(found, suffix, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _read_once(path: str, suffix: str, *state: int) -> Graph:
    """The file as it is now: of a run for each class split, every split asks for it, several times."""
    return READERS[suffix](path)


def _read_npz(path: str) -> Graph:
    """Arrays without pickles: see docs/how-to/nodes.md."""
    try:
        with zipfile.ZipFile(path) as members:
            check_room(path, sum(member.file_size for member in members.infolist()))
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, EOFError, MemoryError, ValueError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error})", "write it anew, by numpy.savez without objects") from error
    for name in NEEDED:
        if name not in found:
            raise DataError(f"{path} has no array {name}", f"write {', '.join(NEEDED)}")
        if found[name].dtype.kind not in ("biuf" if name == "feat_data" else "iu"):
            raise DataError(f"{name} of {path} is of type {found[name].dtype}", "write numbers; ids as integers")
    data, columns, starts, shape = (found[name] for name in NEEDED[:4])
    if shape.shape != (2,) or starts.shape != (shape[0] + 1,) or data.shape != columns.shape or columns.ndim != 1 \
            or starts[0] != 0 or starts[-1] != len(data) or (np.diff(starts.astype(np.int64)) < 0).any():  # fmt: skip
        raise DataError(f"feat_* of {path} are no sparse matrix by rows (CSR)", "write them by scipy.sparse.csr_matrix")
    columns = _ids(f"feat_indices of {path}", columns, int(shape[1]))
    rows = torch.arange(int(shape[0])).repeat_interleave(torch.from_numpy(np.diff(starts.astype(np.int64))))
    values = torch.from_numpy(data.astype(np.float64))
    features = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, tuple(shape), check_invariants=True)
    own = {split: found[f"{split}_classes"] for split in SPLITS if f"{split}_classes" in found}
    return make_graph(path, found["edge_index"], features, found["labels"], found.get("class_names"), own)


def _read_pt(path: str) -> Graph:
    *arrays, notes = read_saved(path)
    graph = make_graph(path, *arrays, None, {})
    return replace(graph, notes=[*graph.notes, *notes])


READERS = {".npz": _read_npz, ".pt": _read_pt}


def make_graph(
    path: str,
    edge_index: np.ndarray,
    features: Tensor,
    labels: np.ndarray,
    class_names: Sequence[str] | None,
    splits: Mapping[str, np.ndarray],
) -> Graph:
    """A sound graph: directed edges go both ways, loops and repeated edges are left out; isolated nodes are fine.

    Args:
        path: what messages call it.
        edge_index: ``[2, E]`` integers, from and to.
        features: ``[nodes, F]``, sparse.
        labels: ``[nodes]`` integers.
        class_names: None: their numbers.
        splits: classes of train, val and test.

    Raises:
        DataError: unknown nodes, features that are not finite, labels outside the classes.
    """
    features, nodes = features.double().coalesce(), features.shape[0]
    if labels.shape != (nodes,) or edge_index.ndim != 2 or len(edge_index) != 2:
        shapes = f"labels {labels.shape} and edge_index {edge_index.shape}"
        raise DataError(f"{path} has features of {nodes:,} nodes, {shapes}", "give a label a node, and edges [2, E]")
    names = list(map(str, range(min(labels.max(initial=-1) + 1, nodes)) if class_names is None else class_names))
    labels = _ids(f"labels of {path}", labels, len(names))
    source, target = _ids(f"edge_index of {path}", edge_index, nodes)
    own = {split: _ids(f"{split}_classes of {path}", ids, len(names)).tolist() for split, ids in splits.items()}
    if len(set().union(*own.values())) < sum(map(len, own.values())):
        raise DataError(f"{path} has a class in two of its splits, or twice in one", "give each class to one split")
    if not (finite := features.values().isfinite()).all():
        node, column = features.indices()[:, ~finite][:, 0].tolist()
        what = f"feature {column} of node {node:,} of {path} is no finite number ({(~finite).sum():,} are not)"
        raise DataError(what, "replace what is NaN or inf")
    between = source != target
    there, back = (source * nodes + target)[between].unique(), (target * nodes + source)[between]
    both, notes = torch.cat([there, back]).unique(), []
    if len(both) > len(there):
        notes.append(f"{len(both) - len(there):,} edges of {path} go one way: here all go both ways")
    if not between.all():
        notes.append(f"{(~between).sum():,} edges of {path} lead from a node to itself: each sees itself anyway")
    edges = torch.stack([both // max(nodes, 1), both % max(nodes, 1)])
    return Graph(edges, features, labels, names, own if len(own) == len(SPLITS) else {}, notes)


def _ids(what: str, values: np.ndarray, count: int) -> Tensor:
    """Int64 numbers below ``count``."""
    wrong = np.argwhere((values < 0) | (values >= count))
    if len(wrong):
        found = f"{values[tuple(wrong[0])]} (at {wrong[0][-1]:,}; {len(wrong):,} such)"
        raise DataError(f"{what} has {found}, but there are 0 to {count - 1:,}", "correct the file")
    return torch.from_numpy(values.astype(np.int64))

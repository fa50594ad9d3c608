"""Graphs with features and labels of their nodes, as files hold them: checked, and in one form."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cml_dist.data.base import SPLITS
from cml_dist.data.free_memory import available_bytes
from cml_dist.errors import DataError

NEEDED = ("feat_data", "feat_indices", "feat_indptr", "feat_shape", "edge_index", "labels")


class Rows(NamedTuple):
    """A sparse matrix by rows: row v has ``values[indptr[v] : indptr[v + 1]]`` in columns ``indices[...]``."""

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    width: int

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the entries of some rows lie, and which of ``rows`` (by position) each belongs to; int64."""
        counts = self.indptr[rows + 1] - self.indptr[rows]
        owner = np.repeat(np.arange(len(rows)), counts)
        return np.arange(len(owner)) + np.repeat(self.indptr[rows] - np.cumsum(counts) + counts, counts), owner


@dataclass(frozen=True)
class Graph:
    """An undirected graph without loops.

    Attributes:
        edges: the neighbours of each node, ascending, with value 1; each edge is there from both ends.
        features: of each node, float32 or float64.
        labels: the class of each node, ``[nodes]`` int64.
        class_names: one for each class.
        splits: the file's own classes by split; empty where it has none.
        notes: what was changed on reading, a line each.
    """

    edges: Rows
    features: Rows
    labels: np.ndarray
    class_names: Sequence[str]
    splits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_nodes(self) -> int:
        return len(self.labels)

    @property
    def num_edges(self) -> int:
        """Undirected ones."""
        return len(self.edges.indices) // 2

    def fingerprint(self) -> str:
        """SHA-256 of structure, features, labels and splits."""
        digest = hashlib.sha256(repr(sorted(self.splits.items())).encode())
        for array in (*self.edges[:2], *self.features[:3], self.labels):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


def read_graph(path: str) -> Graph:
    """The graph in a file; its suffix says of what kind.

    Raises:
        DataError: it cannot be read, or is no sound graph; with what is wrong, and where.
    """
    if not Path(path).is_file():
        raise DataError(f"there is no graph at {path}", "point domain.root at a file (docs/how-to/nodes.md)")
    if (suffix := Path(path).suffix) not in READERS:
        raise DataError(f"{path} ends in {suffix or 'nothing'}", f"use a file that ends in {' or '.join(READERS)}")
    return READERS[suffix](path)


def _read_npz(path: str) -> Graph:
    """Arrays without pickles: see docs/how-to/nodes.md."""
    try:
        with zipfile.ZipFile(path) as members:
            size, room = sum(member.file_size for member in members.infolist()), available_bytes()
        if size > room // 2:
            raise DataError(f"{path} holds {size:,} bytes, and {room:,} of memory are free", "use a larger machine")
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in NEEDED if name not in file.files]
            if missing:
                raise DataError(f"{path} has no array {missing[0]}", f"write {', '.join(NEEDED)}")
            found = {name: file[name] for name in file.files}
    except (OSError, EOFError, MemoryError, ValueError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error})", "write it anew, by numpy.savez without objects") from error
    shape, labels = found["feat_shape"], found["labels"]
    if shape.shape != (2,) or shape.dtype.kind not in "iu":
        raise DataError(f"feat_shape of {path} is {shape}", "give two integers: nodes, features")
    names = found.get("class_names", np.arange(int(labels.max(initial=-1)) + 1 if labels.dtype.kind in "iu" else 0))
    splits = {split: found[f"{split}_classes"] for split in SPLITS if f"{split}_classes" in found}
    indptr, indices, values = (found[f"feat_{part}"] for part in ("indptr", "indices", "data"))
    return make_graph(
        path, found["edge_index"], Rows(indptr, indices, values, int(shape[1])), labels, names.astype(str).tolist(),
        splits if len(splits) == len(SPLITS) else {},
    )  # fmt: skip


READERS = {".npz": _read_npz}


def make_graph(
    path: str,
    edge_index: np.ndarray,
    features: Rows,
    labels: np.ndarray,
    class_names: Sequence[str],
    splits: Mapping[str, np.ndarray],
) -> Graph:
    """A sound graph from what a file holds: directed edges go both ways, loops and repeated edges are left out.

    Args:
        path: what messages call it.
        edge_index: ``[2, E]``, from and to.

    Raises:
        DataError: shapes that disagree, unknown nodes, NaN features, labels outside the classes.
    """
    nodes, classes = len(labels), len(class_names)

    def whole(name: str, values: np.ndarray, shape: tuple[int | None, ...], most: int) -> np.ndarray:
        fits = values.ndim == len(shape) and all(b in (None, a) for a, b in zip(values.shape, shape, strict=True))
        if not fits or values.dtype.kind not in "iu":
            wanted = " x ".join("any" if size is None else f"{size:,}" for size in shape)
            raise DataError(f"{name} of {path} is {values.dtype} {values.shape}", f"give integers, {wanted}")
        wrong = np.argwhere((values < 0) | (values >= most))
        if len(wrong):
            at = tuple(wrong[0])
            where = f"number {at[-1]:,}" if len(wrong) == 1 else f"number {at[-1]:,} and {len(wrong) - 1:,} more"
            raise DataError(
                f"{name} of {path} names {values[at]:,} ({where}), but there are only 0 to {most - 1:,}",
                "leave it out, or correct the file",
            )
        return values.astype(np.int64)

    labels = whole("labels", labels, (None,), classes)
    edge_index = whole("edge_index", edge_index, (2, None), nodes)
    indices = whole("feat_indices", features.indices, (None,), features.width)
    indptr = whole("feat_indptr", features.indptr, (nodes + 1,), len(indices) + 1)
    values = features.values
    if indptr[0] != 0 or indptr[-1] != len(indices) or (np.diff(indptr) < 0).any() or values.shape != indices.shape:
        raise DataError(f"the features of {path} are no matrix by rows (CSR)", "write them anew, by scipy.sparse")
    if values.dtype.kind not in "biuf":
        raise DataError(f"feat_data of {path} is {values.dtype}", "give numbers")
    owner = np.repeat(np.arange(nodes), np.diff(indptr))
    if not (finite := np.isfinite(values)).all():
        at = int(np.argmin(finite))
        what = f"feature {indices[at]} of node {owner[at]:,} of {path} is {values[at]}"
        raise DataError(f"{what} ({(~finite).sum():,} such values)", "replace what is not finite")
    places = owner * features.width + indices
    if (np.diff(places) <= 0).any() and len(np.unique(places)) < len(places):
        raise DataError(f"{path} gives a feature of a node twice", "add them up (scipy: sum_duplicates)")
    own = {split: tuple(whole(f"{split}_classes", ids, (None,), classes).tolist()) for split, ids in splits.items()}
    if len(set().union(*own.values())) < sum(map(len, own.values())):
        raise DataError(f"a class of {path} is in two of its splits, or twice in one", "give each class to one split")
    source, target = edge_index[:, edge_index[0] != edge_index[1]]
    there, back = source * nodes + target, target * nodes + source
    there, both = np.unique(there), np.unique(np.concatenate([there, back]))
    notes = []
    if one_way := len(both) - len(there):
        notes.append(f"{one_way:,} edges of {path} were directed: they go both ways here")
    if loops := edge_index.shape[1] - len(source):
        notes.append(f"{loops:,} edges of {path} from a node to itself are left out: each node sees itself anyway")
    starts = np.searchsorted(both, np.arange(nodes + 1) * nodes)
    edges = Rows(starts, both % max(nodes, 1), np.ones(len(both), dtype=np.float32), nodes)
    values = values.astype(np.float64 if values.dtype.itemsize > 4 and values.dtype.kind == "f" else np.float32)
    return Graph(edges, Rows(indptr, indices, values, features.width), labels, class_names, own, tuple(notes))

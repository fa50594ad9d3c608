"""Graphs that PyTorch Geometric saved: nothing that a file asks for is run, nothing is downloaded."""

from __future__ import annotations

import warnings
import zipfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cml_dist.data.free_memory import check_room
from cml_dist.errors import DataError

ALLOWED = ("data.Data", "data.DataEdgeAttr", "data.DataTensorAttr", "storage.GlobalStorage")
"""Classes of ``torch_geometric.data``: all that a file may ask for besides tensors."""


def read_saved(path: str) -> tuple[np.ndarray, Tensor, np.ndarray, list[str]]:
    """Edges ``[2, E]``, sparse features, labels, and a line on what is not used, of a graph that ``torch.save`` wrote.

    Raises:
        DataError: it asks for more than tensors in a ``Data``, torch_geometric is missing, or it is no such graph.
    """
    try:
        with zipfile.ZipFile(path) as members:
            check_room(path, sum(member.file_size for member in members.infolist()))
        loaded = _load(path)
        if isinstance(loaded, tuple):  # InMemoryDataset's: graphs in one, where each begins, their class
            loaded, slices = loaded[:2]
            if slices and (graphs := max(map(len, slices.values())) - 1) > 1:
                raise DataError(f"{path} holds {graphs:,} graphs", "save one: torch.save(dataset[0], FILE)")
        fields = loaded if isinstance(loaded, dict) else loaded.to_dict()
        for name in ("x", "edge_index", "y"):  # each may be a view, and larger than the file
            value = fields.get(name)
            if type(value) is not Tensor or (value.ndim != 2 if name == "x" else value.dtype != torch.int64):
                what = f"{value.dtype} {list(value.shape)}" if type(value) is Tensor else type(value).__name__
                raise DataError(f"{name} of {path} is {what}", "save tensors: x [nodes, F]; y and edge_index int64")
            check_room(path, value.element_size() * (value.numel() if value.layout is torch.strided else value._nnz()))
        x, edges, labels = fields["x"].detach(), fields["edge_index"].numpy(), fields["y"].flatten().numpy()
        idle = ", ".join(sorted(fields.keys() & {"train_mask", "val_mask", "test_mask", "edge_weight", "edge_attr"}))
        notes = [f"{idle} of {path}: not used; classes are split, not nodes, and edges are alike"] if idle else []
        return edges, x.to_sparse(), labels, notes
    except DataError:
        raise
    except Exception as error:  # zipfile, pickle and torch each raise their own, some with: trust the file
        raise DataError(f"{path} cannot be read ({type(error).__name__})", "write it by torch.save") from error


def _load(path: str) -> Any:
    asked = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))  # looks at names, and builds nothing
    if other := sorted(asked - {f"torch_geometric.data.{name}" for name in ALLOWED}):
        what = f"{path} asks for {other[0]}; nothing but tensors in a Data of torch_geometric is read"
        raise DataError(what, "save Data(x=.., edge_index=.., y=..) alone, or write an .npz (docs/how-to/nodes.md)")
    with warnings.catch_warnings():  # of torch_geometric on torch, and of torch on sparse tensors
        warnings.simplefilter("ignore")
        classes = []
        if asked:
            try:
                from torch_geometric.data import data, storage
            except ImportError as error:
                raise DataError(f"{path} needs torch_geometric", "pip install 'cml-dist[graphs]'") from error
            classes = [data.DataEdgeAttr, data.DataTensorAttr, storage.GlobalStorage]  # it allows Data itself, for good
        with torch.serialization.safe_globals(classes), torch.sparse.check_sparse_tensor_invariants():
            return torch.load(path, map_location="cpu", weights_only=True)

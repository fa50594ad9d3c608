"""Graphs that PyTorch Geometric saved: read as the .npz of the same graph, and no file runs anything."""

from __future__ import annotations

import io
import os
import pickle
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch

from cml_dist.data.graph_files import read_graph
from cml_dist.errors import DataError

X = torch.tensor([[0.0, 2.5], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
EDGES, Y = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), torch.tensor([0, 1, 1, 0])


def saved(path, what, **words):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(what, path, **words)
    return str(path)


def fields(**changes):
    return {"x": X, "edge_index": EDGES, "y": Y, **changes}


@pytest.fixture
def same(tmp_path):
    """The fingerprint of the .npz of this graph."""
    rows, columns = np.nonzero(X.numpy())
    starts = np.searchsorted(rows, np.arange(len(X) + 1))
    np.savez(
        tmp_path / "graph.npz", feat_data=X.numpy()[rows, columns], feat_indices=columns, feat_indptr=starts,
        feat_shape=X.shape, edge_index=EDGES.numpy(), labels=Y.numpy(),
    )  # fmt: skip
    return read_graph(str(tmp_path / "graph.npz")).fingerprint()


@pytest.fixture(scope="module")
def geometric():
    with warnings.catch_warnings():  # its own, of calls to torch that are on their way out
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch_geometric.data", reason="the extra cml-dist[graphs] is not installed")


def sparse(layout):
    with warnings.catch_warnings():  # "in beta state"
        warnings.simplefilter("ignore")
        return X.to_sparse(layout=layout)


# --------------------------------------------------------------------------- without torch_geometric


@pytest.mark.parametrize(
    "changes",
    [{}, {"y": Y[:, None]}, {"x": X.double()}, {"x": sparse(torch.sparse_coo)}, {"x": sparse(torch.sparse_csr)}],
    ids=["dense", "a column of labels", "float64", "coo", "csr"],
)
def test_a_dict_of_tensors_is_the_npz_of_the_same_graph(tmp_path, same, changes):
    assert read_graph(saved(tmp_path / "graph.pt", fields(**changes))).fingerprint() == same


def test_what_is_not_used_is_said(tmp_path):
    graph = read_graph(saved(tmp_path / "graph.pt", fields(train_mask=Y > 0, test_mask=Y < 1, name="of no matter")))
    assert len(graph.notes) == 1 and graph.notes[0].startswith("test_mask, train_mask of ")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (fields(y=None), "y of .* is NoneType"),
        (fields(y=Y.float()), r"y of .* is torch.float32 \[4\]"),
        (fields(y=torch.eye(4, dtype=torch.int64)), "4 nodes, labels"),
        (fields(y=Y - 1), "labels of .* has -1 .* there are 0 to 0"),
        (fields(y=Y << 60), "labels of .* has 1152921504606846976 .* there are 0 to 3"),
        (fields(x=X[0]), r"x of .* is torch.float32 \[2\]"),
        (fields(x=X / 0), r"feature .* of node 0 of .* is no finite number"),
        (fields(x=torch.ones(1).expand(1 << 24, 1 << 24)), r"holds 1,125,899,906,842,624 bytes, and .* are free"),
        (fields(edge_index=EDGES + 2), "edge_index of .* has 4 .* there are 0 to 3"),
        ([fields()], "cannot be read"),
    ],
)
def test_what_is_no_graph_is_one_line(tmp_path, what, said):
    with pytest.raises(DataError, match=said):
        read_graph(saved(tmp_path / "graph.pt", what))


class Calls:
    """What a stranger sends: unpickled as a pickle usually is, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("form", ["zip", "older zip", "pickle", "not said by name"])
def test_a_file_that_calls_something_runs_nothing(tmp_path, form):
    path, made = tmp_path / "graph.pt", tmp_path / "made"
    what, said = fields(x=Calls(made)), "asks for posix.mkdir"
    if form == "pickle":
        path.write_bytes(pickle.dumps(what))
    elif form == "older zip":
        saved(path, what, _use_new_zipfile_serialization=False)
    else:
        saved(path, what)
    if form == "not said by name":  # a protocol in which a name need not stand in the file as it is
        stream = io.BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(stream, "w") as new:
            for name in old.namelist():
                new.writestr(name, pickle.dumps(what, 4) if name.endswith("data.pkl") else old.read(name))
        path.write_bytes(stream.getvalue())
    with pytest.raises(DataError, match=said if form == "zip" else "cannot be read"):
        read_graph(str(path))
    assert not made.exists()


def test_without_torch_geometric_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    path = saved(tmp_path / "graph.pt", fields())
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    data = b"\x80\x02ctorch_geometric.data.storage\nGlobalStorage\n."
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, data if name.endswith("data.pkl") else content)
    with pytest.raises(DataError, match=r"needs torch_geometric; pip install 'cml-dist\[graphs\]'"):
        read_graph(path)


def test_a_folder_of_a_set_is_its_processed_file(tmp_path, same):
    saved(tmp_path / "Cora" / "processed" / "data.pt", (fields(), None))
    assert read_graph(str(tmp_path / "Cora")).fingerprint() == same
    with pytest.raises(DataError, match="no graph at .*PubMed, nor .*PubMed/processed/data.pt; .*Planetoid"):
        read_graph(str(tmp_path / "PubMed"))


# --------------------------------------------------------------------------- with it


def test_a_data_is_the_npz_of_the_same_graph(tmp_path, geometric, same):
    allowed = set(torch.serialization.get_safe_globals())
    for x in (X, sparse(torch.sparse_csr)):
        data = geometric.Data(**fields(x=x), train_mask=Y > 0, name="Cora")
        assert read_graph(saved(tmp_path / "graph.pt", data)).fingerprint() == same
    assert set(torch.serialization.get_safe_globals()) == allowed, "other files may ask for what they could before"


def test_what_an_in_memory_dataset_writes_is_the_npz_of_the_same_graph(tmp_path, geometric, same):
    data, path = geometric.Data(**fields()), tmp_path / "Cora" / "processed" / "data.pt"
    for of_older in (True, False):
        if of_older:
            saved(path, geometric.InMemoryDataset.collate([data]))
        else:
            geometric.InMemoryDataset.save([data], str(path))
        assert read_graph(str(tmp_path / "Cora")).fingerprint() == same
    geometric.InMemoryDataset.save([data, data], str(path))
    with pytest.raises(DataError, match="holds 2 graphs"):
        read_graph(str(tmp_path / "Cora"))


def test_a_data_with_more_than_tensors_is_one_line_with_the_class(tmp_path, geometric):
    path = saved(tmp_path / "graph.pt", geometric.Data(**fields(), more=np.zeros(2)))
    with pytest.raises(DataError, match="asks for numpy.*; save Data"):
        read_graph(path)

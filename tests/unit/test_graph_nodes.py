"""Nodes of a graph: files, class splits, episodes, and a run from end to end."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import cml_dist
from cml_dist.cli import main
from cml_dist.config.load import parse_config
from cml_dist.data.build import build_domain
from cml_dist.data.class_splits import class_split, num_class_splits
from cml_dist.errors import CmlError, ConfigError, DataError

CPU, COUNT, CLASSES = torch.device("cpu"), 48, 6


def arrays(**changed):
    """A small graph without flaws: features are one-hot, edges a ring over all nodes but the last."""
    ring = np.arange(COUNT - 1)
    edges = np.stack([ring, np.roll(ring, 1)])
    whole = {
        "feat_data": np.ones(COUNT), "feat_indices": np.arange(COUNT) % 7, "feat_indptr": np.arange(COUNT + 1),
        "feat_shape": np.array([COUNT, 7]), "edge_index": np.concatenate([edges, edges[::-1]], 1),
        "labels": np.arange(COUNT) % CLASSES, "class_names": np.array(list("abcdef")),
        "train_classes": np.array([0, 1]), "val_classes": np.array([2, 3]), "test_classes": np.array([4, 5]),
    }  # fmt: skip
    return {name: value for name, value in {**whole, **changed}.items() if value is not None}


def config_of(tmp_path, changed=None, model=None, engine=None, **domain):
    np.savez(tmp_path / "g.npz", **arrays(**(changed or {})))
    return parse_config(
        {
            "domain": {"name": "graph_nodes", "root": str(tmp_path / "g.npz"), "queries": 2, **domain},
            "model": {"backbone": "gcn", "hidden": [4, 4], "colearner": {"depth": 1}, **(model or {})},
            "engine": engine or {},
        }
    )


def domain_of(tmp_path, changed=None, tell=lambda line: None, **domain):
    return build_domain(config_of(tmp_path, changed, **domain).domain, train_seed=3, eval_seed=4, tell=tell)


def put(array, at, value):
    array = np.array(array, dtype=np.result_type(array, type(value)))
    array[at] = value
    return array


GOOD = arrays()
BAD = {
    "unknown node": ({"edge_index": put(GOOD["edge_index"], (1, 3), 999)}, "edge_index of .* has 999 .* 0 to 47"),
    "NaN": ({"feat_data": put(GOOD["feat_data"], 9, np.nan)}, "feature 2 of node 9 of .* no finite number"),
    "label below": ({"labels": put(GOOD["labels"], 5, -1)}, "labels of .* has -1 .* 0 to 5"),
    "label above": ({"labels": put(GOOD["labels"], 5, 6)}, "labels of .* has 6 .* 0 to 5"),
    "label missing": ({"labels": GOOD["labels"][:-1]}, "features of 48 nodes, labels .47,."),
    "no labels": ({"labels": None}, "no array labels"),
    "objects": ({"labels": np.array([None] * COUNT)}, "cannot be read"),
    "no integers": ({"edge_index": GOOD["edge_index"] + 0.5}, "edge_index of .* is of type float64"),
    "no rows": ({"feat_indptr": put(GOOD["feat_indptr"], 4, 40)}, "no sparse matrix by rows"),
    "class twice": ({"val_classes": np.array([1, 2])}, "class in two of its splits"),
    "unknown class": ({"val_classes": np.array([7])}, "val_classes of .* has 7"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_is_one_line(tmp_path, fault):
    changed, message = BAD[fault]
    with pytest.raises(DataError, match=message) as caught:
        domain_of(tmp_path, changed)
    assert "\n" not in str(caught.value)


def test_no_file_another_kind_of_file_and_a_damaged_one(tmp_path):
    for name, content, message in (("a.npz", None, "there is no graph"), ("a.txt", b"", "ends in .txt"),
                                   ("b.npz", b"PK\x03\x04nothing", "cannot be read")):  # fmt: skip
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            domain_of(tmp_path, root=str(tmp_path / name))


def test_one_way_edges_loops_and_repeats_are_the_same_graph_and_said(tmp_path):
    told, edges = [], GOOD["edge_index"]
    plain = domain_of(tmp_path)
    half = edges[:, : edges.shape[1] // 2]
    odd = np.concatenate([half, half[:, :3], [[5, 6], [5, 6]]], 1)
    other = domain_of(tmp_path, {"edge_index": odd}, told.append)
    assert other.fingerprint() == plain.fingerprint()
    assert [line.partition(" ")[0] for line in told] == ["47", "2"]
    assert "go one way" in told[0] and "to itself" in told[1]


def test_classes_with_too_few_nodes_are_left_out_and_too_few_classes_refused(tmp_path):
    labels = np.where(np.arange(COUNT) < 2, 5, np.arange(COUNT) % 5)
    told, split = [], {"train_classes": [0, 1], "val_classes": [2, 3], "test_classes": [4, 5]}
    with pytest.raises(DataError, match="domain.ways is 2, but of the 2 classes of split 'test' .* 1 have the 3 nodes"):
        domain_of(tmp_path, {"labels": labels, **split}, told.append)
    assert told == ["Classes with too few nodes for an episode are left out: f (test) has 2"]
    with pytest.raises(DataError, match="domain.ways is 3"):
        domain_of(tmp_path, ways=3)


def test_class_splits_are_all_different_and_counted():
    found = {class_split(CLASSES, (2, 2, 2), k) for k in range(90)}
    assert num_class_splits(CLASSES, (2, 2, 2)) == 90 == len(found)
    assert all(sorted(sum(parts, ())) == list(range(6)) for parts in found)
    many = [class_split(10, (4, 3, 3), k) for k in range(50)]  # of 4,200
    assert len(set(many)) == 50 and class_split(10, (4, 3, 3), 7) == many[7]
    assert {tuple(map(len, parts)) for parts in many} == {(4, 3, 3)}
    assert num_class_splits(5, (4, 3, 3)) == 0


def test_a_split_by_number_and_one_that_does_not_exist(tmp_path):
    domain = domain_of(tmp_path, split=89)
    assert tuple(domain.splits.values()) == class_split(CLASSES, (2, 2, 2), 89)
    with pytest.raises(ConfigError, match="domain.split is 90, but 6 classes .* in 90 ways; give 0 to 89"):
        domain_of(tmp_path, split=90)
    with pytest.raises(ConfigError, match="no split of its classes"):
        domain_of(tmp_path, {"train_classes": None})


def test_an_episode_is_a_pure_function_and_lends_no_node_twice(tmp_path):
    domain = domain_of(tmp_path, shots=2, eval_queries=4, dropout=0.5)
    copy = pickle.loads(pickle.dumps(domain))
    for split, queries in (("train", 2), ("test", 4)):
        episode = domain.episode(split, 11)
        nodes = torch.cat([episode.support.inputs, episode.query.inputs])
        assert len(nodes) == len(nodes.unique()) == 2 * (2 + queries)
        classes = domain.graph.labels[nodes].tolist()
        assert set(classes) == set(domain.splits[split])
        once, again = (d.prepare(d.episode(split, 11), CPU, torch.float32).batches for d in (domain, copy))
        for first, second in zip(once, again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))
    more = domain_of(tmp_path, shots=2, queries=5, dropout=0.5)  # the support set and its masks stay
    first, second = (d.prepare(d.episode("train", 11), CPU, torch.float32).support for d in (domain, more))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


def test_dropout_is_of_training_and_of_support_alone(tmp_path):
    domain = domain_of(tmp_path, dropout=0.25)
    found = {split: domain.prepare(domain.episode(split, 0), CPU, torch.float32) for split in ("train", "val")}
    keep = found["train"].support.by_step["keep"]
    assert (keep == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert not any(batch.by_step for batch in (found["train"].query, *found["val"].batches))


def test_an_isolated_node_sees_itself(tmp_path):
    domain = domain_of(tmp_path)
    episode = domain.episode("train", 0)
    alone = torch.full_like(episode.support.inputs, COUNT - 1)
    episode = replace(episode, support=replace(episode.support, inputs=alone))
    support = domain.prepare(episode, CPU, torch.float32).support
    assert support.inputs.tolist() == [[1.0], [1.0]]
    assert support.context["features"].tolist() == [[0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]]  # 47 % 7 is 5


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"engine": {"micro_batch": 2}}, "micro_batch is 2, but nodes of a batch share their neighbourhoods"),
        ({"model": {"backbone": "conv4"}}, "reads images, but domain.name is graph_nodes: set model.backbone=gcn"),
        ({"model": {"hidden": [65, 4]}, "dropout": 0.5}, "domain.dropout reaches 64 hidden units"),
    ],
)
def test_what_cannot_be_together_is_refused(tmp_path, how, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, **how)


def test_a_run_from_end_to_end(tmp_path, capsys):
    """Trained, planned for, tested on another split of the classes, and the export says what it is for."""
    config_of(tmp_path)
    run, graph = tmp_path / "run", f"domain.root={tmp_path / 'g.npz'}"
    short = ["train.steps=2", "eval.episodes=3", "eval.val_episodes=2", "domain.queries=2", "domain.eval_queries=3"]
    assert main(["train", "citeseer", graph, f"run.dir={run}", "domain.dropout=0.5", *short]) in (0, None)
    assert main(["eval", str(run), "domain.split=3"]) in (0, None)
    assert main(["plan", "citeseer", graph, *short, "--gpus", "1", "--gpu-memory-gib", "4"]) in (0, None)
    said = capsys.readouterr()
    assert "48 nodes, 47 edges, 7 features" in said.out + said.err
    assert "nodes of a graph" in (run / "export" / "README.md").read_text()
    with pytest.raises(CmlError, match="cml-dist eval RUN_DIR domain.root=FILE"):
        cml_dist.load(run)

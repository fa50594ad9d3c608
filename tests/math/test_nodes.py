"""Nodes of a graph: the meta-gradient is that of the whole graph in dense algebra, written out here by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from toy import check_equal

from cml_dist.config.load import parse_config
from cml_dist.data.build import build_domain
from cml_dist.data.graph_nodes import GraphNodesDomain
from cml_dist.meta.gradient import Engine, meta_gradient
from cml_dist.meta.problem import Problem
from cml_dist.nets.build import make_network, method_of

NODES, FEATURES, CLASSES, STEPS, LR, GAMMA = 40, 11, 6, 3, 0.3, 0.7
CPU = torch.device("cpu")
RELU, SOFTMAX = (lambda x: x.clamp(min=0)), (lambda x: x - x.logsumexp(1, keepdim=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The file of a small graph with isolated nodes, and its adjacency and features in full."""
    rng = np.random.default_rng(3)
    a = np.triu(rng.random((NODES, NODES)) < 0.06, 1)
    a[:2] = a[:, :2] = False
    a = (a | a.T).astype(np.float64)
    x = rng.random((NODES, FEATURES)) * (rng.random((NODES, FEATURES)) < 0.4)
    row, column = np.nonzero(x)
    path = tmp_path_factory.mktemp("graph") / "small.npz"
    np.savez(
        path, feat_data=x[row, column], feat_indices=column, feat_indptr=np.r_[0, np.cumsum((x != 0).sum(1))],
        feat_shape=x.shape, edge_index=np.array(np.nonzero(a)), labels=np.arange(NODES) % CLASSES,
        train_classes=[0, 1, 2], val_classes=[3], test_classes=[4, 5],
    )  # fmt: skip
    return str(path), torch.from_numpy(a), torch.from_numpy(x)


def case(path, colearner=True, head="linear", order=2, **domain):
    """Configuration, domain, network, and the prepared first episode, in float64."""
    config = parse_config(
        {
            "domain": {"name": "graph_nodes", "root": path, "ways": 2, "shots": 2, "queries": 3, **domain},
            "model": {"backbone": "gcn", "hidden": [5, 4], "head": head, "colearner": {"depth": 1, "kind": "dense"}},
            "method": {"inner_steps": STEPS, "inner_lr": LR, "order": order}
            | ({"name": "cml", "gamma": GAMMA} if colearner else {"name": "maml"}),
            "run": {"precision": "fp64"},
        }
        | ({} if colearner else {})
    )
    built = build_domain(config.domain, train_seed=1, eval_seed=1, splits=("train", "test"))
    net = make_network(config, built.input_shape, built.output_dim).double()
    return config, built, net


def normalised(a, kind):
    loops = a + torch.eye(len(a), dtype=a.dtype)
    degrees = loops.sum(1)
    return loops / degrees[:, None] if kind == "row" else loops / (degrees[:, None] * degrees).sqrt()


def whole_graph(a, x, p, keep=None):
    """Outputs of all nodes: A (keep * relu(A X W1 + b1)) W2 + b2."""
    hidden = RELU(a @ x @ p["body.layers.0.weight"].T + p["body.layers.0.bias"])
    hidden = hidden if keep is None else hidden * keep
    return a @ hidden @ p["body.layers.1.weight"].T + p["body.layers.1.bias"]


def linear(p, out, head="head"):
    return out @ p[f"{head}.weight"].T + p[f"{head}.bias"]


def colearner(p, out):
    return linear(p, RELU(linear(p, out, "colearner.layers.0")), "colearner.out")


def to_means(embedded, support, labels):
    means = torch.stack([support[labels == label].mean(0) for label in range(2)])
    return -(embedded[:, None] - means).square().sum(2)


def cross_entropy(outputs, labels):
    return -SOFTMAX(outputs)[torch.arange(len(labels)), labels].mean()


def by_hand(params, look, support_labels, query_labels, order, head="linear"):
    """Eq. 5 to 7 unrolled; ``look(p, step)`` gives the bodies' outputs of support and query nodes."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    fast = dict(leaves)

    def outputs(p, which, step):
        bodies = look(p, step)
        if head == "linear":
            return linear(p, bodies[which])
        support, asked = (bodies[n] @ p["head.weight"].T for n in (0, which))
        return to_means(asked, support, support_labels)

    for step in range(STEPS):
        loss = cross_entropy(outputs(fast, 0, step), support_labels)
        names = [n for n in fast if not n.startswith("colearner.")]
        grads = torch.autograd.grad(loss, [fast[n] for n in names], create_graph=True)
        fast |= {n: fast[n] - LR * (g if order == 2 else g.detach()) for n, g in zip(names, grads, strict=True)}
    loss = cross_entropy(outputs(fast, 1, None), query_labels)
    if any(n.startswith("colearner.") for n in fast):
        loss = loss + GAMMA * cross_entropy(colearner(fast, look(fast, None)[1]), query_labels)
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return loss.item(), dict(zip(leaves, grads, strict=True))


def check(config, domain, net, expected, engine):
    params = {n: p.detach() for n, p in net.named_parameters()}
    episode = domain.prepare(domain.episode("train", 0), CPU, torch.float64)
    got = meta_gradient(params, episode, Problem(net, domain.loss, domain.score, {}), method_of(config, net), engine)
    value, grads = expected
    assert got.terms["loss"].item() == pytest.approx(value, rel=1e-10)
    check_equal(got.grads, grads, rel=1e-10)


ENGINES = [Engine("graph"), Engine("adjoint"), Engine("adjoint", trajectory="sqrt")]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: f"{engine.name}-{engine.trajectory}")
@pytest.mark.parametrize(("adjacency", "order", "co", "dropout"), [
    ("row", 2, True, 0.0), ("row", 2, True, 0.5), ("row", 1, True, 0.5), ("symmetric", 2, False, 0.0),
])  # fmt: skip
def test_it_is_the_whole_graph_in_dense_algebra(made, engine, adjacency, order, co, dropout):
    path, a, x = made
    config, domain, net = case(path, co, order=order, adjacency=adjacency, dropout=dropout)
    a, episode = normalised(a, adjacency), domain.episode("train", 0)
    support, query = episode.support.inputs, episode.query.inputs
    near = torch.nonzero((a[support] != 0).any(0)).flatten()  # the nodes that a support node sees, in order
    masks = domain.prepare(episode, CPU, torch.float64).support.by_step.get("keep")
    assert (masks is not None) == (dropout > 0)

    def look(p, step):
        keep = None
        if masks is not None and step is not None:  # dropout is of the support pass alone
            assert set(masks.unique().tolist()) == {0.0, 1 / (1 - dropout)}
            keep = torch.ones(NODES, 5, dtype=torch.float64)
            keep[near] = masks[step, :, :5]
        return whole_graph(a, x, p, keep)[support], whole_graph(a, x, p)[query]

    params = {n: p.detach() for n, p in net.named_parameters()}
    expected = by_hand(params, look, episode.support.targets, episode.query.targets, order)
    check(config, domain, net, expected, engine)


@pytest.mark.parametrize("engine", ENGINES[:2], ids=lambda engine: engine.name)
@pytest.mark.parametrize(("readout", "head"), list(itertools.product(("mean", "centre"), ("linear", "prototype"))))
def test_g_meta_is_a_network_on_each_subgraph(made, engine, readout, head):
    path, a, x = made
    adjacency = {"mean": "row", "centre": "symmetric"}[readout]
    config, domain, net = case(path, head=head, base="g_meta", readout=readout, adjacency=adjacency, cap=None)
    episode = domain.episode("train", 0)

    def one(p, node):
        """The whole network on the subgraph of two hops, and the read-out of its outputs."""
        near = ((torch.eye(NODES, dtype=a.dtype) + a) @ (torch.eye(NODES, dtype=a.dtype) + a))[node] > 0
        cut = normalised(a, adjacency)[near][:, near] if readout == "mean" else normalised(a[near][:, near], adjacency)
        out = whole_graph(cut, x[near], p)
        return out.mean(0) if readout == "mean" else out[near[:node].sum()]

    def look(p, step):
        return [torch.stack([one(p, n) for n in b.inputs.tolist()]) for b in (episode.support, episode.query)]

    params = {n: p.detach() for n, p in net.named_parameters()}
    expected = by_hand(params, look, episode.support.targets, episode.query.targets, 2, head)
    check(config, domain, net, expected, engine)


def test_a_capped_subgraph_keeps_its_node_and_is_drawn_by_the_episode_alone(made):
    path, a, x = made
    domain = GraphNodesDomain(case(path, base="g_meta", cap=3, hops=3, readout="centre")[0].domain, {"train": 1})
    one, again = (domain.prepare(domain.episode("train", 5), CPU, torch.float64) for _ in range(2))
    assert torch.equal(one.support.context["features"], again.support.context["features"])
    sizes = (one.support.inputs != 0).sum(1)
    assert (sizes >= 1).all() and one.support.inputs.shape[1] <= 3 * len(sizes)

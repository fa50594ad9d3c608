"""Tests of one episode under several label orders, and by the statistics of its support set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from toy import NUM_CLASSES, accuracy, cross_entropy, make_episode, make_net

from cml_dist.config.load import parse_config
from cml_dist.data.base import Domain
from cml_dist.distributed.world import World
from cml_dist.meta.inner import adapt
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import Method
from cml_dist.nets.heads import SharedHead
from cml_dist.nets.network import CmlNet
from cml_dist.run.evaluator import evaluate, label_orders, score_episode
from cml_dist.types import Batch, Episode

ALONE = World(accelerator=None, rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
METHOD = Method.sgd(2, 0.3, 0.3)
CONFIG = parse_config({"domain": {"name": "sinusoid"}})


class Noise(Domain):
    """Episodes of the toy, which have little to learn: scores differ between label orders."""

    input_shape, output_dim = (5,), NUM_CLASSES

    def __init__(self, family: str = "vector") -> None:
        self.family = family

    def episode(self, split, index):
        made = make_episode(self.family, index)
        return Episode(made.support, made.query, split, index, ways=NUM_CLASSES)

    def prepare(self, episode, device, dtype):
        return episode

    loss, score = staticmethod(cross_entropy), staticmethod(accuracy)


def parts(net):
    params = {n: p.detach().double() for n, p in net.named_parameters()}
    return params, Problem(net, cross_entropy, accuracy, {})


def report(net, permutations):
    params, problem = parts(net)
    model = SimpleNamespace(problem=problem, method=METHOD)
    made = SimpleNamespace(
        domain=Noise(), model=model, dtype=torch.float64, plan=SimpleNamespace(test_inner_steps=METHOD.inner_steps)
    )
    options = {"split": "test", "num_episodes": 6, "permutations": permutations}
    return evaluate(CONFIG, made, ALONE, params, ("meta",), **options)["meta"]


def test_scores_are_means_over_label_orders_and_the_spread_is_told():
    net = make_net("vector", colearner=False)
    params, problem = parts(net)
    found = report(net, 4)
    for index in range(6):
        orders = label_orders(Noise().episode("test", index), 4)
        scores = torch.stack([score_episode(params, one, problem, METHOD, ("meta",)) for one in orders])
        assert found.scores[index] == pytest.approx(scores.mean().item(), abs=1e-12)
        assert found.order_sd[index] == pytest.approx(scores.std().item(), abs=1e-12)
    assert found.summary()["label_order_sd"] > 0
    assert "label_order_sd" not in report(net, 1).summary()


def test_an_ensemble_is_scored_by_the_mean_of_its_outputs():
    nets = [make_net("vector", colearner=False, seed=seed) for seed in range(3)]
    (first, problem), *rest = [parts(net) for net in nets]
    others, episode = [params for params, _ in rest], Noise().episode("test", 0)
    outputs = [problem.answers(adapt(p, episode, problem, METHOD), episode, ("meta",))[0] for p in (first, *others)]
    problem.score = cross_entropy  # which no rounding hides
    found = score_episode(first, episode, problem, METHOD, ("meta",), others=others)
    assert found.item() == pytest.approx(cross_entropy(sum(outputs) / 3, episode.query.targets).item(), rel=1e-12)


def test_orders_are_the_episodes_own():
    """The first is that of the episode; the others are a pure function of split and index, the same for both sets."""
    episode = Noise().episode("test", 3)
    first, *others = label_orders(episode, 5)
    assert first is episode
    for other, again in zip(others, label_orders(episode, 5)[1:], strict=True):
        assert torch.equal(other.support.targets, again.support.targets)
        pairs = zip(episode.support.targets.tolist(), other.support.targets.tolist(), strict=True)
        order = dict(pairs)
        assert sorted(order.values()) == list(range(NUM_CLASSES))
        assert other.query.targets.tolist() == [order[label.item()] for label in episode.query.targets]


def test_a_head_that_treats_labels_alike_has_no_spread():
    net = make_net("vector", colearner=False)
    torch.manual_seed(5)
    assert report(CmlNet(net.body, SharedHead(6).double()), 6).summary()["label_order_sd"] < 1e-12


def test_by_the_support_sets_statistics_an_answer_is_its_own():
    """With batch norm, one query image alone and among others; and the support set's own answers do not change."""
    net = make_net("map", colearner=False)
    params, problem = parts(net)
    episode = Noise("map").episode("test", 0)
    adapted = adapt(params, episode, problem, METHOD)

    def answers(query, norm):
        asked = Episode(episode.support, query, "test", 0, ways=NUM_CLASSES)
        return problem.answers(adapted, asked, ("meta",), norm)[0]

    def one(number):
        return Batch(episode.query.inputs[number : number + 1], episode.query.targets[number : number + 1])

    together = answers(episode.query, "support")
    for number in range(len(episode.query.targets)):
        assert torch.allclose(answers(one(number), "support")[0], together[number], rtol=1e-12)
    assert not torch.allclose(answers(one(0), "batch")[0], answers(episode.query, "batch")[0], rtol=1e-3)
    own = answers(episode.support, "support")
    assert torch.allclose(own, answers(episode.support, "batch"), rtol=1e-12)
    assert torch.equal(answers(episode.query, "batch"), answers(episode.query, "batch")), "the network stays as it was"

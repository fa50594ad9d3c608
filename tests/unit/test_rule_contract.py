"""What a method may be: rules that break their contract, settings that contradict each other, and which layer wins."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import yaml
from torch import Tensor, nn

from cml_dist.config.keys import annotated
from cml_dist.config.load import Layers, find_recipe, layered, merge, parse_config, read_yaml, recipes
from cml_dist.config.methods import method_title
from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import GradFn, InnerRule, Method
from cml_dist.methods.check import check_rule, made_up_episode
from cml_dist.methods.inner_optim import Adam, Momentum
from cml_dist.methods.maml_pp import MamlPlusPlus
from cml_dist.methods.meta_sgd import MetaSgd
from cml_dist.methods.sharp import SharpSgd
from cml_dist.methods.warpgrad import WarpGrad
from cml_dist.nets.build import make_network, method_of
from cml_dist.nets.network import CmlNet
from cml_dist.types import Episode, Features, Params

WAYS, SHAPE = 3, (4,)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(*SHAPE, 5)

    def forward(self, x: Tensor) -> Features:
        hidden = torch.tanh(self.layer(x))
        return Features(hidden, hidden)


def check(rule: InnerRule, steps: int = 2, order: int = 2, ways: int = WAYS, dtype: str = "float32") -> None:
    """Try a rule as a run does before it trains."""
    torch.manual_seed(0)
    net = CmlNet(Body(), nn.Linear(5, WAYS), nn.Linear(5, WAYS)).to(getattr(torch, dtype))
    net.add_rule(rule.init(net.adaptable()))
    params = {n: p.detach() for n, p in net.named_parameters()}
    loss = nn.functional.cross_entropy if ways else nn.functional.mse_loss

    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()

    episode = made_up_episode(SHAPE, ways, WAYS, next(net.parameters()))
    check_rule(Problem(net, loss, score, {}), Method(steps, rule, 0.7, order), params, episode)


def refusal(rule: InnerRule, **how: int) -> str:
    with pytest.raises(ConfigError) as caught:
        check(rule, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------- rules that break their contract


class Forgets(InnerRule):
    """Returns what moved, and not the bias."""

    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        after = super().update(meta, fast, const, grad, k)
        del after["head.bias"]
        return after


class ForgetsLater(Forgets):
    """In the second step alone."""

    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        return super().update(meta, fast, const, grad, k) if k else InnerRule.update(self, meta, fast, const, grad, k)


class Invents(InnerRule):
    """Has a state that start does not."""

    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        after = super().update(meta, fast, const, grad, k)
        return {**after, "moment.head.bias": after["head.bias"]}


class Reshapes(InnerRule):
    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        after = super().update(meta, fast, const, grad, k)
        return {**after, "head.bias": after["head.bias"][:, None]}


class Widens(InnerRule):
    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        after = super().update(meta, fast, const, grad, k)
        return {**after, "head.bias": after["head.bias"].double()}


class Detaches(InnerRule):
    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        after = super().update(meta, fast, const, grad, k)
        return {**after, "head.bias": after["head.bias"].detach()}


class WithoutGrad(InnerRule):
    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        grads = grad(fast)
        with torch.no_grad():
            return {n: value - 0.1 * grads[n] for n, value in fast.items()}


class Idle(InnerRule):
    """Declares two, and uses one."""

    def init(self, params: Params) -> Params:
        return {"rule.scale": torch.ones(1), "rule.x": torch.ones(1)}

    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        grads = grad(fast)
        return {n: value - 0.1 * meta["rule.scale"] * grads[n] for n, value in fast.items()}


NAMES_REMEDY = "return a tensor for each name in fast, and no other"
TYPE_REMEDY = "return each name of fast with the shape and type that it came with"
GRAPH_REMEDY = "make it from fast, meta and grad(...) by torch operations, without detach, .data or no_grad"
NO_GRAPH = "without a graph, so that no meta-gradient can pass through the step"
IDLE_REMEDY = "use it in start, view or update, set method.inner_steps above 0, or leave it out of init"
BROKEN = [
    (Forgets, f"Forgets.update leaves out head.bias; {NAMES_REMEDY}"),
    (ForgetsLater, f"ForgetsLater.update leaves out head.bias; {NAMES_REMEDY}"),
    (Invents, f"Invents.update adds moment.head.bias; {NAMES_REMEDY}"),
    (
        Reshapes,
        f"Reshapes.update gives head.bias as (3, 1) torch.float32, where fast has (3,) torch.float32; {TYPE_REMEDY}",
    ),
    (Widens, f"Widens.update gives head.bias as (3,) torch.float64, where fast has (3,) torch.float32; {TYPE_REMEDY}"),
    (Detaches, f"Detaches.update gives head.bias {NO_GRAPH}; {GRAPH_REMEDY}"),
    (WithoutGrad, f"WithoutGrad.update gives body.layer.weight {NO_GRAPH}; {GRAPH_REMEDY}"),
    (
        Idle,
        "Idle declares rule.x, which the outer loss does not depend on: it would never be learned; " + IDLE_REMEDY,
    ),
]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("rule", "message"), BROKEN, ids=[rule.__name__ for rule, _ in BROKEN])
def test_a_broken_rule_is_refused_with_its_name_the_parameter_and_the_remedy(rule, message, order):
    assert refusal(rule(0.1, 0.2), order=order) == message


def test_learned_step_sizes_without_a_step_are_refused():
    message = refusal(MetaSgd(0.1, 0.2), steps=0)
    assert message.startswith("MetaSgd declares rule.lr.body.layer.weight, ")
    assert "set method.inner_steps above 0" in message


@dataclass(frozen=True)
class ByView(InnerRule):
    """What it learns counts in the view and at the start alone."""

    def init(self, params: Params) -> Params:
        return {"rule.start": torch.zeros_like(params["head.bias"]), "rule.gain": torch.ones_like(params["head.bias"])}

    def start(self, meta: Params, episode: Episode) -> tuple[Params, Params]:
        fast, const = super().start(meta, episode)
        return {**fast, "head.bias": fast["head.bias"] + meta["rule.start"]}, const

    def view(self, meta: Params, fast: Params, const: Params, k: int) -> Params:
        seen = super().view(meta, fast, const, k)
        return {**seen, "head.bias": seen["head.bias"] * meta["rule.gain"]}


@pytest.mark.parametrize("rule", [InnerRule, MetaSgd, MamlPlusPlus, SharpSgd, WarpGrad, Momentum, Adam, ByView])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("ways", [0, WAYS])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sound_rules_pass(rule, order, ways, dtype):
    for steps in (1, 2, 5):
        check(rule(0.1, 0.2), steps, order, ways, dtype)


@pytest.mark.parametrize("rule", [InnerRule, Momentum, Adam, ByView])
def test_sound_rules_pass_without_a_step(rule):
    check(rule(0.1, 0.2), steps=0)


def test_only_what_adapts_has_a_step_size_that_is_learned():
    check(MetaSgd(0.1, 0.2, adapts=frozenset({"head.weight", "head.bias"})))


# --------------------------------------------------------------------------- settings that contradict each other

GLYPHS = {"domain": {"name": "glyphs"}}
SINUSOID = {"domain": {"name": "sinusoid"}, "model": {"backbone": "mlp"}}


def config_of(*overrides: str, recipe: dict = GLYPHS) -> RunConfig:
    return parse_config(merge(recipe, overrides))


CONTRADICTIONS = [
    (
        "method.name=anil method.body_lr=0.1",
        "method.body_lr is 0.1, but method.name anil adapts the head alone: leave method.body_lr out, or set "
        "method.name=maml",
    ),
    (
        "method.name=boil method.head_lr=0.1",
        "method.head_lr is 0.1, but method.name boil adapts the body alone: leave method.head_lr out, or set",
    ),
    (
        "method.name=meta_sgd method.inner_optim=adam",
        "method.inner_optim is adam, but method.name meta_sgd has a step of its own: set method.inner_optim=sgd, or "
        "method.name=maml",
    ),
    (
        "method.name=boil method.gamma=0.5",
        "method.gamma is 0.5, but method.name boil has no co-learner: set method.colearner=true, or leave "
        "method.gamma out",
    ),
    (
        "method.colearner=false",
        "method.colearner is false, but method.name is cml: set method.name=maml, or method.colearner=true",
    ),
    (
        "method.name=fomaml method.order=2",
        "method.order is 2, but method.name fomaml is first order: set method.name=maml, or method.order=1",
    ),
    (
        "method.name=maml_pp method.inner_steps=0",
        "method.inner_steps is 0, but method.name maml_pp learns rates for each step: set it to 1 or more",
    ),
    (
        "method.multi_step_loss=9",
        "method.multi_step_loss is 9, but method.name cml has none: set method.name=maml_pp, or leave "
        "method.multi_step_loss out",
    ),
    (
        "method.name=fomaml method.first_order_steps=9",
        "method.first_order_steps is 9, but method.order is 1 in all meta-steps: set method.order=2, or "
        "method.first_order_steps=0",
    ),
    (
        "method.first_order_steps=9 train.steps=9",
        "method.first_order_steps is 9, but train.steps is 9: order 2 never begins; set method.order=1, or fewer",
    ),
    (
        "method.sharp=both",
        "method.sharp is both, but method.name cml has no ascent: set method.name=sharp_maml, or leave method.sharp "
        "out",
    ),
    (
        "method.name=sharp_maml method.inner_steps=0",
        "method.sharp is both, but method.inner_steps is 0: no step can ascend; set method.sharp=upper, or "
        "method.inner_steps to 1 or more",
    ),
    (
        "method.warp=conv",
        "method.warp is conv, but method.name cml has no warp layers: set method.name=warpgrad or tnet, or leave "
        "method.warp out",
    ),
    (
        "method.name=warpgrad method.inner_steps=0",
        "method.inner_steps is 0, but method.name warpgrad learns from each step: set it to 1 or more",
    ),
    (
        "method.name=tnet method.adapts=[head,lora:2]",
        "method.adapts has lora:2, whose factors move by plain SGD: set method.name=maml and method.inner_optim=sgd",
    ),
    (
        "method.augment=mgaug engine.compile=on",
        "engine.compile is on, but under method.augment each episode has masks of its own, which no graph can hold: "
        "set engine.compile=off",
    ),
    (
        "train.patience=3 eval.every=0",
        "train.patience is 3, but eval.every is 0: nothing is validated before the end; set eval.every, or "
        "train.patience=null",
    ),
    (
        "eval.ensemble=5 train.steps=2000",
        "eval.ensemble is 5, but the run has 4 validations: lower it, or eval.every",
    ),
    (
        "method.name=cl method.colearner=true",
        "method.colearner is true, but method.name cl sets it to adapts: leave it out, or set method.name=cml or maml",
    ),
    (
        "model.backbone=resnet18 model.extra_blocks=3",
        "model.extra_blocks is 3, but model.backbone resnet18 has none: leave it out, or set model.backbone=conv4",
    ),
    ("engine.name=graph engine.micro_batch=2", "engine.micro_batch is set, but engine.name graph keeps the whole loop"),
    (
        "method.name=anil method.colearner=true eval.learner=co",
        "eval.learner is co, but eq. 9 adapts the body alone, which does not adapt under method.name anil: set "
        "eval.learner=meta, or eval.co_adapt=released",
    ),
    (
        "method.name=boil eval.learner=co",
        "eval.learner is co, but method.name boil has no co-learner: set eval.learner=meta",
    ),
    (
        "method.colearner=untrained eval.learner=co",
        "eval.learner is co, but the co-learner is not trained (method.colearner=untrained): set eval.learner=meta",
    ),
    (
        "model.colearner.kind=prototype eval.learner=co",
        "eval.learner is co, but eq. 9 adapts by the co-learner's loss on the support set, of which its prototypes are "
        "made: set eval.learner=meta, or eval.co_adapt=released",
    ),
    (
        "method.colearner=adapts model.colearner.kind=prototype",
        "model.colearner.kind is prototype, which has nothing that adapts by a support loss, but method.colearner is "
        "adapts: set model.colearner.kind=dense",
    ),
    (
        "model.head=shared method.inner_steps=0",
        "model.head is shared, but method.inner_steps is 0: all classes keep the same vector; set "
        "method.inner_steps to 1 or more, or model.head=centroid or ridge",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS, ids=[overrides for overrides, _ in CONTRADICTIONS])
def test_contradictions_are_refused_with_the_settings_and_the_remedy(overrides, message):
    with pytest.raises(ConfigError) as caught:
        config_of(*overrides.split())
    assert str(caught.value).startswith(f"configuration: {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        *(
            (f"model.head={head}", f"model.head is {head}, but domain sinusoid has no classes: set model.head=linear")
            for head in ("shared", "centroid", "ridge")
        ),
        (
            "model.colearner.kind=prototype",
            "model.colearner.kind is prototype, but domain sinusoid has no classes: set model.colearner.kind=dense",
        ),
        (
            "eval.permutations=10",
            "eval.permutations is 10, but domain sinusoid has no labels: set eval.permutations=1",
        ),
    ],
)
def test_what_needs_classes_is_refused_for_regression(override, message):
    config_of(recipe=SINUSOID)
    with pytest.raises(ConfigError) as caught:
        config_of(override, recipe=SINUSOID)
    assert str(caught.value) == f"configuration: {message}"


@pytest.mark.parametrize(
    ("name", "pattern", "stray", "only"),
    [
        ("anil", "*bias", "body.layers.0.bias", "head"),
        ("anil", "last:1", "body.layers.1.weight", "head"),
        ("boil", "head", "head.weight", "body"),
    ],
)
def test_a_pattern_that_strays_from_what_a_method_adapts_is_refused_once_the_network_is_there(
    name, pattern, stray, only
):
    config = config_of(f"method.name={name}", f"method.adapts=['{pattern}']", recipe=SINUSOID)
    with pytest.raises(ConfigError) as caught:
        make_network(config, (1,), 1)
    assert str(caught.value) == (
        f"method.adapts selects {stray}, but method.name {name} adapts the {only} alone; leave method.adapts out, "
        "or set method.name=maml"
    )


@pytest.mark.parametrize(
    ("name", "pattern", "adapting"), [("anil", "head.b*", ["head.bias"]), ("boil", "*.1.bias", ["body.layers.1.bias"])]
)
def test_a_pattern_inside_what_a_method_adapts_is_not(name, pattern, adapting):
    config = config_of(f"method.name={name}", f"method.adapts=['{pattern}']", recipe=SINUSOID)
    net = make_network(config, (1,), 1)
    assert list(method_of(config, net).rule.rates(net.adaptable())) == adapting


# --------------------------------------------------------------------------- layers

RECIPE = {
    **GLYPHS,
    "method": {"name": "cml", "inner_steps": 5, "inner_lr": 0.4, "gamma": 0.3, "order": 2},
    "optim": {"lr": 0.01},
}
MINE = ("method.inner_steps=3", "method.inner_lr=0.2", "method.colearner=true", "method.gamma=0.6")


def layers(*overrides: str, recipe: dict = RECIPE) -> tuple[Layers, RunConfig]:
    found = layered(recipe, overrides)
    return found, parse_config(found.data)


def test_a_recipe_counts_where_nothing_is_said():
    found, config = layers()
    assert (config.method.name, config.method.inner_steps, config.method.gamma) == ("cml", 5, 0.3)
    assert config.method.colearner is True and config.optim.lr == 0.01
    assert found.gave_way == {}
    from_recipe = ("domain.name", "optim.lr", *(f"method.{key}" for key in RECIPE["method"]))
    assert found.sources == {"method.colearner": "method cml", **dict.fromkeys(from_recipe, "recipe")}


@pytest.mark.parametrize(("name", "order"), [("maml", 2), ("fomaml", 1)])
def test_a_recipes_method_counts_for_its_family(name, order):
    """Steps and rates stay; the order, and with the co-learner its weight, are as the name says."""
    found, config = layers(f"method.name={name}")
    method = config.method
    assert (method.name, method.inner_steps, method.inner_lr) == (name, 5, 0.4)
    assert (method.order, method.colearner, method.gamma) == (order, False, 0.0)
    assert found.gave_way == {"method.order": 2, "method.gamma": 0.3}
    assert (found.sources["method.name"], found.sources["method.inner_lr"]) == ("command line", "recipe")
    assert found.sources.get("method.order") == {"maml": None, "fomaml": "method fomaml"}[name]
    assert "method.gamma" not in found.sources


def test_a_method_may_set_the_outer_optimizer_where_a_recipe_says_nothing():
    found, config = layers("method.name=maml_pp")
    assert (config.method.inner_steps, config.method.inner_lr, config.method.multi_step_loss) == (5, 0.1, 7500)
    assert (config.optim.schedule, config.optim.final_lr_factor, config.optim.lr) == ("cosine", 0.01, 0.01)
    assert found.sources["optim.schedule"] == "method maml_pp"
    found, config = layers("method.name=maml_pp", recipe={**RECIPE, "optim": {"schedule": "constant"}})
    assert (config.optim.schedule, found.sources["optim.schedule"]) == ("constant", "recipe")
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("name", "colearner", "title"), [("cl", "adapts", "MAML + CL"), ("noise", "untrained", "MAML + noise")]
)
def test_the_papers_controls_have_names(name, colearner, title):
    """With the recipe's steps and rates, and the weight of the co-learner's loss."""
    found, config = layers(f"method.name={name}")
    method = config.method
    assert (method.colearner, method.inner_steps, method.gamma) == (colearner, 5, 0.3)
    assert method_title(config) == title and found.gave_way == {"method.order": 2}
    assert config.method.model_copy(update={"name": "maml"}) == layers(
        "method.name=maml", f"method.colearner={colearner}"
    )[1].method


def test_within_a_family_the_weight_stays_with_the_co_learner():
    found, config = layers("method.name=fomaml", "method.colearner=true")
    assert (config.method.order, config.method.colearner, config.method.gamma) == (1, True, 0.3)
    assert found.gave_way == {"method.order": 2}


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("anil", {"adapts": ("head",), "inner_steps": 1, "inner_lr": 0.5}),
        ("boil", {"adapts": ("body",), "inner_steps": 1, "inner_lr": 0.5}),
        ("meta_sgd", {"adapts": None, "inner_steps": 1, "inner_lr": 0.1}),
    ],
)
def test_under_another_name_that_methods_defaults_count(name, defaults):
    found, config = layers(f"method.name={name}")
    assert {key: getattr(config.method, key) for key in defaults} == defaults
    assert (config.method.colearner, config.method.gamma, config.method.order) == (False, 0.0, 2)
    assert config.optim.lr == 0.01  # other sections stay
    assert found.gave_way == {f"method.{key}": value for key, value in RECIPE["method"].items() if key != "name"}
    said = {key for key, value in defaults.items() if value is not None}
    assert found.sources == {
        "domain.name": "recipe",
        "optim.lr": "recipe",
        "method.name": "command line",
        **{f"method.{key}": f"method {name}" for key in said},
    }


@pytest.mark.parametrize("name", ["cml", "maml", "fomaml", "anil", "boil", "meta_sgd"])
def test_the_command_line_wins_over_all(name):
    found, config = layers(f"method.name={name}", *MINE, "optim.lr=0.1")
    method = config.method
    assert (method.name, method.inner_steps, method.inner_lr) == (name, 3, 0.2)
    assert (method.colearner, method.gamma, config.optim.lr) == (True, 0.6, 0.1)
    chosen = {"method.name", "optim.lr", *(override.partition("=")[0] for override in MINE)}
    assert {key for key, source in found.sources.items() if source == "command line"} == chosen
    assert not chosen & found.gave_way.keys()
    assert found.gave_way == ({} if name == "cml" else {"method.order": 2})


@pytest.mark.parametrize("name", ["anil", "boil", "meta_sgd"])
def test_a_recipe_may_be_of_any_method(name):
    """Its settings count for that method, above the published ones, and give way to another's name."""
    recipe = {**GLYPHS, "method": {"name": name, "inner_steps": 4, "colearner": True, "gamma": 0.2}}
    found, config = layers(recipe=recipe)
    assert (config.method.inner_steps, config.method.gamma) == (4, 0.2) and found.gave_way == {}
    assert found.sources["method.inner_steps"] == "recipe"
    assert found.sources["method.inner_lr"] == f"method {name}"
    found, config = layers("method.name=cml", recipe=recipe)
    assert (config.method.inner_steps, config.method.gamma, config.method.colearner) == (1, 1.0, True)
    assert found.gave_way == {"method.inner_steps": 4, "method.colearner": True, "method.gamma": 0.2}


def test_a_recipe_without_a_name_is_cmls():
    recipe = {**GLYPHS, "method": {"inner_steps": 4}}
    assert layers(recipe=recipe)[0].gave_way == layers("method.name=maml", recipe=recipe)[0].gave_way == {}
    assert layers("method.name=boil", recipe=recipe)[0].gave_way == {"method.inner_steps": 4}


@pytest.mark.parametrize("overrides", [(), ("method.inner_steps=2",), ("method={name: maml, gamma: 0.5}",)])
def test_a_weight_without_co_learner_gives_way_to_the_command_line_alone(overrides):
    """One that a recipe, or the command line itself, sets beside such a method is a mistake, and not passed over."""
    recipe = {**GLYPHS, "method": {"name": "maml", "gamma": 0.5}}
    with pytest.raises(ConfigError, match="method.gamma is 0.5, but method.name maml has no co-learner: set"):
        layers(*overrides, recipe=recipe)
    with_colearner = {**GLYPHS, "method": {"name": "boil", "colearner": True, "gamma": 0.5}}
    found, config = layers("method.colearner=false", recipe=with_colearner)
    assert (config.method.gamma, found.gave_way) == (0.0, {"method.gamma": 0.5})


def test_layers_leave_the_recipe_as_it_was():
    recipe = {**GLYPHS, "method": dict(RECIPE["method"])}
    layers("method.name=anil", recipe=recipe)
    assert recipe["method"] == RECIPE["method"]


OVERRIDES = [
    ("method.name=anil", "method.colearner=true"),
    ("method.name=fomaml",),
    ("method.name=meta_sgd", "run.trackers=[tensorboard, wandb]", "optim.betas=[0.5, 0.9]", "optim.lr=1e-5"),
    ("method.adapts=[head, '*.bias']", "run.dir='a #b: [c] ä'", "engine.micro_batch=null", "run.tracker_project=null"),
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=[" ".join(overrides) for overrides in OVERRIDES])
@pytest.mark.parametrize("recipe", [name for name in recipes() if name != "pretrain"])  # its method is no choice
def test_what_is_shown_reads_back_to_the_same(recipe, overrides):
    """With the source of each setting that is no default behind it."""
    made = read_yaml(find_recipe(recipe))
    made["domain"].setdefault("root", "data/mine")  # my_images is for any set
    if made["domain"]["name"] == "sinusoid":
        del made["domain"]["root"]
    found, config = layers(*overrides, recipe=made)
    told, rest = annotated(config, found.sources)
    shown = told + rest
    assert parse_config(yaml.safe_load(shown)) == parse_config(yaml.safe_load(told)) == config
    assert shown.count("  # command line\n") == len(overrides)
    others = ("  # recipe", f"  # method {config.method.name}")
    assert sum(line.endswith(others) for line in shown.splitlines()) == len(found.sources) - len(overrides)

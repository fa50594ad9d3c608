"""The shipped recipes: found by short name, valid, and those settings of the paper that they claim."""

from __future__ import annotations

from pathlib import Path

import pytest

from cml_dist.config.load import find_recipe, load_config, recipes
from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
BASELINES = ["protonet", "r2d2"]
"""On Glyphs."""
NODES = ["amazon_computers", "citeseer", "cora_full"]
IMAGES = ["cifar_fs", "glyphs", "mini_imagenet", "omniglot", "vgg_flower"]
SETS = ["my_images", "my_images_pretrained", "pretrain"]
"""Of any packed set."""
NAMES = sorted([*IMAGES, *BASELINES, *NODES, *SETS, "sinusoid"])
DOMAINS = dict.fromkeys(BASELINES, "glyphs") | dict.fromkeys(NODES, "graph_nodes") | dict.fromkeys(SETS, "images")


def load(name: str) -> RunConfig:
    return load_config(name, ["domain.root=data/mine"] if name in SETS else ())


def test_these_are_all_recipes():
    assert list(recipes()) == NAMES
    assert [path.parent for path in recipes().values()] == [ROOT / "configs" / "recipes"] * len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_and_has_a_run_folder_of_its_own(name):
    config = load(name)
    assert config.domain.name == DOMAINS.get(name, name)
    assert config.run.dir == f"runs/{name}"


@pytest.mark.parametrize("name", IMAGES)
def test_image_recipes_have_the_settings_of_the_paper(name):
    config = load(name)
    domain, method, optim = config.domain, config.method, config.optim
    assert (domain.ways, domain.queries, config.train.episodes_per_step) == (5, 15, 4)
    assert (config.model.backbone, config.model.filters, config.model.colearner.depth) == ("conv4", 64, 2)
    assert (method.name, method.inner_steps, method.inner_lr, method.gamma, method.order) == ("cml", 1, 0.5, 1.0, 2)
    assert (optim.name, optim.lr, optim.weight_decay, optim.clip_norm) == ("adam", 1e-3, 0.0, None)
    if name != "glyphs":
        assert (config.train.steps, config.eval.episodes) == (30_000, 10_000)


def test_the_sinusoid_recipe_has_the_settings_of_the_paper():
    config = load("sinusoid")
    assert (config.model.backbone, config.model.hidden, config.model.colearner.depth) == ("mlp", (40, 40), 1)
    method = config.method
    assert (method.name, method.inner_steps, method.inner_lr, method.gamma) == ("cml", 1, 0.01, 0.2)
    assert config.train.episodes_per_step == 4
    assert (config.domain.family, config.domain.shots) == ("sinusoid", 10)


@pytest.mark.parametrize("name", NODES)
def test_node_recipes_have_the_settings_of_the_paper(name):
    config = load(name)
    assert (config.domain.ways, config.domain.shots) == (5 if name == "cora_full" else 2, 1)
    assert (config.model.backbone, config.model.hidden, config.model.colearner.depth) == ("gcn", (16, 16), 1)
    method = config.method
    assert (method.name, method.inner_steps, method.inner_lr, method.gamma, method.order) == ("cml", 20, 0.05, 0.2, 2)
    assert (config.optim.name, config.optim.lr, config.train.episodes_per_step) == ("adam", 1e-3, 1)


@pytest.mark.parametrize("given", ["glyphs", "glyphs.yaml", "configs/recipes/glyphs.yaml"])
def test_recipes_are_found_from_any_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glyphs").mkdir()  # a folder of that name is no recipe
    assert find_recipe(given) == ROOT / "configs" / "recipes" / "glyphs.yaml"


def test_a_file_goes_before_a_recipe_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "glyphs.yaml"
    mine.write_text("domain: {name: glyphs}\n")
    assert find_recipe("glyphs.yaml").resolve() == mine
    assert find_recipe(str(mine)) == mine


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("omniglott", "omniglott is neither a file nor a recipe; did you mean omniglot"),
        ("elsewhere/glyphs", "elsewhere/glyphs is neither a file nor a recipe"),
        ("zzz", "zzz is neither a file nor a recipe; give the path of a YAML file, or one of amazon_computers"),
        (".", ". is a folder; give the path"),
    ],
)
def test_a_name_that_is_not_found(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        find_recipe(given)
    assert message in str(caught.value)

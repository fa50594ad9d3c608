"""Reading a configuration: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import signal

import pytest

from cml_dist.cli import main
from cml_dist.config import schema
from cml_dist.config.keys import valid_keys
from cml_dist.config.load import find_recipe, layered, load_config, merge, parse_config, read_yaml
from cml_dist.config.plan import make_plan, plan_rows, share
from cml_dist.config.presets import PRESETS
from cml_dist.config.schema import STOP_SIGNALS
from cml_dist.config.shape import shape_for
from cml_dist.errors import ConfigError
from cml_dist.registry import BACKBONES, DOMAINS, HEADS, INNER_OPTIMS, METHODS, DomainEntry
from cml_dist.run.interrupts import Interrupts

GLYPHS = {"domain": {"name": "glyphs"}}


def parse(*overrides, base=GLYPHS):
    return parse_config(merge(base, overrides))


def test_defaults_overrides_and_types():
    config = parse("train.steps=7", "optim.lr=1e-2", "method.inner_steps=5", "model.pretrained=weights.pth")
    assert (config.train.steps, config.optim.lr, config.method.inner_steps) == (7, 0.01, 5)
    assert config.model.pretrained == "weights.pth"
    assert config.domain.ways == 5
    with pytest.raises(Exception, match="frozen"):
        config.train.steps = 8


def test_a_section_given_as_a_whole_replaces_the_files_and_a_file_may_use_whole_keys():
    file = {**GLYPHS, "method": {"inner_lr": 0.5}, "train.steps": 7}
    config = parse("method={name: maml, inner_steps: 3}", base=file)
    assert (config.method.name, config.method.inner_steps, config.method.inner_lr) == ("maml", 3, 0.01)
    assert config.train.steps == 7


def test_a_home_folder_is_meant_wherever_a_path_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse("run.dir=~/a", "domain.root=~/b", "model.pretrained=~/c.pth", "parallel.deepspeed=~/d.json")
    places = config.run.dir, config.domain.root, config.model.pretrained, config.parallel.deepspeed
    assert places == tuple(f"{tmp_path}/{name}" for name in ("a", "b", "c.pth", "d.json"))
    images = {"domain": {"name": "images", "root": "s3://bucket/~set", "cache": "~"}}
    assert parse(base=images).domain.cache == str(tmp_path)
    # Nothing else is expanded, and no folder is ever called ~someone.
    assert parse("run.dir=a/~/$HOME", base=images).run.dir == "a/~/$HOME"
    for key in ("run.dir", "model.pretrained"):
        with pytest.raises(ConfigError, match=f"{key}: '~no-such-user/x' names no home folder that is known: write"):
            parse(f"{key}=~no-such-user/x")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ["train.stepz", "did you mean train.steps?"]),
        ("domain.wayz=3", ["domain.wayz", "did you mean domain.ways?"]),
        ("domain.augment.flop=1", ["domain.augment.flop", "did you mean domain.augment.flip?"]),
        ("trian.steps=4", ["trian"]),
        ("domain.ways=1", ["domain.ways is 1", "greater than or equal to 2"]),
        ("domain.name=glyph", ["'glyph'", "use one of glyphs"]),
        ("optim.name=adm", ["optim.name is 'adm'", "'adam'"]),
        ("optim.lr=nan", ["optim.lr"]),
        ("method.gamma=-1", ["method.gamma is -1"]),
        ("method=maml", ["method is 'maml', but it is a section", "e.g. method.name="]),
        ("train=3", ["train is 3, but it is a section", "e.g. train.steps="]),
        ("model.colearner=3", ["model.colearner is 3, but it is a section", "e.g. model.colearner.kind="]),
        ("run.seed=-1", ["run.seed is -1"]),
        ("train.steps=abc", ["train.steps is 'abc'", "integer"]),
        ("model.colearner.depth=9", ["model.colearner.depth is 9"]),
        ("train.steps.x=1", ["train.steps is {'x': 1}", "train.steps should be a valid integer"]),
        ("foo", ["'foo'", "train.steps=1000"]),
        ("=3", ["section.key=value"]),
        ("train.steps={", ["no valid YAML"]),
        ("run.dir=2024-99-99", ["no valid YAML"]),
    ],
)
def test_refusals_name_the_thing_the_value_and_the_remedy(override, words):
    with pytest.raises(ConfigError) as caught:
        parse(override, base={**GLYPHS, "train": {"steps": 10}, "method": {"name": "cml"}})
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_of_one_domain_are_refused_by_another():
    with pytest.raises(ConfigError, match="domain.ways is not a setting of domain sinusoid"):
        parse_config({"domain": {"name": "sinusoid", "ways": 5}})


@pytest.mark.parametrize("table", [METHODS, INNER_OPTIMS, HEADS, BACKBONES, DOMAINS])
def test_every_name_leads_to_something_that_builds(table):
    for name, entry in table.items():
        assert not entry.target or callable(entry.load()), name
        assert not isinstance(entry, DomainEntry) or hasattr(schema, entry.settings), name


def test_every_key_has_a_meaning_or_speaks_for_itself():
    keys = valid_keys()
    assert {"domain.ways", "domain.root", "optim.lr", "run.dir", "parallel.strategy"} <= set(keys)
    silent = [key for key, meaning in keys.items() if ";" not in meaning]
    assert silent == []
    assert next(iter(keys)) == "domain.name"
    assert all(meaning.count("null") <= 1 for meaning in keys.values())


@pytest.mark.parametrize("name", ["SIGCHLD", "SIGWINCH", "SIGKILL", "SIGSEGV", "SIGINT", "USR1", "15"])
def test_a_signal_that_does_not_ask_to_stop_is_refused_with_those_that_do(name):
    with pytest.raises(ConfigError) as caught:
        parse(f"run.stop_signals=[SIGUSR1, '{name}']")
    told = "should be 'SIGUSR1', 'SIGUSR2', 'SIGTERM', 'SIGHUP', 'SIGQUIT' or 'SIGXCPU'"
    key = "run.stop_signals.1"
    assert str(caught.value) == f"configuration: {key} is '{name}'; {key} {told}"


def test_all_that_ask_to_stop_can_be_caught():
    config = parse(f"run.stop_signals=[{','.join(STOP_SIGNALS)}]")
    with Interrupts(config.run.stop_signals) as interrupts:
        for name in STOP_SIGNALS:
            interrupts.stop = None
            signal.raise_signal(signal.Signals[name])
            assert interrupts.stop == name


@pytest.mark.parametrize(("total", "world"), [(4, 1), (4, 2), (4, 3), (1, 4), (7, 4)])
def test_shares_cover_all_once_and_evenly(total, world):
    parts = [share(total, rank, world) for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_plan_resolves_auto():
    assert make_plan(parse(), 1, {}).strategy == "single"
    assert make_plan(parse(), 2, {}).strategy == "ddp"
    assert make_plan(parse("method.inner_steps=5"), 1, {}).engine == "graph"  # until memory says otherwise
    assert make_plan(parse("method.inner_steps=5", "engine.micro_batch=2"), 1, {}).engine == "adjoint"
    config = parse("train.steps=1100", "eval.every=500")
    plan = make_plan(config, 3, {})
    rows = plan_rows(config, plan)
    assert plan.episodes_by_rank == (2, 1, 1) and "2 or 1 a process" in rows["world"]
    assert rows["validation"].startswith("3 x 200 episodes") and rows["training"].endswith("4,400 episodes")
    with pytest.raises(ConfigError, match="parallel.strategy"):
        make_plan(parse("parallel.strategy=single"), 2, {})


def test_the_plan_says_what_changes_in_the_course_of_a_run_and_what_a_longer_test_uses():
    config = parse("method.name=maml_pp", "method.first_order_steps=50", "eval.inner_steps=10")
    rows = plan_rows(config, make_plan(config, 1, {}))
    assert rows["method"] == (
        "MAML++, order 2, 5 inner steps of 0.1, multi-step loss for 7,500 meta-steps, first order for 50 meta-steps"
    )
    assert "adam at 0.001, cosine, " in rows["training"]
    sharp = parse("method.name=sharp_maml")
    ascents = plan_rows(sharp, make_plan(sharp, 1, {}))["method"].partition("0.1, ")[2]
    assert ascents == "ascents of 0.05 (both), each episode twice"
    assert rows["test"].endswith("10 inner steps, steps after 5 go on with the rates and norms of step 5")


def test_a_preset_sets_the_length_alone_above_the_recipe_and_below_the_command_line():
    recipe = read_yaml(find_recipe("glyphs"))
    layers = layered(recipe, ["train.steps=7"], preset="quick")
    config = parse_config(layers.data)
    assert (config.train.steps, config.eval.episodes, config.checkpoint.every) == (7, 100, 50)
    assert (layers.sources["train.steps"], layers.sources["eval.episodes"]) == ("command line", "preset quick")
    assert layers.sources["method.inner_lr"] == "recipe"
    assert load_config("glyphs", preset="standard") == load_config("glyphs")
    with pytest.raises(ConfigError, match="preset is 'fast'; use one of quick"):
        load_config("glyphs", preset="fast")
    paper, own = (load_config(name, preset="paper") for name in ("glyphs", "omniglot"))
    assert (paper.train, paper.eval) == (own.train, own.eval)
    assert own == load_config("omniglot")  # which has that length itself
    assert {key.split(".")[0] for length in PRESETS.values() for key in length} == {"train", "eval", "checkpoint"}


def test_a_preset_goes_through_a_launcher(tmp_path, capsys):
    words = ["launch", "slurm", "glyphs", "--preset", "quick", f"run.dir={tmp_path}", "--processes-per-node", "2"]
    assert main([*words, "--time", "1:00", "--dry-run"]) == 0
    assert "\nCONFIG=(glyphs --preset=quick run.device=cpu)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("left", "images", "shape"),
    [
        ({}, 100, (3, 5, 15)),
        ({}, 12, (3, 5, 7)),
        ({}, 5, (3, 2, 3)),
        ({}, 2, (3, 1, 1)),
        ({"shots": 1}, 12, (3, 1, 11)),
        ({"queries": 10}, 12, (3, 2, 10)),
        ({"ways": 7, "shots": 1, "queries": 15}, 12, (7, 1, 15)),  # what does not fit is refused by the data
    ],
)
def test_the_shape_that_is_left_open_fits_the_set(left, images, shape):
    domain = {"name": "images", "root": "x", "ways": None, "shots": None, "queries": None, **left}
    found = shape_for(parse_config({"domain": domain}), 3, lambda shots, queries: shots + queries <= images).domain
    assert (found.ways, found.shots, found.queries) == shape


def test_settings_by_their_old_names_are_read_with_a_line_that_names_the_new_ones(tmp_path):
    path, told = tmp_path / "old.yaml", []
    path.write_text("domain: {name: sinusoid}\nmodel: {backbone: mlp}\nrun: {dtype: float64, compute: dtype}\n")
    made = load_config(str(path), ["parallel.timeout_s=5", "engine.copies=cpu"], told.append)
    assert (made.run.precision, made.parallel.hang_timeout_s, made.engine.trajectory_device) == ("fp64", 5.0, "cpu")
    assert len(told) == 4
    assert "parallel.timeout_s is now parallel.hang_timeout_s; the old name is read until 0.3" in told
    path.write_text("domain: {name: sinusoid}\nmodel: {backbone: mlp}\nrun: {dtype: float32, compute: bfloat16}\n")
    assert load_config(str(path)).run.precision == "bf16"

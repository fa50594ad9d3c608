"""What the header says of an image set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from image_sets import write_set

from cml_dist.config.load import merge, parse_config
from cml_dist.domains.build import build_domain
from cml_dist.nets.timm_backbone import TimmBackbone
from cml_dist.run.session import set_rows, set_warning


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "packed", images=4, size=32)


def described(root, *overrides):
    base = {"domain": {"name": "images", "root": str(root), "ways": 3, "queries": 1}}
    config = parse_config(merge(base, overrides))
    body = TimmBackbone("test_resnet", (3, 32, 32))
    return config, SimpleNamespace(
        domain=build_domain(config.domain, train_seed=0, eval_seed=0), net=SimpleNamespace(body=body)
    )


def test_the_packed_set_is_named(root):
    assert set_rows(*described(root)) == {"image set": f"small in {root}, 32x32 px, RGB"}


def test_pretrained_weights_say_their_own_normalisation_where_the_sets_is_used(root):
    words = set_rows(*described(root, "model.pretrained=true"))["normalisation"]
    assert words.endswith("of the set; weights: domain.mean=[0.5,0.5,0.5] domain.std=[0.5,0.5,0.5]")
    given = ("domain.mean=[0.5,0.5,0.5]", "domain.std=[0.5,0.5,0.5]")
    assert "normalisation" not in set_rows(*described(root, "model.pretrained=true", *given))


@pytest.mark.parametrize(
    ("name", "packed", "warned"),
    [
        ("mini_imagenet", "miniImageNet", False),
        ("cifar_fs", "cifar-fs", False),
        ("omniglot", "omniglot28", False),
        ("cifar_fs", "fc100", True),
        ("images", "anything", False),
    ],
)
def test_a_known_name_and_the_sets_own_are_compared(name, packed, warned):
    config = parse_config({"domain": {"name": name, "root": "somewhere"}})
    parts = SimpleNamespace(domain=SimpleNamespace(describe=lambda: {"name": packed}))
    assert (set_warning(config, parts) is not None) is warned

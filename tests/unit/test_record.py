"""What the header says of an image set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from image_sets import write_set

from cml_dist.config.load import parse_config
from cml_dist.data.build import build_domain
from cml_dist.run.record import set_rows, set_warning


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "packed", images=4, size=32)


def test_the_packed_set_is_named(root):
    base = {"domain": {"name": "images", "root": str(root), "ways": 3, "queries": 1}}
    domain = build_domain(parse_config(base).domain, train_seed=0, eval_seed=0)
    assert set_rows(SimpleNamespace(domain=domain)) == {"image set": f"small in {root}, 32x32 px, RGB"}


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

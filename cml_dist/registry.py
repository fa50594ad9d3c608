"""The names that a configuration chooses from, with what builds each: methods, networks, heads, domains. No torch.

Settings, help texts, error messages and builders read these tables: a new one is a line here and the module it names.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cml_dist.user_code import is_code, name_in


@dataclass(frozen=True)
class Entry:
    """What a name means: one line for ``cml-dist config --keys``, and what builds it, as ``module:attribute``."""

    help: str
    target: str = ""

    def load(self) -> Any:
        """The target, whose module is imported now, so that a run loads no more than it names."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def in_words(table: Mapping[str, Entry]) -> str:
    """Every name with its meaning, for help texts."""
    return "; ".join(f"{name}: {entry.help}" if entry.help else name for name, entry in table.items())


@dataclass(frozen=True)
class MethodEntry(Entry):
    """A method of ``method.name``. Its target is its inner rule; without one ``method.inner_optim`` chooses the rule.

    Attributes:
        title: what people call it.
        settings: its published defaults (settings of ``method.*``): above the schema's, below a recipe's for it.
        optim: the same of ``optim.*``.
        family: a recipe's ``method.*`` counts for all of the family that it names.
        adapts_only: the one part that adapts, where the method is defined by it.
        learns_rates: whether step sizes of the inner loop are learned, or may be.
    """

    title: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""
    adapts_only: str | None = None
    learns_rates: bool = False


HALF = {"inner_steps": 1, "inner_lr": 0.5}
"""Steps and rate of the BOIL line of work for Conv-4."""

METHODS: dict[str, MethodEntry] = {
    "cml": MethodEntry("MAML with the co-learner", title="MAML", settings={"colearner": True}, family="maml"),
    "cl": MethodEntry(
        "the paper's control: both heads adapt", title="MAML", settings={"colearner": "adapts"}, family="maml"
    ),
    "noise": MethodEntry(
        "the paper's control: the co-learner is never trained",
        title="MAML", settings={"colearner": "untrained"}, family="maml",
    ),
    "maml": MethodEntry("all adapts, second order", title="MAML", family="maml"),
    "fomaml": MethodEntry("MAML of first order", title="FOMAML", settings={"order": 1}, family="maml"),
    "anil": MethodEntry(
        "the head alone adapts (Raghu et al., 1909.09157)",
        title="ANIL", settings={"adapts": ["head"], **HALF}, adapts_only="head",
    ),
    "boil": MethodEntry(
        "the body alone adapts (Oh et al., 2008.08882)",
        title="BOIL", settings={"adapts": ["body"], **HALF}, adapts_only="body",
    ),
    "meta_sgd": MethodEntry(
        "a learned step size for every element, which starts at inner_lr (Li et al., 1707.09835)",
        "cml_dist.methods.meta_sgd:MetaSgd", title="Meta-SGD", settings={"inner_steps": 1, "inner_lr": 0.1},
        learns_rates=True,
    ),
    "maml_pp": MethodEntry(
        "MAML++: learned step sizes and norms a step, losses after all steps (Antoniou et al., 1810.09502)",
        "cml_dist.methods.maml_pp:MamlPlusPlus", title="MAML++",
        settings={"inner_steps": 5, "inner_lr": 0.1, "multi_step_loss": 15 * 500},
        optim={"schedule": "cosine", "final_lr_factor": 0.01}, learns_rates=True,
    ),
    "sharp_maml": MethodEntry(
        "gradients are taken where the loss has risen, inside, outside or both (Abbas et al., 2206.03996)",
        "cml_dist.methods.sharp:SharpSgd", title="Sharp-MAML",
        settings={"inner_steps": 5, "inner_lr": 0.1, "sharp": "both"},
    ),
    "warpgrad": MethodEntry(
        "WarpGrad: layers that never adapt precondition the steps of the others (Flennerhag et al., 1909.00025)",
        "cml_dist.methods.warpgrad:WarpGrad", title="WarpGrad",
        settings={"inner_steps": 5, "inner_lr": 0.1, "warp": "conv"},
    ),
    "tnet": MethodEntry(
        "the same layers, meta-trained through the whole inner loop (T-Net, Lee and Choi, 1801.05558)",
        title="T-Net", settings={"inner_steps": 5, "inner_lr": 0.1, "warp": "conv"},
    ),
}

OWN_METHOD = MethodEntry(
    "an inner rule of your own, FILE.py:NAME or MODULE:NAME", "cml_dist.methods.own:own_rule", learns_rates=True
)

NAME_DECIDES = ("colearner", "order")
"""Settings that a name within a family decides: a recipe's give way to another name."""

INNER_OPTIMS: dict[str, Entry] = {
    "sgd": Entry("", "cml_dist.meta.rule:InnerRule"),
    "momentum": Entry("", "cml_dist.methods.inner_optim:Momentum"),
    "adam": Entry("", "cml_dist.methods.inner_optim:Adam"),
}


def method_entry(name: str) -> MethodEntry:
    """What a valid ``method.name`` means."""
    return METHODS[name] if name in METHODS else replace(OWN_METHOD, title=name_in(name))


def family(name: str) -> str:
    """The family of a method; a method that is none's is its own."""
    return (METHODS[name].family if name in METHODS else "") or name


@dataclass(frozen=True)
class BackboneEntry(Entry):
    """A backbone. Its target is ``build(model, input_shape)``.

    Attributes:
        reads: ``images``, ``vectors``, ``nodes`` or ``all``.
    """

    reads: str = "images"


BACKBONES: dict[str, BackboneEntry] = {
    "conv4": BackboneEntry("four convolutional blocks", "cml_dist.nets.conv4:build"),
    "mlp": BackboneEntry("hidden layers, for vectors", "cml_dist.nets.mlp:build", reads="vectors"),
    "gcn": BackboneEntry("two graph convolutions, for nodes", "cml_dist.nets.gcn:build", reads="nodes"),
}
TIMM = BackboneEntry("any timm model, e.g. resnet18, resnet12, resnet12_wide", "cml_dist.nets.timm_backbone:build")
"""What every other name of ``model.backbone`` is."""
OWN_BACKBONE = BackboneEntry("a body of your own, FILE.py:NAME or MODULE:NAME", "cml_dist.nets.own:build", reads="all")


def backbone_entry(name: str) -> BackboneEntry:
    """What a ``model.backbone`` means."""
    return BACKBONES.get(name, OWN_BACKBONE if is_code(name) else TIMM)


HEADS: dict[str, Entry] = {
    "linear": Entry("a linear layer", "torch.nn:Linear"),
    "shared": Entry("all classes start from one learned vector (UNICORN-MAML)", "cml_dist.nets.heads:SharedHead"),
    "centroid": Entry("classes start from their mean support feature (Proto-MAML)", "cml_dist.nets.heads:CentroidHead"),
    "prototype": Entry("embeddings, compared with the support's class means", "cml_dist.nets.heads:Projection"),
    "ridge": Entry("classes start from ridge regression on the support features", "cml_dist.nets.heads:RidgeHead"),
}


@dataclass(frozen=True)
class DomainEntry(Entry):
    """A domain of ``domain.name``. Its target is ``domain(settings, seeds, processes, progress)``, seeds by split.

    Attributes:
        settings: its section, a class of ``config/schema.py``.
        usual_inputs: channels, height and width in which the set is commonly packed.
    """

    settings: str = "ImagesConfig"
    usual_inputs: tuple[int, int, int] | None = None


_IMAGES = "cml_dist.data.images:ImageDomain"
_SMALL, _LARGE = (DomainEntry("", _IMAGES, usual_inputs=(3, size, size)) for size in (32, 84))

DOMAINS: dict[str, DomainEntry] = {
    "glyphs": DomainEntry(
        "characters of many scripts, nothing to download",
        "cml_dist.data.glyphs:GlyphsDomain",
        settings="GlyphsConfig",
        usual_inputs=(1, 28, 28),
    ),
    "images": DomainEntry("any packed image set", _IMAGES),
    "omniglot": DomainEntry("", _IMAGES, usual_inputs=(1, 28, 28)),
    **dict.fromkeys(("cifar_fs", "fc100", "aircraft", "vgg_flower"), _SMALL),
    **dict.fromkeys(("mini_imagenet", "tiered_imagenet", "cub", "cars"), _LARGE),
    "sinusoid": DomainEntry(
        "regression on sine waves, and lines", "cml_dist.data.sinusoid:SinusoidDomain", settings="SinusoidConfig"
    ),
    "graph_nodes": DomainEntry(
        "nodes of one graph", "cml_dist.data.graph_nodes:GraphNodesDomain", settings="GraphNodesConfig"
    ),
}
OWN_DOMAIN = DomainEntry(
    "a domain of your own, FILE.py:NAME or MODULE:NAME", "cml_dist.data.own:build", settings="OwnDomainConfig"
)

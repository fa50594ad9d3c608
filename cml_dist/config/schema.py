"""Every setting of a run: typed, frozen, with its range, unit and default. No torch.

Names come from ``registry.py``; what cannot be together is refused in ``checks.py``, unknown keys in ``load.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    WrapValidator,
    field_validator,
    model_validator,
)

from cml_dist.config.checks import contradictions
from cml_dist.registry import (
    BACKBONES,
    DOMAINS,
    HEADS,
    INNER_OPTIMS,
    METHODS,
    OWN_BACKBONE,
    OWN_DOMAIN,
    OWN_METHOD,
    TIMM,
    in_words,
)
from cml_dist.user_code import is_code, sealed


def _code_or_name(value: object, name: Callable[[object], Any]) -> Any:
    """Code of the user's own with its checksum; anything else must be one of the names."""
    return sealed(value) if is_code(value) else name(value)


# Not str itself, which has no signature for pydantic 2.7 to look at.
MethodName = Annotated[Literal[tuple(METHODS)], WrapValidator(_code_or_name), PlainSerializer(lambda name: str(name))]
InnerOptim = Literal[tuple(INNER_OPTIMS)]
HeadName = Literal[tuple(HEADS)]
ImageSet = Literal[tuple(name for name, entry in DOMAINS.items() if entry.settings == "ImagesConfig")]


class Section(BaseModel):
    """A group of settings: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _on_or_off(value: object) -> object:
    """YAML reads the words on and off as true and false."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


AUTO = "auto"


def _auto_or_number(value: object, number: Callable[[object], float]) -> Any:
    return AUTO if value == AUTO else number(value)


def _as_list(value: object) -> object:
    """One term where a list of terms is meant."""
    return [value] if isinstance(value, str) else value


Terms = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_as_list)]
"""Which parameters: ``body``, ``head``, ``norms``, ``biases``, ``last:N`` or globs over canonical names (``nets/partition.py``)."""


def _at_home(path: str | bool) -> str | bool:
    """``~`` and ``~user`` as the shell means them, which leaves them as they are in ``run.dir=~/runs``."""
    if isinstance(path, str) and (path := os.path.expanduser(path)).startswith("~"):
        raise ValueError(f"{path!r} names no home folder that is known: write the whole path")
    return path


Beta = Annotated[float, Field(ge=0, lt=1)]
Draw = Literal[1, 2] | None
_DRAW = "how an episode is drawn: 2: its support set is the same whatever queries is; 1: as in earlier versions, where it was not; null: 2, and in a run that began earlier 1"
Place = Annotated[str, AfterValidator(_at_home)]
"""A path; a URL too, where the setting says so."""


class AugmentConfig(Section):
    """Changes to training images, drawn from the episode's own generator (val and test are never changed)."""

    flip: bool = Field(False, description="mirror each image left-right with probability 1/2")
    crop_padding: int = Field(0, ge=0, le=64, description="pad by this many pixels (reflected), then crop back at random")
    random_resized_crop: float = Field(1.0, gt=0, le=1, description="cut out a random window of this part of the area or more, of aspect 3/4 to 4/3, and scale it back to the image's size (bilinear; usual: 0.08); 1: off")
    color_jitter: float = Field(0.0, ge=0, le=1, description="multiply brightness, contrast and saturation by factors of each image, drawn up to so much from 1 (A Closer Look at Few-shot Classification: 0.4); 0: off")
    rotate_classes: bool = Field(False, description="each class turned by 90, 180, 270 degrees is a class of its own (Omniglot)")


class ImageSettings(Section):
    """What all image domains share."""

    ways: int | None = Field(5, ge=2, le=1000, description="classes in an episode (N); null: as many as each split of the image set has, at most 5")
    shots: int | None = Field(1, ge=1, le=1000, description="support examples a class (K); null: as many as the smallest class of the image set allows, at most 5")
    queries: int | None = Field(15, ge=1, le=1000, description="query examples a class; null: as many as the smallest class of the image set has left, at most 15")
    mean: tuple[float, ...] | None = Field(None, description="per channel, of pixels in 0..1; null: as domain.statistics says (of the set: measured on the training split when packed)")
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(None, description="as mean")
    statistics: Literal["set", "weights"] | None = Field(None, description="whose mean and std are taken where domain.mean and std are not set: of the set, or with model.pretrained and init_from those that the weights were trained with; null: weights, and in a run that began earlier set")
    size: Literal["set", "weights"] | Annotated[int, Field(ge=8, le=4096)] | None = Field(None, description="side, in pixels, of the images that the network reads: set, as they are packed; weights, with model.pretrained as these were trained; or a number; scaled by the weights' interpolation (else bicubic), where the shape differs cut at the centre; null: weights, and in a run that began earlier set")
    augment: AugmentConfig = AugmentConfig()
    batch: int | None = Field(None, ge=2, le=100_000, description="a plain classifier of the training classes (cml-dist pretrain): images of a batch, which stands in the place of a training episode; null: episodes")
    unlabelled: int = Field(0, ge=0, le=1000, description="unlabelled examples a class, of which labels are neither known nor told; support and query set stay as without them")
    distractors: int = Field(0, ge=0, le=1000, description="further classes beside the episode's, of which it has unlabelled examples alone")
    draw: Draw = Field(None, description=_DRAW)
    memory_gib: float = Field(4.0, ge=0, description="keep a decoded split in memory (uint8, in each process) up to this size, GiB, and half of the free memory for all; else decode in workers")
    features: Literal["keep", "compute"] | None = Field(None, description="of a frozen timm body, whose features of an image never change (no norm by batch statistics, no augmentation, no lora): keep: computed once, and kept in memory (within memory_gib) or else in a file of run.dir, of the splits of which a run draws as many images as they have; compute: in each pass; null: keep, and in a run that began earlier compute")
    workers: int | None = Field(None, ge=0, le=64, description="processes a rank that prepare episodes ahead; 0: in the training process; null: 0 where the split is in memory, is not scaled (domain.size), and neither random_resized_crop nor color_jitter changes it, else up to 4")


class GlyphsConfig(ImageSettings):
    """Characters of many scripts rendered from matplotlib's fonts: 28x28 grey, 20 per class, nothing to download."""

    name: Literal["glyphs"]
    root: Place | None = Field(None, description="where the rendered shards are kept; null: the user's cache folder")


class ImagesConfig(ImageSettings):
    """A packed image set: a folder or URL written by ``cml-dist data pack``."""

    name: ImageSet
    root: Place = Field(description="folder or URL of the packed set (cml-dist data pack SOURCE DEST)")
    cache: Place | None = Field(None, description="where shards of a remote root are kept; null: the user's cache folder")


class SinusoidConfig(Section):
    """Regression on y = A sin(x - phase): A in [0.1, 5], phase in [0, pi], x in [-5, 5] (paper, section 5.1)."""

    name: Literal["sinusoid"]
    family: Literal["sinusoid", "mixed"] = Field("sinusoid", description="the curves: sinusoid; mixed: every other episode a line y = a x + b, a and b in [-3, 3] (Finn et al., 1806.02817)")
    shots: int = Field(10, ge=1, le=10_000, description="support points (K)")
    queries: int = Field(10, ge=1, le=10_000, description="query points")
    noise: float = Field(0.0, ge=0, description="standard deviation of Gaussian noise on the targets")
    draw: Draw = Field(None, description=_DRAW)
    workers: int | None = Field(None, ge=0, le=64, description="processes a rank that prepare episodes ahead; null: 0")


class GraphNodesConfig(Section):
    """Nodes of one graph (docs/how-to/nodes.md)."""

    name: Literal["graph_nodes"]
    root: Place = Field(description="the graph: a file (.npz, or .pt of PyTorch Geometric), or the folder of a set of torch_geometric.datasets")
    ways: int = Field(2, ge=2, le=1000, description="classes in an episode (N)")
    shots: int = Field(1, ge=1, le=1000, description="support nodes a class (K)")
    queries: int = Field(5, ge=1, le=1000, description="query nodes a class")
    eval_queries: int | None = Field(None, ge=1, le=1000, description="query nodes a class in val and test; null: queries")
    unlabelled: int = Field(0, ge=0, le=1000, description="unlabelled nodes a class, of which labels are neither known nor told; support and query set stay as without them")
    distractors: int = Field(0, ge=0, le=1000, description="further classes beside the episode's, of which it has unlabelled nodes alone")
    base: Literal["gcn", "g_meta"] = Field("gcn", description="what a node sees: gcn, the whole graph; g_meta, a subgraph of its own")
    hops: int = Field(2, ge=1, le=10, description="g_meta: how far from its node a subgraph reaches")
    cap: int | None = Field(1000, ge=2, description="g_meta: most nodes of a subgraph: of more, its own and a random sample; null: all")
    readout: Literal["mean", "centre"] = Field("mean", description="g_meta: mean over the nodes of the subgraph, whose adjacency is cut from the whole graph's (the public code with the paper's figures), or the node at its centre, with the subgraph's own degrees (the original)")
    adjacency: Literal["row", "symmetric"] = Field("row", description="normalisation of A + I by the degrees D: row, D^-1 (A + I), or symmetric, D^-1/2 (A + I) D^-1/2")
    dropout: float = Field(0.0, ge=0, lt=1, description="the part of hidden units that each inner step of training leaves out at random, of its support set alone")
    split: Literal["own", "all"] | Annotated[int, Field(ge=0, le=9999)] = Field("own", description="of the classes: own, the file's; K: the K-th of all ways to divide them into split_sizes, in a fixed, shuffled order; all: a run for each way, in folders of run.dir, and the spread over them")
    splits: int | None = Field(None, ge=2, le=1000, description="split all only: how many, from K = 0; null: all ways, at most 100")
    split_sizes: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(None, description="classes of train, val and test; null: as many as in the file's own split")
    workers: int | None = Field(None, ge=0, le=64, description="processes a rank that draw episodes ahead; null: 0")


class OwnDomainConfig(Section):
    """A domain of the user's own (docs/how-to/extending.md)."""

    name: Annotated[str, AfterValidator(sealed)]
    ways: int = Field(5, ge=0, le=1000, description="classes in an episode (N); 0: regression")
    shots: int = Field(1, ge=1, le=10_000, description="support examples a class (K), or in all in regression")
    queries: int = Field(15, ge=1, le=10_000, description="query examples a class, or in all in regression")
    workers: int | None = Field(None, ge=0, le=64, description="processes a rank that prepare episodes ahead; null: as the domain suggests")
    options: dict[str, Any] = Field({}, description=f"keyword arguments of {OWN_DOMAIN.help} (there domain.ways=0 is regression)")


OWN = "own"


def _domain_tag(value: object) -> str | None:
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return OWN if is_code(name) else name if name in tuple(DOMAINS) else None


_SECTIONS = {**{name: entry.settings for name, entry in DOMAINS.items()}, OWN: OWN_DOMAIN.settings}
DomainConfig = Annotated[
    Union[tuple(Annotated[globals()[section], Tag(name)] for name, section in _SECTIONS.items())],  # noqa: UP007
    Discriminator(_domain_tag),
]


class ColearnerConfig(Section):
    """The second head: not adapted, reads the adapted pre-pool features, deleted after training."""

    kind: Literal["auto", "dense", "prototype"] = Field("auto", description="dense: outputs by an own last layer (the paper's); prototype: an own projection, compared with the support set's class means; auto: prototype where a dense one could only guess (the body does not adapt, or the head treats labels alike)")
    depth: int = Field(2, ge=0, le=4, description="blocks before its output layer (paper: 2 conv blocks; 0 is a bare FC)")
    width: int = Field(64, ge=1, le=65536, description="channels (or units) of each block; conv4, mlp and gcn use their own width")


class ModelConfig(Section):
    """The network: backbone (psi) + head (theta) + co-learner (phi)."""

    backbone: Annotated[str, AfterValidator(sealed)] = Field("conv4", min_length=1, description=f"{', '.join(BACKBONES)}, {TIMM.help}, or {OWN_BACKBONE.help}")
    pretrained: Annotated[bool | str, AfterValidator(_at_home)] = Field(False, description="timm backbones: true for the published weights; a weight file; a folder with one and its config.json, or an export of a run; a timm name with its tag (resnet18.a1_in1k); or a hub name (hf-hub:ORG/NAME)")
    init_from: Place | None = Field(None, description="start from the parameters of an earlier run: its folder (the best checkpoint), an export, or what cml-dist pretrain wrote; what fits by name and shape is taken over; null: from random values, or as pretrained says")
    filters: int = Field(64, ge=1, le=4096, description="conv4: channels of each block")
    options: dict[str, Any] = Field({}, description=f"keyword arguments of {OWN_BACKBONE.help}")
    extra_blocks: int = Field(0, ge=0, le=64, description="conv4: further blocks behind the fourth, without a max-pool of their own (3: the paper's MAML with as many parameters, 232K)")
    hidden: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field((40, 40), min_length=1, description="mlp and gcn: units of each hidden layer (gcn: of its two)")
    head: HeadName = Field("linear", description=f"{in_words(HEADS)}; all but linear take any number of classes at test, and with method.inner_steps=0 centroid is a prototypical network, ridge R2-D2")
    feature_length: float | None = Field(None, gt=0, le=1000, description="length to which each example's pooled features are scaled before the head: 3 to 5 where weights are pre-trained, whose directions tell classes apart and whose lengths do not; null: as they are")
    norm: Literal["batch", "frozen"] = Field("batch", description="BatchNorm: 'batch' statistics of the examples at hand (transductive, as in the paper), or the 'frozen' running statistics of pre-trained weights")
    trained: Terms = Field(("body", "head"), description="what is meta-trained besides the co-learner: body, head, norms, biases, last:N (the last N blocks of the body) or globs over parameter names; the rest is frozen: constants without gradient, moments or second-order work")
    colearner: ColearnerConfig = ColearnerConfig()


class MethodConfig(Section):
    """What a meta-gradient is (paper, eq. 5-7). What is not set is as the method's name says (``registry.METHODS``)."""

    name: MethodName = Field("cml", description=f"{in_words(METHODS)}; or {OWN_METHOD.help}")
    options: dict[str, Any] = Field({}, description=f"keyword arguments of {OWN_METHOD.help}")
    colearner: bool | Literal["untrained", "adapts"] | None = Field(None, description="true; false; untrained: a co-learner that is never trained (the paper's noise); adapts: it adapts in the inner loop as well (the paper's CL); null: true for cml, else false")
    inner_steps: int = Field(1, ge=0, le=1000, description="gradient steps on the support set (M)")
    inner_lr: Annotated[float, Field(gt=0, le=100), WrapValidator(_auto_or_number), PlainSerializer(lambda rate: rate)] = Field(0.01, description="step size of the inner loop for body and head (alpha); auto: of 0.001, 0.003, ... 1 the one by which the initial parameters do best on a few val episodes, chosen before training")
    head_lr: float | None = Field(None, ge=0, le=100, description="step size of the inner loop for the head alone; null: inner_lr")
    body_lr: float | None = Field(None, ge=0, le=100, description="step size of the inner loop for the body alone; null: inner_lr")
    adapts: Terms | None = Field(None, description="what adapts in the inner loop, in the words of model.trained (e.g. [head, last:2]), and lora:RANK: low-rank factors beside the linear weights of the body; null: all of body and head that is trained, or what the method says")
    inner_optim: InnerOptim = Field("sgd", description="optimizer of the inner loop, differentiated exactly; moments start at zero in each episode")
    inner_momentum: float = Field(0.9, ge=0, lt=1, description="inner_optim momentum only")
    inner_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="inner_optim adam only")
    gamma: float | None = Field(None, ge=0, le=1000, description="weight of the co-learner's loss in the outer loss (eq. 6); null: 1 with a co-learner, else 0")
    order: Literal[1, 2] | None = Field(None, description="2: exact, through the inner loop; 1: first order; null: 1 for fomaml, else 2")

    first_order_steps: int = Field(0, ge=0, description="meta-steps at the beginning that are of first order, before those of order 2 (MAML++'s order annealing; any method)")
    multi_step_loss: int = Field(0, ge=0, description="maml_pp only: meta-steps in which the query losses after all inner steps count, with weights that move to the last; then, and with 0 from the start, the last alone does")
    multi_step_every: int = Field(500, ge=1, description="maml_pp only: meta-steps between two changes of those weights (the paper's epoch)")

    sharp: Literal["lower", "upper", "both"] | None = Field(None, description="sharp_maml only: which gradients are taken where the loss has risen: lower (each inner step's, also at test), upper (the meta-gradient of all processes, at twice the cost), both; null: both for sharp_maml")
    radius: float = Field(0.05, gt=0, le=100, description="sharp_maml only: how far parameters go up the normalised gradient before it is taken again, in L2 norm")
    ascent: Literal["exact", "detached"] = Field("exact", description="sharp_maml only, lower level: exact differentiates through the way up too; detached takes it as a constant, which is cheaper")

    augment: Literal["mgaug"] | None = Field(None, description="mgaug: the meta-gradients of pruned sub-networks, each with an inner loop of its own, are added to the whole network's (MGAug); with any method and co-learner; null: none")
    augment_pruning: Literal["width", "parameters", "catfish"] = Field("width", description="augment only: what a sub-network lacks: width: random channels; parameters: random weights; catfish: the weights that memorise most, by |gradient of the support loss * weight|")
    augment_ratios: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field((0.2,), min_length=1, max_length=16, description="augment only: the part that is pruned of each layer of the body (see augment_scope); a sub-network, with a meta-gradient's cost, for each")
    augment_weight: float = Field(1.0, gt=0, le=1000, description="augment only: weight of each sub-network's outer loss beside the whole network's")
    augment_scope: Literal["layer", "network"] = Field("layer", description="augment_pruning=catfish only: which weights are compared, and what a ratio is of: those of each layer, or of the whole body")

    warp: Literal["linear", "conv"] | None = Field(None, description="warpgrad and tnet only: the layers between the others, as wide as these: linear: a matrix (on maps a 1x1 convolution); conv: a 3x3 convolution (on vectors a matrix); null: conv for these two")
    warp_residual: bool = Field(False, description="warpgrad and tnet only: false: W x, with W the identity at the start; true: x + W x, with W 0 at the start, so that weight decay draws the layer to the identity")

    unlabelled: Literal["none", "soft_labels", "meta_gradient"] | None = Field(None, description="what the inner loop does with domain.unlabelled: none, they are left out; soft_labels, further steps on the support set and on them, with the labels that the adapted learner gives them; meta_gradient, these labels refined by their meta-gradient; null: meta_gradient, and none where there are no such examples")
    unlabelled_steps: int | None = Field(None, ge=1, le=1000, description="unlabelled only: gradient steps on both, after inner_steps on the support set alone; null: as many as inner_steps in training, at least 1")
    unlabelled_weight: float = Field(1.0, gt=0, le=1000, description="unlabelled only: weight of the squared distance of probabilities and labels beside the support loss")
    label_temperature: float = Field(1.0, gt=0, le=100, description="unlabelled only: of the softmax that makes the labels; below 1 they are sharpened")
    label_rate: float = Field(0.02, gt=0, le=1e6, description="unlabelled=meta_gradient only: step size of the labels, an unlabelled example")

    @property
    def rate(self) -> float:
        """``inner_lr`` as a number: the default where it is still to be chosen."""
        return type(self).model_fields["inner_lr"].default if self.inner_lr == AUTO else self.inner_lr

    @model_validator(mode="before")
    @classmethod
    def _published(cls, data: object) -> object:
        """The name sets what is not said; what contradicts it is refused below."""
        if isinstance(data, dict) and isinstance(data.get("name", "cml"), str):
            info = METHODS.get(data.get("name", "cml"))
            settings = {"colearner": False, "order": 2, **(info.settings if info else {})}
            data = {**data, **{key: value for key, value in settings.items() if data.get(key) is None}}
            if data.get("gamma") is None:
                data["gamma"] = 0.0 if data["colearner"] is False else 1.0
        return data


class EngineConfig(Section):
    """How the meta-gradient is computed; the value is the same for all."""

    name: Literal["auto", "graph", "adjoint"] = Field("auto", description="graph: unrolled loop; adjoint: memory flat in inner steps; auto: graph where it fits into the memory budget (on the CPU, which has none by default: where it is the faster one), else adjoint")
    micro_batch: int | str | None = Field("auto", description="most examples of an episode that pass through the network at once (adjoint; needs a network whose norms couple no examples); null: all; auto: all that the memory budget holds")
    trajectory: Literal["auto", "all", "sqrt"] = Field("auto", description="adjoint: which points of the inner loop are kept: all, or about every sqrt(K)-th, the others computed anew (2 sqrt(K) copies of what adapts for one more forward sweep); auto: all, and sqrt where the memory budget asks for it")
    compile: Annotated[Literal["off", "on", "auto"], BeforeValidator(_on_or_off)] = Field("off", description="on: the meta-gradient as one graph by torch.compile: a minute or more at the first step, seconds where the machine has compiled it before; checked on the first episodes, eager where it cannot be compiled, and at the steps that are logged where there is a co-learner; auto: only in a run that is long enough for it, and only if it is faster, by measured steps, compared once (when it begins depends on time, so such a run repeats to rounding and not to the bit)")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = Field("default", description="compile: mode of torch.compile; reduce-overhead replays CUDA graphs on a GPU")
    trajectory_device: Literal["auto", "device", "cpu"] = Field("auto", description="adjoint: where the adapted parameters of each inner step are kept; auto: device, and cpu where the memory budget asks for it")

    @field_validator("micro_batch", mode="before")
    @classmethod
    def _a_number_or_auto(cls, value: object) -> object:
        if value is None or value == "auto" or (type(value) is int and value >= 1):
            return value
        raise ValueError(f"{value!r} is no micro-batch: give a number of examples from 1 up, auto or null")


class MemoryConfig(Section):
    """What the trainer may use; ``auto`` settings are chosen to stay inside it."""

    budget_gib: float | None = Field(None, gt=0, description="memory of each process for parameters, gradients, moments, copies and activations, GiB (on the CPU without the interpreter and its libraries); null: 90 % of the GPU, no limit on the CPU")


class OptimConfig(Section):
    """The outer optimizer on psi, theta and phi (eq. 7)."""

    name: Literal["sgd", "adam", "adamw"] = Field("adam")
    lr: float = Field(1e-3, gt=0, le=100, description="outer step size (after warm-up)")
    body_lr_scale: float = Field(1.0, gt=0, le=1, description="outer step size of the body as a fraction of lr, which head, co-learner and what a method learns have")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd only")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="adam and adamw only")
    eps: float = Field(1e-8, gt=0, description="adam and adamw only")
    weight_decay: float = Field(0.0, ge=0, le=10, description="on weights of 2 and more dimensions; never on biases, norms and other vectors, nor on what a method learns (step sizes)")
    schedule: Literal["constant", "cosine", "linear", "step"] = Field("constant", description="of the outer step size over train.steps, after warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps in which the outer step size rises linearly from 0")
    final_lr_factor: float = Field(0.0, ge=0, le=1, description="cosine and linear: what the step size falls to, as a fraction of lr, one step after the last: the last one is still above it")
    step_every: int = Field(10_000, ge=1, description="step: meta-steps between two decays, and before the first")
    step_from: Literal["warmup", "start"] | None = Field(None, description="step: decays count from the end of the warm-up, or from the start of the run, as in earlier versions; null: warmup, and in a run that began earlier start")
    step_factor: float = Field(0.5, gt=0, le=1, description="step: factor of each decay")
    clip_value: float | None = Field(None, gt=0, description="largest absolute value of an element of the meta-gradient over all processes, before clip_norm and the norm that is reported (MAML++: 10, on miniImageNet); costs a further all-reduce of it; null: no clipping")
    clip_norm: float | None = Field(None, gt=0, description="largest global L2 norm of the meta-gradient; null: no clipping")


class TrainConfig(Section):
    """The length of the run."""

    steps: int = Field(30_000, ge=1, description="meta-steps")
    patience: int | None = Field(None, ge=1, description="validations in a row (every eval.every steps) without a better score after which training ends; null: never")
    episodes_per_step: int = Field(4, ge=1, le=100_000, description="episodes of a meta-step over all processes (B)")
    max_nonfinite: int = Field(10, ge=1, description="stop after this many steps in a row with NaN or inf in the meta-gradient (each is skipped)")


class EvalConfig(Section):
    """Validation during the run, and the test at its end."""

    every: int = Field(500, ge=0, description="meta-steps between validations; 0: only at the end")
    val_episodes: int = Field(200, ge=1, description="fixed episodes of the val split in each validation")
    episodes: int = Field(1000, ge=2, description="fixed episodes of the test split in the final test and in cml-dist eval")
    split: Literal["train", "val", "test"] = Field("test", description="what cml-dist eval and the final test score on")
    learner: Literal["meta", "co"] = Field("meta", description="whose validation score chooses the best step: meta (CML, eq. 8) or co (CML-dagger, eq. 9)")
    co_adapt: Literal["eq9", "released"] = Field("eq9", description="CML-dagger: adapt by the co-learner's support loss (eq. 9), or by the meta-learner's as in the released test script")
    inner_steps: int | None = Field(None, ge=0, le=1000, description="inner steps at test; null: method.inner_steps")
    norm: Literal["batch", "support"] = Field("batch", description="norms by batch statistics: those of the query images (batch, as in the paper: an answer depends on its neighbours), or those of the support images")
    permutations: int = Field(1, ge=1, le=1000, description="label orders under which each test episode is tested; above 1 the spread over them is reported")
    ensemble: int = Field(1, ge=1, le=100, description="test besides the mean of the outputs of the best N validations' checkpoints, each adapted by itself, as a row of its own; all N are kept while the run trains; 1: no ensemble")
    seed: int = Field(0, ge=0, lt=2**32, description="chooses the val and test episodes, whatever run.seed is")
    untrained: bool = Field(True, description="also test the untrained network, as a floor to compare with")
    final: bool = Field(True, description="test the best step and export it when training ends")


class CheckpointConfig(Section):
    """What is kept to resume from."""

    every: int = Field(500, ge=1, description="meta-steps between checkpoints")
    every_minutes: float | None = Field(15.0, gt=0, description="a checkpoint too where so many minutes have passed since the last one; null: never")
    keep_last: int = Field(2, ge=1, description="newest checkpoints that are kept (the best one is kept besides)")
    keep_every: int | None = Field(None, ge=1, description="meta-steps between two of a trail of the parameters alone, from step 0 to train.steps, for cml-dist analyse: never removed, and no run resumes from them; null: no trail")


class ParallelConfig(Section):
    """Who carries the meta-gradient."""

    strategy: Literal["auto", "single", "ddp", "zero0", "zero1", "zero2", "zero3"] = Field("auto", description="auto: what the launcher set up (DeepSpeed with its stage; else ddp, or single for one process); zero1 shares out the optimizer's state, zero2 gradients too, zero3 parameters too")
    offload: Literal["auto", "none", "optimizer", "all"] = Field("auto", description="what lies on the CPU: the optimizer's state (zero2, zero3) or all, with the parameters (zero3); auto: what the launcher or parallel.deepspeed says, else none")
    deepspeed: Place | None = Field(None, description="a DeepSpeed file (JSON) of your own, whose tuning is taken over; null: the launcher's, or none")
    processes: int | None = Field(None, ge=1, description="processes that must be there; null: as many as the launcher started")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads a process; null: OMP_NUM_THREADS where you set it, else the cores that this machine's processes may use, shared out")
    hang_timeout_s: float = Field(600.0, gt=0, description="seconds after which a rank that does not move, while others wait for it or as the only one, is a failure that ends all (three times the longest move so far, if that is more); each episode, pass through the network and saved tensor is a move")
    heartbeat_timeout_s: float = Field(30.0, ge=3, description="seconds without a word after which a rank or its machine is taken for lost")
    join_timeout_s: float = Field(180.0, gt=0, description="seconds in which all processes must have started and imported their libraries, counted by each from when it is ready")


STOP_SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU")
"""What schedulers, launchers and terminals send to end a process; Ctrl-C's SIGINT besides, in every run.

Of the others some come by themselves (SIGCHLD, SIGWINCH, SIGPIPE, timers), some say that a process is broken (SIGSEGV),
and some no process can catch (SIGKILL).
"""


class RunSection(Section):
    """Where the run lives, and what makes it repeatable."""

    dir: Place = Field("runs/default", min_length=1, description="the run's folder; an existing run in it is resumed")
    seed: int = Field(0, ge=0, lt=2**32, description="initial parameters and training episodes")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is a GPU")
    precision: Literal["fp32", "tf32", "bf16", "fp64"] = Field("fp32", description="fp32; tf32: the same, but matrix products and convolutions by tensor cores that read 10 bits of the mantissa (GPUs of compute capability 8.0 and newer); bf16: inside the network by autocast, while parameters, adapted ones too, losses and moments stay float32 (float16 would overflow in second-order gradients); fp64: parameters and arithmetic, for checks")
    deterministic: bool = Field(True, description="only deterministic kernels; on CUDA a few have no such form, which is warned of")
    profile: str | None = Field(None, description="A:B: the first and the last of the meta-steps (from 1) of which each rank writes a trace into the run's folder, for Perfetto or chrome://tracing, with memory in it as a curve; on a GPU a snapshot of its memory besides, for pytorch.org/memory_viz; changes no value, and takes time in these steps alone; null: none")
    log_every: int = Field(50, ge=1, description="meta-steps between lines where the output is no terminal (metrics.jsonl has every step)")
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_as_list)] = Field((), description="also shown in: tensorboard (in the run's folder), wandb (WANDB_MODE=offline: contacts nobody); metrics, validations, test and configuration, by rank 0; needs pip install 'cml-dist[trackers]'")
    tracker_project: str | None = Field(None, min_length=1, description="W&B's project; null: WANDB_PROJECT, else cml-dist (the run is named after its folder)")
    stop_signals: tuple[Literal[STOP_SIGNALS], ...] = Field(("SIGUSR1", "SIGTERM"), description="signals besides Ctrl-C that end the running meta-step, save and leave with exit code 75; a second one changes nothing")

    @field_validator("profile", mode="before")
    @classmethod
    def _two_steps(cls, value: object) -> object:
        if value is None:
            return None
        found = re.fullmatch(r"([1-9]\d{0,9}):([1-9]\d{0,9})", value) if isinstance(value, str) else None
        if found and int(found[1]) <= int(found[2]):
            return value
        raise ValueError(f"{value!r} is no range of meta-steps: give the first and the last, from 1, e.g. 10:12, or null")

    @property
    def profiled_steps(self) -> range:
        """Numbers of the meta-steps of ``profile``, from 1."""
        first, last = map(int, self.profile.split(":")) if self.profile else (1, 0)
        return range(first, last + 1)

    @property
    def dtype(self) -> Literal["float32", "float64"]:
        """Of parameters."""
        return "float64" if self.precision == "fp64" else "float32"


class RunConfig(Section):
    """The whole configuration of a run: what was asked for (what will happen is ``plan.RunPlan``)."""

    domain: DomainConfig
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig.model_validate({})
    engine: EngineConfig = EngineConfig()
    memory: MemoryConfig = MemoryConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    run: RunSection = RunSection()

    @model_validator(mode="before")
    @classmethod
    def _published(cls, data: object) -> object:
        """What a method's name sets of the outer optimizer, where nothing else is said."""
        if isinstance(data, dict) and isinstance(optim := data.get("optim", {}), dict):
            method = data.get("method", {})
            name = method.get("name") if isinstance(method, dict) else getattr(method, "name", None)
            if isinstance(name, str) and name in METHODS:
                data = {**data, "optim": {**METHODS[name].optim, **optim}}
        return data

    @property
    def all_splits(self) -> bool:
        """Whether this is a run for each class split, as ``run/splits.py`` has it."""
        return getattr(self.domain, "split", None) == "all"

    @property
    def num_validations(self) -> int:
        """Of the whole run; the last meta-step is always validated."""
        return -(-self.train.steps // self.eval.every) if self.eval.every else 1

    @model_validator(mode="after")
    def _agrees(self) -> RunConfig:
        for contradiction in contradictions(self):
            raise ValueError(contradiction)
        return self

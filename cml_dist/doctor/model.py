"""Whether the network can be differentiated twice, and whether the data can be read."""

from __future__ import annotations

import time
from collections.abc import Iterator

from cml_dist.doctor.check import Case
from cml_dist.doctor.findings import Finding

SAMPLES = (("conv4", (1, 28, 28)), ("test_vit", (3, 32, 32)))
"""Without a configuration: a convolutional network with BatchNorm, and attention (one of timm's smallest)."""


def check_backbone(case: Case) -> Iterator[Finding]:
    """Second derivatives of the configured network against differences of its gradient."""
    from cml_dist.config.schema import ModelConfig
    from cml_dist.nets.build import build_net
    from cml_dist.nets.guard import check_twice_differentiable

    started = time.perf_counter()
    if not case.configured:
        for name, shape in SAMPLES:
            net = build_net(ModelConfig(backbone=name), input_shape=shape, output_dim=5, seed=0, colearner=True)
            check_twice_differentiable(net, shape, 5, name)
        named = " and ".join(name for name, _ in SAMPLES)
        yield Finding("second derivative", "ok", f"right for {named}; name a configuration to check its own backbone")
        return
    from cml_dist.planning.forecast import known_inputs
    from cml_dist.run.assemble import make_network

    config = case.config
    inputs = known_inputs(config)
    net = make_network(config, inputs.shape, inputs.output_dim)
    size = f"{config.model.backbone}, {sum(p.numel() for p in net.parameters()):,} parameters"
    if config.method.order != 2:
        yield Finding("second derivative", "ok", f"{size}: not needed, method.order is 1")
        return
    check_twice_differentiable(net, inputs.shape, inputs.output_dim, config.model.backbone)
    seconds = time.perf_counter() - started
    yield Finding("second derivative", "ok", f"right for {size}", data={"seconds": seconds})


def check_data(case: Case) -> Iterator[Finding]:
    """The data of the configuration: there, whole, large enough; one episode of each split is read."""
    if not case.configured:
        return
    domain = case.config.domain
    if domain.name == "sinusoid":
        yield Finding("data", "ok", "sinusoid: drawn, not read")
        return
    from cml_dist.domains.shard_cache import is_remote

    root = domain.root
    if root is not None and is_remote(root):
        yield from _remote(root)
        return
    from cml_dist.domains.build import build_domain
    from cml_dist.domains.images import SPLITS

    started = time.perf_counter()
    seeds = {"train_seed": case.config.run.seed, "eval_seed": case.config.eval.seed}
    made = build_domain(domain, **seeds, processes=case.place.local_size)
    for split in SPLITS:
        made.episode(split, 0)
    described = made.describe()
    images = ", ".join(f"{split} {info['images']:,}" for split, info in described["splits"].items())
    value = f"{described['name']} in {described['root']}: {images} images; an episode of each split read"
    alike = "copy the same packed set to every machine"
    data = {"fingerprint": made.fingerprint(), "seconds": time.perf_counter() - started}
    yield Finding("data", "ok", f"{value}, checksum {made.fingerprint()[:12]}", alike=alike, data=data)


def _remote(root: str) -> Iterator[Finding]:
    """Of a remote set the description alone: fetching the rest is the run's first step."""
    from cml_dist.domains.shard_cache import description

    info = description(root)
    size = sum(shard.size for shard in info.shards)
    value = f"{info.name} at {root} answers; {size / 2**30:.3g} GiB are fetched once for each machine"
    yield Finding("data", "ok", value)

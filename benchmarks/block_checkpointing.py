"""Does activation checkpointing inside the backbone pay at second order? Peak memory and seconds, fresh process each.

    python benchmarks/block_checkpointing.py

One Hessian-vector product of the support loss (the heart of the ``adjoint`` engine) on a timm ViT at 224 px, with and
without ``set_grad_checkpointing`` (non-reentrant, each block). The parameters stay swapped in until the gradient is
taken, for otherwise the recomputation would run on others. A first-order gradient is measured beside it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

CASES = [(order, images, blocks) for order in (1, 2) for images in (1, 5) for blocks in (0, 1)]


def measure(order: int, images: int, checkpointing: bool) -> dict[str, float]:
    import torch
    from torch.nn.utils.stateless import _reparametrize_module

    from cml_dist.config.schema import ModelConfig
    from cml_dist.distributed.allocator import give_back_freed_memory
    from cml_dist.nets.build import build_net

    torch.set_num_threads(2)
    give_back_freed_memory()
    config = ModelConfig(backbone="vit_tiny_patch16_224", colearner={"depth": 0})
    net = build_net(config, input_shape=(3, 224, 224), output_dim=5, seed=0, colearner=False)
    net.body.model.set_grad_checkpointing(checkpointing)
    net.train(checkpointing)  # timm checkpoints in training mode alone; this model has no dropout
    params = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(images, 3, 224, 224, generator=generator)
    targets = torch.arange(images) % 5
    vector = [torch.randn(p.shape, generator=generator) for p in params.values()]
    level = _resident_kib()
    started = time.perf_counter()
    with _reparametrize_module(net, params):
        loss = torch.nn.functional.cross_entropy(net(inputs)[0], targets)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=order == 2)
        if order == 2:
            grads = torch.autograd.grad(grads, list(params.values()), vector, materialize_grads=True)
    seconds = time.perf_counter() - started
    above = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - level) / 2**20
    return {"gib": above, "seconds": seconds, "norm": torch.cat([g.flatten() for g in grads]).norm().item()}


def _resident_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")))
        sys.exit()
    print("| derivative | images | checkpoint each block | GiB above the model | s | norm |\n|---|---|---|---|---|---|")
    for case in CASES:
        out = subprocess.run([sys.executable, __file__, *map(str, case)], check=True, capture_output=True, text=True)
        got = json.loads(out.stdout.splitlines()[-1])
        word = ("first", "second")[case[0] - 1], case[1], ("no", "yes")[case[2]]
        print(f"| {word[0]} | {word[1]} | {word[2]} | {got['gib']:.3f} | {got['seconds']:.1f} | {got['norm']:.6f} |")

"""One full second-order meta-step of CML on ViT-B/16 (86 M parameters), K = 5, and a check of its gradient.

    python benchmarks/vit_base.py            # the step: largest resident memory of the process, seconds
    python benchmarks/vit_base.py --check    # in float64, cut down to two blocks and 20 images: directional differences
    python benchmarks/vit_base.py --inner-steps 20 --shots 1 --queries 5 --set method.adapts=[head,lora:8]

5-way 5-shot, 15 queries a class, 224 px, adjoint in micro-batches of 5, SGD as the outer optimizer, on the CPU.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from cml_dist.config.load import merge, parse_config
from cml_dist.config.schema import ModelConfig, RunConfig
from cml_dist.distributed.allocator import keep_freed_memory
from cml_dist.meta.gradient import meta_gradient
from cml_dist.meta.inner import adapt
from cml_dist.meta.model import MetaModel
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import Method
from cml_dist.nets.build import build_net, make_network, method_of
from cml_dist.types import Batch, Episode

WAYS, SHOTS, QUERIES, STEPS, MICRO_BATCH = 5, 5, 15, 5, 5
SHAPE = (3, 224, 224)


def score(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def episode(dtype: torch.dtype, shots: int, queries: int) -> Episode:
    generator = torch.Generator().manual_seed(0)

    def batch(count: int) -> Batch:
        labels = torch.arange(WAYS).repeat_interleave(count)
        return Batch(torch.randn(count * WAYS, *SHAPE, generator=generator, dtype=dtype), labels)

    return Episode(batch(shots), batch(queries), "train", 0)


def configured(inner_steps: int, overrides: list[str]) -> RunConfig:
    settings = {
        "domain": {"name": "mini_imagenet", "root": "unused"},
        "model": {"backbone": "vit_base_patch16_224", "colearner": {"depth": 1}},
        "method": {"name": "cml", "inner_steps": inner_steps, "inner_lr": 0.01, "gamma": 1.0},
    }
    return parse_config(merge(settings, overrides))


def step(inner_steps: int, shots: int, queries: int, overrides: list[str]) -> None:
    config = configured(inner_steps, overrides)
    net = make_network(config, SHAPE, WAYS)
    loss = torch.nn.functional.cross_entropy
    model = MetaModel(net, loss, score, method_of(config, net), "adjoint", micro_batch=MICRO_BATCH)
    names = [n for n, _ in net.named_parameters()]
    adapting = sum(p.numel() for n, p in net.named_parameters() if n in model.method.rule.rates(names))
    del net
    optimizer = torch.optim.SGD(model.values, lr=1e-3)
    level = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, started_cpu = time.perf_counter(), time.process_time()
    value, sums = model([episode(torch.float32, shots, queries)], 1.0)
    value.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.values])
    optimizer.step()
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = sum(p.numel() for p in model.values)
    print(f"meta-trained {count:,}, adapting {adapting:,}; loss {sums['outer_loss'][0]:.4f}; gradient norm {norm:.4f}")
    print(f"resident: {level / 2**20:.2f} GiB after building, {peak / 2**20:.2f} GiB at most")
    print(f"{seconds:.0f} s, {cpu:.0f} s of CPU time")


def check() -> None:
    model = ModelConfig(backbone="vit_base_patch16_224", colearner={"depth": 1})
    net = build_net(model, input_shape=SHAPE, output_dim=WAYS, seed=0, colearner=True)
    net.body.model.blocks = net.body.model.blocks[:2]
    net = net.double()
    problem = Problem(net, torch.nn.functional.cross_entropy, score, dict(net.named_buffers()), micro_batch=2)
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    method, made = Method.sgd(STEPS, 0.01, 0.01, 1.0), episode(torch.float64, shots=1, queries=3)
    grads = meta_gradient(params, made, problem, method, "adjoint").grads

    def objective(at: dict) -> float:
        adapted = adapt(at, made, problem, method)
        with torch.no_grad():
            outputs = problem.outputs(adapted, made.query, problem.learners, {})
            return sum(torch.nn.functional.cross_entropy(out, made.query.targets) for out in outputs).item()

    generator = torch.Generator().manual_seed(1)
    for number in range(3):
        # Each tensor moves by its own size: a direction of unit noise would leave the region where differences hold.
        noise = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
        direction = {n: v * params[n].square().mean().sqrt().clamp_min(0.01) for n, v in noise.items()}
        eps = 1e-4
        ahead, behind = (objective({n: p + s * eps * direction[n] for n, p in params.items()}) for s in (1, -1))
        slope, ours = (ahead - behind) / (2 * eps), sum((grads[n] * direction[n]).sum() for n in params).item()
        print(f"direction {number}: {ours:.12f} by the gradient, {slope:.12f} by differences", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--inner-steps", type=int, default=STEPS)
    parser.add_argument("--shots", type=int, default=SHOTS)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of model and method")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    check() if args.check else step(args.inner_steps, args.shots, args.queries, args.set)

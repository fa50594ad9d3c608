"""Bytes that DeepSpeed really holds on a rank, counted storage by storage, against the arithmetic of `cml-dist plan`.

    python benchmarks/zero_memory.py        # ZeRO-0, 1 and 2 on two processes (gloo, CPU); no GPU needed

A model that is nothing but parameters (8 of 250 x 1000, Adam) takes two meta-steps whose gradients are finished values,
as MetaModel's are. All sizes are in units of the parameters' bytes; the bucket is 0.3 of them.
"""

from __future__ import annotations

import logging
import os
import socket
import sys

import torch

WORLD, BUCKET_ELEMENTS, SHAPE, COUNT = 2, 600_000, (250, 1000), 8


def count(rank: int, stage: int, port: int) -> None:
    """One rank's steps under a stage; rank 0 prints a row."""
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_SIZE": WORLD}
    os.environ.update({key: str(value) for key, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    import deepspeed

    from cml_dist.memory.live_bytes import LiveBytes
    from cml_dist.meta.model import _Deliver

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # a C++ kernel that would be compiled first
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)

    class Values(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(SHAPE)) for _ in range(COUNT))

        def forward(self) -> torch.Tensor:
            totals = [torch.ones_like(value) for value in self.values]
            return _Deliver.apply(torch.zeros(()), totals, *self.values)

    zero = {"stage": stage, "contiguous_gradients": True, "overlap_comm": False, "reduce_scatter": True}
    zero |= {"use_multi_rank_bucket_allreduce": False, "reduce_bucket_size": BUCKET_ELEMENTS}
    settings = {"train_batch_size": WORLD, "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    peaks = {}
    with LiveBytes() as live:
        model = Values()
        optimizer = torch.optim.Adam(model.parameters())
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        for _ in range(2):  # the first step makes the moments
            live.peak = 0
            loss = engine()
            peaks["inner loop"], live.peak = live.peak, 0
            engine.backward(loss)
            peaks["reduction"], live.peak = live.peak, 0
            engine.step()
            peaks["update"] = live.peak
            del loss
    if rank == 0:
        guessed = predict(stage)
        cells = [f"{guessed[moment]:.2f} / {peaks[moment] / unit():.2f}" for moment in guessed]
        print(f"| {stage} | " + " | ".join(cells) + " |", flush=True)
    torch.distributed.destroy_process_group()


def predict(stage: int) -> dict[str, float]:
    from cml_dist.memory import strategies
    from cml_dist.memory.footprint import Footprint

    strategies.BUCKET_BYTES = 4 * BUCKET_ELEMENTS
    size = strategies.ModelSize(unit(), unit() // COUNT, constants=0, moments_per_parameter=2)
    # No inner loop here: the finished value alone.
    step = Footprint(episode=0, gradients=unit(), adapted=0, activations=0)
    moments = strategies.rank_moments(strategies.Strategy(f"zero{stage}"), size, step, WORLD)
    return {budget.moment: budget.total / unit() for budget in moments}


def unit() -> int:
    return 4 * COUNT * SHAPE[0] * SHAPE[1]


if __name__ == "__main__":
    print("| ZeRO | inner loop, predicted / counted | reduction | update |\n|---|---|---|---|", flush=True)
    for number in map(int, sys.argv[1:] or (0, 1, 2)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            chosen = free.getsockname()[1]
        torch.multiprocessing.spawn(count, args=(number, chosen), nprocs=WORLD)

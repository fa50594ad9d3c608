"""The launch files bring up one world, also beside another one on the same machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROBE = """
import torch.distributed as dist
from accelerate import Accelerator
import torch
accelerator = Accelerator(cpu=True)
total = torch.tensor([accelerator.process_index + 1.0])
dist.all_reduce(total)
print(f"world {accelerator.num_processes} total {total.item():.0f}", flush=True)
dist.destroy_process_group()
"""


def test_two_launches_at_once_are_two_worlds_of_their_own(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(ROOT / "launch" / "accelerate" / "cpu.yaml"), str(probe)]
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK")
    }
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    runs = [
        subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    try:
        for run in runs:
            out, err = run.communicate(timeout=120)
            assert run.returncode == 0, err
            assert out.count("world 2 total 3") == 2
            assert err == "", "the launcher is noisy"
    finally:
        for run in runs:
            run.kill()

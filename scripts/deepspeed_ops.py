"""Compiles C++ operators of DeepSpeed ahead, for a CPU and GPUs that are named: a stage of the Dockerfile runs it.

Usage, with the Python that has torch and DeepSpeed, and with g++: deepspeed_ops.py FOLDER [arguments of pip install]

DEEPSPEED_OPS, CPU_ARCH and TORCH_CUDA_ARCH_LIST say what to build (docs/how-to/containers.md); DeepSpeed's setup.py
does it.
What belongs into site-packages, the operators and the list of them that DeepSpeed reads, lies there below FOLDER.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch

PACKAGES = Path(sysconfig.get_path("purelib"))
LIST = Path("deepspeed", "git_version_info_installed.py")
WIDTHS = (  # what g++ says of the CPU, and how DeepSpeed's sources are told; the first that fits
    ("__AVX512F__", "-D__AVX512__"),
    ("__AVX2__", "-D__AVX256__"),
    ("__ARM_FEATURE_SVE", "-D__SVE__"),
    ("__aarch64__", "-D__NEON__"),
    ("", "-D__SCALAR__"),
)


def main(folder: str, *pip_args: str) -> None:
    wanted = os.environ["DEEPSPEED_OPS"].replace(",", " ").split()
    arch, width = cpu_flags(os.environ["CPU_ARCH"])
    gpus = compute_capabilities(os.environ.pop("TORCH_CUDA_ARCH_LIST", ""))
    os.environ["DS_ACCELERATOR"] = "cuda" if gpus else "cpu"  # whether or not a GPU is here
    if gpus:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(gpus)
        fetch_cuda_compiler(pip_args)
    fetch_sources(pip_args)
    request(wanted)
    compile_for(arch, width, Path(folder, *PACKAGES.parts[1:]).absolute())


def fail(message: str) -> NoReturn:
    sys.exit(f"error: {message}")


def cpu_flags(arch: str) -> tuple[str, str]:
    """g++'s flag for a CPU, and DeepSpeed's for the width of its vectors."""
    flag = f"-march={arch}"
    known = subprocess.run(["g++", flag, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True)
    if known.returncode != 0:
        fail(f"CPU_ARCH: g++ knows no {flag} on {os.uname().machine}; give e.g. x86-64-v3, or armv8-a on ARM")
    return flag, next(width for macro, width in WIDTHS if macro in known.stdout)


def compute_capabilities(text: str) -> list[str]:
    gpus = text.replace(";", " ").split()
    for gpu in gpus:
        if not re.fullmatch(r"\d+\.\d(\+PTX)?", gpu):
            fail(f"TORCH_CUDA_ARCH_LIST: {gpu} is no compute capability; give e.g. '8.0;9.0'")
    if gpus and torch.version.cuda is None:
        fail("TORCH_CUDA_ARCH_LIST: this PyTorch is for the CPU alone; leave it out, or take a PyTorch with CUDA")
    return gpus


def fetch_cuda_compiler(pip_args: tuple[str, ...]) -> None:
    """nvcc of PyPI: of PyTorch's own CUDA version, as DeepSpeed demands. CUDA's other headers came with PyTorch."""
    major = torch.version.cuda.partition(".")[0]
    home = Path("toolkit", "nvidia", f"cu{major}").absolute()
    toolkit = f"cuda-toolkit[nvcc,cccl]=={version('cuda-toolkit')}"
    pip("install", *pip_args, "--no-compile", "--target", "toolkit", toolkit)
    (home / "lib/libcudart.so").symlink_to(f"libcudart.so.{major}")  # the name that the linker looks for
    os.environ |= {"CUDA_HOME": str(home), "CPATH": str(PACKAGES / f"nvidia/cu{major}/include")}


def fetch_sources(pip_args: tuple[str, ...]) -> None:
    """DeepSpeed's sources, to the version that is installed; this process goes on in their folder."""
    sources = ("--no-deps", "--no-build-isolation", "--no-binary", "deepspeed")
    pip("download", *pip_args, *sources, f"deepspeed=={version('deepspeed')}")
    subprocess.run(["tar", "-xf", next(Path().glob("deepspeed-*.tar.gz"))], check=True)
    os.chdir(f"deepspeed-{version('deepspeed')}")
    sys.path.insert(0, str(Path.cwd()))  # as for their setup.py


def pip(*arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", "pip", *arguments]).returncode != 0:
        fail(f"pip {arguments[0]} did not bring {arguments[-1]}; its message is above")


def request(wanted: list[str]) -> None:
    """Ask DeepSpeed's setup.py for the operators, each by the variable that its builder names."""
    from op_builder.all_ops import ALL_OPS, accelerator_name

    named = {one.BUILD_VAR.removeprefix("DS_BUILD_").lower(): one for one in ALL_OPS.values() if one.sources()}
    for name in wanted:
        if name not in named:
            fail(f"DEEPSPEED_OPS: DeepSpeed has no {name} for {accelerator_name}; it has {', '.join(sorted(named))}")
        try:
            compatible = named[name].is_compatible(verbose=True)
        except Exception as error:
            print(error)
            compatible = False
        if not compatible:
            fail(f"DEEPSPEED_OPS: {name} lacks what DeepSpeed names above; leave it out, or choose a BASE that has it")
        os.environ[named[name].BUILD_VAR] = "1"


def compile_for(arch: str, width: str, packages: Path) -> None:
    """Run DeepSpeed's setup.py, which by itself compiles for the CPU of this machine (-march=native, cpuinfo)."""
    from op_builder.builder import OpBuilder

    OpBuilder.cpu_arch = lambda self: arch
    OpBuilder.simd_width = lambda self: width
    os.environ |= {"LDFLAGS": "-s", "DS_ENABLE_NINJA": "1"}  # no debugging symbols; as many compilers as cores
    sys.argv = ["setup.py", "build_ext", "--build-lib", str(packages), "--build-temp", "build"]
    try:
        runpy.run_path("setup.py", run_name="__main__")
    except (Exception, SystemExit) as error:
        fail(f"DEEPSPEED_OPS: what was asked for did not compile: {error}; the compiler's messages are above")
    shutil.copy(LIST, packages / LIST)


if __name__ == "__main__":
    main(*sys.argv[1:])

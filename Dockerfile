# cml_dist and all that it needs, to the version, run by any unprivileged user. docs/how-to/containers.md has the commands,
# also for enroot, pyxis and Apptainer.
#
#   docker build -t cml-dist .                                                                        CPU
#   docker build -t cml-dist:cuda --build-arg BASE=nvidia/cuda:13.0.2-runtime-ubuntu24.04 .           GPUs
#
# BASE is any Debian or Ubuntu that has Python 3.11 or 3.12, as the command python3 or as packages: name a digest
# (python@sha256:...) to fix also its part. PIP_ARGS are more arguments of pip install, as for make: an index with
# CPU-only builds of PyTorch makes the image over 4 GB smaller, for the usual builds carry CUDA (and run without a GPU).
#
# DEEPSPEED_OPS names C++ operators of DeepSpeed to build ahead, for CPU_ARCH and TORCH_CUDA_ARCH_LIST: for code of your
# own, since the trainer starts DeepSpeed without any of them (cml_dist/distributed/deepspeed.py says why). Nothing is compiled
# at run time, and no compiler is in the image.

ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS environment

# make runs the demo. tini is the first process: it hands signals on, and buries what its children leave behind.
# Their versions are those of the base's distribution, which keeps no older ones.
# hadolint ignore=DL3008,SC2086
RUN export DEBIAN_FRONTEND=noninteractive packages="make tini" \
 && { python3 -c 'import ensurepip, venv' 2>/dev/null || packages="$packages python3 python3-venv"; } \
 && apt-get update \
 && apt-get install --yes --no-install-recommends $packages \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/* /var/cache/ldconfig/* /var/log/apt /var/log/*.log \
 && useradd --uid 10001 --no-create-home --home-dir /runs --shell /bin/sh cml \
 && install --directory --owner=cml --group=cml --mode=1777 /runs

# What it needs, before the sources: they change more often, and this is nearly the whole image. pip installs a stand-in
# of the project, which has its requirements alone; the constraints also hold where pip builds a package. Bytecode is
# made here, since no user can write it later; a few files of packages are for other versions of Python.
ENV VENV=/opt/venv PATH=/opt/venv/bin:$PATH
WORKDIR /opt/cml-dist
COPY setup.py pyproject.toml constraints.txt ./
ARG PIP_ARGS=
# hadolint ignore=DL3013,SC2086
RUN export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0 \
 && export PIP_CONSTRAINT=$PWD/constraints.txt PIP_BUILD_CONSTRAINT=$PWD/constraints.txt \
 && stand_in=$(mktemp -d) \
 && mkdir -p "$stand_in/cml_dist" "$stand_in/configs/recipes" "$stand_in/configs/repro" "$stand_in/launch" \
 && cp setup.py pyproject.toml "$stand_in" \
 && echo '__version__ = "0"' >"$stand_in/cml_dist/__init__.py" \
 && python3 -m venv "$VENV" \
 && pip install --no-compile $PIP_ARGS pip \
 && pip install --no-compile $PIP_ARGS setuptools "${stand_in}[trackers]" \
 && pip uninstall --quiet --yes cml-dist \
 && { python -m compileall -q -j 0 "$VENV/lib" || true; } \
 && rm -rf "$stand_in"

# Operators of DeepSpeed, at the place that they have in the image; compilers and sources stay in this stage.
FROM environment AS operators
ARG DEEPSPEED_OPS=
ARG CPU_ARCH=x86-64-v3
ARG TORCH_CUDA_ARCH_LIST=
ARG PIP_ARGS=
WORKDIR /opt/build
COPY scripts/deepspeed_ops.py ./
# hadolint ignore=DL3008,SC2086
RUN mkdir /opt/operators \
 && if [ -n "$DEEPSPEED_OPS" ]; then \
        export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
     && apt-get update \
     && apt-get install --yes --no-install-recommends g++ python3-dev \
     && python deepspeed_ops.py /opt/operators $PIP_ARGS; \
    fi

FROM environment
COPY --from=operators /opt/operators/ /

# The mark is the one of scripts/venv.sh: make finds the environment ready and installs nothing.
COPY . .
RUN PIP_DISABLE_PIP_VERSION_CHECK=1 pip install --no-cache-dir --no-index --no-deps --no-build-isolation --editable . \
 && python -m compileall -q cml_dist \
 && rm -rf build cml_dist.egg-info \
 && ln -s /runs runs \
 && chmod -R a+rX . \
 && touch "$VENV/.installed"

# /runs is all that is written, so that any user and a read-only image do: runs/NAME lies there, and beside it, in
# .cache and .config, what is rendered, downloaded and configured, also where the runtime names another home folder.
ENV HOME=/runs XDG_CACHE_HOME=/runs/.cache XDG_CONFIG_HOME=/runs/.config PYTHONUNBUFFERED=1
USER 10001

# To the whole group: the demo is make, a shell, accelerate and its processes. -s where something else is process 1.
ENTRYPOINT ["/usr/bin/tini", "-s", "-g", "--"]
CMD ["make", "demo"]

ARG BASE
ARG REVISION=
LABEL org.opencontainers.image.title="cml_dist" \
      org.opencontainers.image.description="Distributed Cooperative Meta-Learning: exact second-order MAML with a co-learner" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}" \
      org.opencontainers.image.revision="${REVISION}"

# Each target makes its own environment first; a second call finds it ready.
VENV ?= .venv
# More arguments for pip install, e.g. an index with CPU-only builds of PyTorch.
PIP_ARGS ?=
# More settings for the demo (key=value), and arguments for pytest.
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Arguments of benchmarks/speed.py, and of benchmarks/gpu_check.py.
SPEED_ARGS ?=
GPU_CHECK_ARGS ?=

DEMO := runs/demo
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-all golden speed gpu-check docs lint clean distclean

help:
	@echo "make demo       meta-train CML on embedded data (all GPUs, or 2 CPU processes), test and export it; under 10 minutes"
	@echo "make test       run ruff and the tests (PYTEST_ARGS=...); 9 to 20 minutes on 2 cores"
	@echo "make test-all   the same, and what is slow: the tutorial, container images, two machines, a real SLURM, a browser, long faults"
	@echo "make golden     run five short runs on the commit BASE=... and on the working tree, and compare them to the bit"
	@echo "make speed      seconds of a meta-step beside a plain unrolled loop and other libraries (SPEED_ARGS=...); 15 minutes"
	@echo "make gpu-check  parity, seconds and memory on a GPU, and the largest ViT that trains on it (GPU_CHECK_ARGS=...); 10 minutes"
	@echo "make docs       build the documentation as a site, and check its links: build/site/index.html"
	@echo "make lint       run ruff alone"
	@echo "make clean      remove caches, builds and the demo's run"
	@echo "make distclean  remove the environment $(VENV) as well"

$(INSTALLED): setup.py pyproject.toml
	@scripts/venv.sh $(VENV) $(PIP_ARGS)

# A finished demo is started anew; one that was stopped goes on.
demo: $(INSTALLED)
	@if [ -e $(DEMO)/eval.json ]; then echo "Removing the finished demo in $(DEMO) to run it anew"; rm -rf $(DEMO); fi
	@trap : INT TERM; CML_PYTHON=$(BIN)/python launch/quickstart.sh configs/recipes/glyphs.yaml run.dir=$(DEMO) $(DEMO_ARGS) || \
	{ code=$$?; echo "The demo did not finish: the reason stands above the launcher's traceback. make demo goes on from" \
		"the last checkpoint, make clean removes it."; exit $$code; }

# Three files at a time, on two cores too: much of what the tests of clusters and launchers do is to wait. In the order of
# their names, in which those come first.
test: $(INSTALLED)
	@$(BIN)/ruff check --output-format concise; lint=$$?; \
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS) && exit $$lint

test-all: override PYTEST_ARGS += -m ""
test-all: test

golden: $(INSTALLED)
	@test -n "$(BASE)" || { echo "error: say which commit to compare with: make golden BASE=COMMIT"; exit 2; }
	@$(BIN)/python tests/golden/compare.py "$(BASE)"

speed: $(INSTALLED)
	@$(BIN)/python benchmarks/speed.py $(SPEED_ARGS)

gpu-check: $(INSTALLED)
	@$(BIN)/python benchmarks/gpu_check.py $(GPU_CHECK_ARGS)

# Always all of it: pages hold what follows from the code.
docs: $(INSTALLED)
	@$(BIN)/python -m sphinx -qWE --keep-going -c docs . build/site && echo "Written: build/site/index.html"

lint: $(INSTALLED)
	@$(BIN)/ruff check --output-format concise

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache $(DEMO)
	find cml_dist tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

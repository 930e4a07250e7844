# `make` or `make help` lists the targets. Each does its own set-up; nothing is installed outside .venv and .cache.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# Engine tests with targets of their own, so that make test stays below half an hour on two cores.
APART := tests/engine/test_ray.py tests/engine/test_rat_plus.py
PAGES := options_page supported_page memory_comparison dashboard prometheus_rule
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-unit test-deploy test-engine test-models test-ray test-compat test-gpu sanitize soak format lint types docs docs-check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-12s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: ## create or update .venv: vLLM for CPUs, this package (editable) and the tools; quick when nothing changed
	@$(PYTHON) tools/setup_cpu.py

demo: venv ## serve examples/model with rc_topk on this machine's CPU, and ask it about an 8K-token prompt
	@$(BIN)/python tools/demo.py

test: venv ## everything that runs without a GPU or a network: lint, types, docs, unit and engine tests
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory docs-check
	@$(MAKE) --no-print-directory test-unit
	@$(MAKE) --no-print-directory test-deploy
	@$(MAKE) --no-print-directory test-engine

test-unit: venv ## the method without vLLM, and the GPU kernels interpreted and compiled (about eight minutes)
	$(PYTEST) tests/unit tests/gpu  # the latter are skipped here, but must import

test-deploy: venv ## deploy/ against schemas, linters and parsers; the wheel in a fresh environment (a minute)
	$(PYTEST) tests/deploy

test-engine: venv ## the backend inside real vLLM on the CPU (about fifteen minutes)
	$(PYTEST) tests/engine $(foreach suite,$(APART),--ignore $(suite))

test-models: venv ## RAT+ models inside real vLLM on the CPU (a few minutes; not part of make test)
	$(PYTEST) tests/engine/test_rat_plus.py

test-ray: venv ## the same inside Ray's actors, with Ray's real runtime (a few minutes; not part of make test)
	$(PYTEST) tests/engine/test_ray.py

test-compat: venv ## registration, configuration and planning against every supported vLLM (fetches their sources)
	@$(BIN)/python tools/fetch_vllm.py
	$(PYTEST) tests/compat

test-gpu: ## kernels on this machine's GPU, with the Python that has torch and CUDA (PYTHON=...); skipped without
	$(PYTHON) -m pytest tests/gpu

KERNELS = $(shell grep -oh 'def [a-z_]*_kernel' kernels/triton/*.py | cut -d ' ' -f 2)

# Ours only, which takes a minute instead of many; but initcheck must see what other kernels write.
sanitize: ## each kernel under compute-sanitizer: memcheck, initcheck, racecheck (PYTHON=...; docs/performance.md says what to expect)
	$(foreach tool,memcheck initcheck racecheck,PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
		compute-sanitizer --tool $(tool) $(if $(filter-out initcheck,$(tool)),$(KERNELS:%=--kernel-name kns=%)) \
		--error-exitcode 1 $(PYTHON) -m pytest tests/gpu/test_sanitizers.py &&) true

soak: venv ## 64 clients of every kind against vllm serve on the CPU for ten minutes (MINUTES=...): errors, memory, answers
	@$(BIN)/python -m tools.soak --minutes $(or $(MINUTES),10)

format: venv ## rewrite the sources in the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: venv ## style and likely mistakes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: venv ## mypy, strict
	$(BIN)/mypy

docs: venv ## rewrite what is generated: docs/options.md, docs/supported.md, docs/exponential-memory.md, the Grafana dashboard, the operator's alert rules
	@for page in $(PAGES); do $(BIN)/python -m tools.$$page || exit 1; done

docs-check: venv ## fail if those are not what `make docs` writes
	@for page in $(PAGES); do $(BIN)/python -m tools.$$page --check || exit 1; done

clean: ## remove .venv, caches and build products
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

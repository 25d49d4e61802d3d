# make demo | real | report | test | test-slow | test-real | test-browser | test-aot | test-gpu | lint | format | checkpoints
# INSTALL_ARGS goes to the installer. Where the plain torch pin would bring a CUDA build of several GB, point it at a
# folder or index that holds a CPU build:  make test INSTALL_ARGS="--find-links /path/to/wheels"
SHELL := /bin/bash
PYTHON ?= python3.11
UV := 0.13.9
INSTALL_ARGS ?= $(shell d=$${PIP_FIND_LINKS:-$$($(PYTHON) -m pip config get global.find-links 2>/dev/null)}; test -n "$$d" && echo "--find-links $$d")
PY := .venv/bin/python
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo real report test test-slow test-real test-browser test-aot test-gpu lint format checkpoints
.DELETE_ON_ERROR:

demo: .venv/.lean
	@echo "== demo: distilling the small world's student from its text-only teacher (about 70 s on 2 quiet cores)"
	$(PY) -m omniopd_jax.main --config=configs/tiny.py
	$(PY) -m omniopd_jax.report runs/tiny

real: .venv/.real
	@echo "== real: SmolLM2-135M-Instruct learns from a teacher behind a real vLLM server (about 20 minutes on 2 quiet cores)"
	INSTALL_ARGS="$(INSTALL_ARGS)" $(PY) -m benchmarks.real

report: .venv/.lean
	$(PY) -m omniopd_jax.report $(or $(RUN),runs/tiny)

test: .venv/.full
	@echo "== test: the default suite"
	$(PY) -m pytest -n 2 --dist=worksteal  # whole files stay on one worker, and their fixtures are made once

test-slow: .venv/.full
	@echo "== test-slow: what takes minutes"
	$(PY) -m pytest -m slow

test-real: export JAX_DISABLE_MOST_OPTIMIZATIONS = 0
test-real: .venv/.full
	@echo "== test-real: a real model behind vLLM's CPU build and transformers serve, which are set up first"
	INSTALL_ARGS="$(INSTALL_ARGS)" $(PY) -m benchmarks.real.prepare
	$(PY) -m pytest -m real tests/real

SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
AXE := .cache/axe/package/axe.min.js
test-browser: .venv/.full $(AXE)
	@echo "== test-browser: the report in a headless Chromium, from Debian's packages where there is none"
	@command -v chromium > /dev/null && command -v chromedriver > /dev/null \
		|| { $(SUDO) apt-get update -q && $(SUDO) apt-get install -y -q chromium chromium-driver; }
	.venv/bin/uv pip install -q --python $(PY) selenium==4.51.0
	$(PY) -m pytest -m browser

$(AXE):  # the accessibility checks, from the npm registry
	mkdir -p .cache/axe && cd .cache/axe && npm pack --silent axe-core@4.14.1 && tar xzf axe-core-4.14.1.tgz

test-aot: .venv/.tpu
	@echo "== test-aot: ahead-of-time compilation for a TPU topology"
	$(PY) -m pytest -m aot

test-gpu: .venv/.full
	@echo "== test-gpu: cuDNN against xla, a GPU against the CPU; needs pip install \"jax[cuda13]==0.10.2\""
	JAX_PLATFORMS=cuda,cpu $(PY) -m pytest -m gpu

lint: .venv/.full
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-cache

format: .venv/.full
	$(PY) -m ruff format .

checkpoints: .venv/.lean
	@echo "== checkpoints: training the small worlds' two students and two teachers again (an hour and a half on 2 cores)"
	$(PY) -m benchmarks.small_world.build --out=omniopd_jax/world/checkpoints
	$(PY) -m benchmarks.small_world.build --out=omniopd_jax/world/checkpoints --world=slips --role=student
	$(PY) -m benchmarks.small_world.build --out=omniopd_jax/world/checkpoints --world=style --role=teacher \
		--start=omniopd_jax/world/checkpoints/forks/teacher --steps=2000

.venv/bin/uv:
	@echo "== set-up: .venv, with the installer uv $(UV)"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check uv==$(UV)

# The newest stamp says which set is installed; installing the larger one keeps the smaller one's stamp true.
.venv/.lean: requirements-lean.txt | .venv/bin/uv
	@echo "== set-up: requirements-lean.txt (no torch, no TensorFlow)"
	.venv/bin/uv pip install -q --python $(PY) -r requirements-lean.txt
	@touch $@

.venv/.real: requirements.txt .venv/.lean | .venv/bin/uv
	.venv/bin/uv pip install -q --python $(PY) $$(grep -o '^math-verify==[0-9.]*' requirements.txt)  # the grader of its problems
	@touch $@

.venv/.full: requirements.txt requirements-lean.txt | .venv/bin/uv
	@echo "== set-up: requirements.txt, installer arguments: $(or $(INSTALL_ARGS),none)"
	.venv/bin/uv pip install -q --python $(PY) $(INSTALL_ARGS) -r requirements.txt
	@touch .venv/.lean .venv/.real $@

.venv/.tpu: requirements-tpu.txt requirements-lean.txt .venv/.full | .venv/bin/uv
	@echo "== set-up: requirements-tpu.txt (the TPU compiler)"
	.venv/bin/uv pip install -q --python $(PY) -r requirements-tpu.txt
	@touch $@

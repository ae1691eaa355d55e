# make demo    the whole recipe on this machine, with a report in outputs/demo
# make test    every test that needs no GPU
# make quick   the tests without end-to-end runs
# make slow    GRPO with every shipped reward and family, engines that die
# make check   ruff, its formatter and types of the core
# make wheel   dist/avar_verl-*.whl
#
# Each target builds .venv first, and only when pyproject.toml or the constraints have changed.

SHELL := /bin/bash
PYTHON := .venv/bin/python
STAMP := .venv/.installed
# Two processes: tests wait and compute in turn, so two of them fill two cores.
PYTEST := $(PYTHON) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# A uv of the system, or one in a folder of its own.
UV := $(shell command -v uv || echo .uv/bin/uv)

export HF_HUB_OFFLINE := 1

.PHONY: env demo test quick slow check wheel clean

env: $(STAMP)

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/pip install --quiet uv

# Ray starts a dozen processes a run. Where Python may not write bytecode each would compile torch and vLLM again.
$(STAMP): pyproject.toml constraints/cpu.txt | $(filter .uv/bin/uv,$(UV))
	test -x $(PYTHON) || $(UV) venv --quiet --python '>=3.11,<3.13' .venv
	$(UV) pip install --quiet --compile-bytecode --python $(PYTHON) --constraint constraints/cpu.txt --editable '.[cpu,demo,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(PYTHON) -m avar_verl demo --out outputs/demo

test: $(STAMP)
	$(PYTEST)

quick: $(STAMP)
	$(PYTEST) -m 'not e2e and not slow'

slow: $(STAMP)
	$(PYTEST) -m slow

check: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright

wheel: $(STAMP)
	$(PYTHON) -m hatchling build -t wheel

clean:
	rm -rf .venv .uv outputs dist

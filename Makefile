# `make help` lists what there is. Everything works from a fresh clone: the environment is made on the way.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)

.PHONY: help demo test test-rust test-python dev fmt lint bench bench-peers box wheel clean
.DEFAULT_GOAL := help

help: ## show this
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/made: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $$($(BIN)/python tools/dev-requirements)
	touch $@

dev: $(VENV)/made ## make the environment, build the extension (release) and install it in place
	$(BIN)/maturin develop --release --quiet
	$(BIN)/python tools/build_backend.py
	install target/release/uhyve $(BIN)/uhyve

demo: dev ## from a fresh machine to a guest that Python stops and reads
	@echo '== uhyve doctor'; $(BIN)/uhyve doctor
	@echo '== uhyve demo'; $(BIN)/uhyve demo
	@echo '== a script that stops the demo guest where a condition holds'; $(BIN)/python examples/first.py

test: test-rust test-python ## all tests

test-rust: ## Rust's unit and contract tests; no Python needed
	cargo test --quiet

test-python: dev ## pytest: unit, real VMs, real images
	tools/system-packages
	$(BIN)/python -m pytest -n 2

fmt: $(VENV)/made ## format everything
	cargo fmt
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: dev ## formats, clippy, ruff, mypy, stubtest
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	cargo clippy --all-targets --features python -- -D warnings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest uhyve._core

bench: dev ## what exits, hits, the core's parts and the border cost; makes docs/performance.md of it
	$(BIN)/python benches/run.py
	$(BIN)/python benches/report.py
	cargo bench --quiet --bench exits
	$(BIN)/python benches/hits.py
	$(BIN)/python benches/gdb.py

bench-peers: dev ## the same by the original uhyve, gdbserver, QEMU, Unicorn, CPython, as far as they are here
	$(BIN)/python benches/peers.py
	$(BIN)/python benches/report.py

box: dev ## the Python tests on a full KVM, in tools/kvmbox
	tools/kvmbox -- $(CURDIR)/$(BIN)/python -m pytest -m 'not box' -p no:cacheprovider

wheel: $(VENV)/made ## a wheel in dist/
	$(BIN)/maturin build --release --out dist

clean: ## remove what was built
	rm -rf target $(VENV) dist

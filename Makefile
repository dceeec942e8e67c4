# Needs Python 3.11 or newer and make, no more: each target installs what it uses into .venv.

PYTHON ?= python3
PORT ?= 8000
WORKERS ?= 2
PYTEST_ARGS ?=
# Most tests wait for other processes, so two at a time take little more than half of the time. A
# file is for one of them: its tests share servers.
AT_A_TIME ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# The models come with a wheel; nothing may ask a hub for them.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo demo-nodes test test-long check format bench clean

help: ## say what there is to make
	@echo 'Set PYTHON to choose an interpreter, PORT and WORKERS for the demo, PYTEST_ARGS for tests.'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | \
		while IFS='|' read -r target what; do printf '  %-16s %s\n' "$$target" "$$what"; done

demo: $(VENV)/demo.stamp ## serve the embedding example with a real model
	@printf '%s\n' '' 'Serving examples/embedding_service; Ctrl-C stops it. In another terminal:' '' \
		"  curl -s localhost:$(PORT)/embed -H 'content-type: application/json' \
	-d '{\"texts\": [\"the cat sat on the mat\"]}'" ''
	@# exec: signals for make's child then reach gunicorn, not a shell around it.
	@cd examples/embedding_service && exec '$(CURDIR)/$(BIN)/gunicorn' -k hornbeam \
		--workers $(WORKERS) --bind 127.0.0.1:$(PORT) app:app

demo-nodes: $(VENV)/demo.stamp ## the same on two nodes, with a Redis between them
	@cd examples/distributed_ml && exec '$(CURDIR)/$(BIN)/python' run.py \
		--workers $(WORKERS) --port $(PORT)

test: $(VENV)/dev.stamp ## run the tests, without the long ones
	$(BIN)/pytest -m 'not slow' -n $(AT_A_TIME) --dist loadfile $(PYTEST_ARGS)

test-long: $(VENV)/dev.stamp ## run the long tests: kills, full disks, damage
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

check: $(VENV)/dev.stamp ## lint, check formatting, types and the architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/pytest tests/test_architecture.py

format: $(VENV)/dev.stamp ## format the code, mend what the linter can mend
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench: $(VENV)/dev.stamp ## run the benchmarks; each prints JSON
	$(BIN)/python benchmarks/state.py
	$(BIN)/python benchmarks/messages.py
	$(BIN)/python benchmarks/workers.py
	$(BIN)/python benchmarks/hello.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/transport.py
	$(BIN)/python benchmarks/preload.py
	$(BIN)/python benchmarks/host.py
	$(BIN)/python benchmarks/distributed.py

clean: ## remove what these targets made, the demo's store included
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf examples/*/.hornbeam
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is as new as the last installation of its extra.
INPUTS := pyproject.toml constraints.txt startup_hook.py

$(VENV)/demo.stamp: $(INPUTS)
	$(ensure-venv)
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/dev.stamp: $(INPUTS)
	$(ensure-venv)
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/demo.stamp # dev holds demo

define ensure-venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo 'hornbeam needs Python 3.11 or newer: name one with PYTHON=...' >&2; exit 1; }
@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
endef

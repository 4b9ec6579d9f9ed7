# Every target does its own set-up (dev/bootstrap.py): a virtual environment in .venv with pinned packages, a ComfyUI
# host in .dev (or the one COMFYUI_DIR names), and this checkout installed as lora_loom. All are safe to repeat.

# the first Python that really runs (shims of absent versions do not), is new enough and can make environments
USABLE = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3; do \
	$$p -c '$(USABLE)' 2>/dev/null && command -v $$p && break; done)
RUN = "$(CURDIR)/.venv/bin/python"
# that run the tests; each may take some gigabytes
PROCESSES ?= 2

.PHONY: setup test browser lint demo bench soak clean

setup:
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or newer with venv found: install one, or make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) dev/bootstrap.py

lint: setup
	$(RUN) -m ruff check .
	@mkdir -p .dev/types && ln -sfn ../.. .dev/types/lora_loom
	$(RUN) -m mypy -p lora_loom.kernels -p lora_loom.training -p lora_loom.host -p lora_loom.nodes

test: lint
	$(RUN) -m pytest --numprocesses=$(PROCESSES) --dist=loadfile --no-loadscope-reorder

# the tests of the page alone; FRONTEND=latest or a version takes that page instead of the host's own
browser: setup
	@set -e; page=""; if [ -n "$(FRONTEND)" ]; then page="$$($(RUN) dev/frontend.py "$(FRONTEND)")"; fi; \
	LOOM_FRONTEND="$$page" $(RUN) -m pytest tests/browser

demo: setup
	$(RUN) dev/demo.py

bench: setup
	$(RUN) bench/kernels.py
	$(RUN) bench/train_step.py
	$(RUN) bench/data.py
	$(RUN) bench/apply.py
	$(RUN) bench/tools.py
	$(RUN) bench/editor.py
	$(RUN) bench/editor_server.py
	$(RUN) bench/quality.py --steps 100 --grid 5

soak: setup
	$(RUN) dev/soak.py

clean:
	rm -rf .venv .dev .mypy_cache .pytest_cache .ruff_cache .hypothesis lora_loom.egg-info node.zip
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

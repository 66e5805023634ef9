# Two commands set everything up: `make demo` and `make test`. PIP_ARGS goes to pip, for example to point a machine
# without a GPU at PyTorch's CPU builds (see README).
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test lint clean

demo: $(READY)
	$(RUN) tools/demo.py

test: lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --durations=10

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# torch first: with it in place no requirement of another package pulls a second, larger build.
$(READY): constraints.txt pyproject.toml
	@$(PYTHON) tools/check_machine.py $(VENV)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch==2.13.0
	$(RUN) -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt "setuptools>=77" wheel
	$(RUN) -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs releases

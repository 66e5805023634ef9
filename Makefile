# Two commands set everything up: `make demo` and `make test`. PIP_ARGS goes to pip, for example to point a machine
# without a GPU at PyTorch's CPU builds (see README).
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
LLAMA_CPP := build/llama-cpp

.PHONY: demo test soak test-llama-cpp lint clean

demo: $(READY)
	$(RUN) tools/demo.py

test: lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadgroup --durations=10 -m "not soak"

soak: $(READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadgroup --durations=20 -m soak

# Exported GGUF files against llama.cpp itself, which is compiled once: cmake, a C++ compiler, five minutes on two cores.
test-llama-cpp: $(READY) $(LLAMA_CPP)/.ready
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) tools/llama_cpp/export.py build/llama-cpp-files
	$(LLAMA_CPP)/bin/python tools/llama_cpp/check.py build/llama-cpp-files

$(LLAMA_CPP)/.ready: tools/llama_cpp/requirements.txt
	test -x $(LLAMA_CPP)/bin/python || $(PYTHON) -m venv $(LLAMA_CPP)
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(LLAMA_CPP)/bin/python -m pip install --quiet $(PIP_ARGS) \
		--constraint constraints.txt --no-binary llama-cpp-python --requirement tools/llama_cpp/requirements.txt
	touch $(LLAMA_CPP)/.ready

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
	rm -rf $(VENV) $(LLAMA_CPP) build/llama-cpp-files build/test-cache runs releases

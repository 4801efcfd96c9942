# Two commands for a fresh clone, no GPU and no model hub needed:
#   make demo    set up, compress the embedded model with every method, print the table
#   make test    set up, run the default tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test lint types slow browser docs matrix outside kernels audit clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "spectrim needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/ruff format --check src tests benchmarks examples docs

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Needs Chromium on the PATH; screenshots stay in shots/.
browser: $(STAMP)
	$(BIN)/python -m pytest -m browser tests/browser --basetemp shots

# The documentation into site/, in an environment of its own; fails on a link that leads nowhere.
$(VENV)-docs/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(VENV)-docs/requirements.txt
	$(VENV)-docs/bin/python -m pip install --quiet --constraint constraints.txt --requirement $(VENV)-docs/requirements.txt
	touch $@

docs: $(VENV)-docs/installed
	NO_MKDOCS_2_WARNING=1 PATH=$(VENV)-docs/bin:$$PATH mkdocs build --strict --clean

# A folder under several releases of transformers, each in an environment of its own (tests/matrix/run.sh says more).
matrix:
	PYTHON=$(PYTHON) tests/matrix/run.sh

# Other tools for few bits, each in an environment of its own; hours on a CPU. DATA: see benchmarks/prepare_reference.py.
DATA ?= .carry
outside: $(STAMP)
	$(BIN)/python benchmarks/outside.py --data $(DATA) --out results --environment .outside

# Triton's kernels in its interpreter on the CPU, in an environment of its own: releases of Triton run in it only with
# NumPy below 2.4, and torch for the CPU comes without Triton.
$(VENV)-kernels/installed: $(STAMP)
	$(PYTHON) -m venv $(VENV)-kernels
	$(VENV)-kernels/bin/python -c 'import pathlib, sysconfig as s; pathlib.Path(s.get_path("purelib"), "base.pth").write_text("$(abspath $(VENV))/lib/python%s/site-packages" % s.get_python_version())'
	$(VENV)-kernels/bin/python -m pip install --quiet --ignore-installed --no-deps 'triton==3.6.0' 'numpy>=2,<2.4'
	touch $@

kernels: $(VENV)-kernels/installed
	PYTHONPATH=src TRITON_INTERPRET=1 $(VENV)-kernels/bin/python -m pytest -rs tests/unit/test_kernels.py tests/unit/test_coded_rows.py \
		tests/unit/test_many_rows.py tests/unit/test_rotary.py

# Known vulnerabilities in what is installed; fails too where it cannot find out. .ci/run goes on without it.
audit: $(STAMP)
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip freeze --exclude-editable | sed "/ @ /d; s/+cpu$$//" > $(VENV)-audit/installed.txt
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)-audit/installed.txt

clean:
	rm -rf $(VENV) $(VENV)-audit $(VENV)-docs $(VENV)-kernels .matrix .outside demo-out site

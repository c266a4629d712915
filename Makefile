# Two commands do everything on a fresh machine with Python 3.11 or newer and git:
#   make reproduce    the embedded benchmark: trains, then writes Tables 1-2, Figures 2 and 4 and the report
#   make test         the test suite
#   make docs         the documentation site, in site/
#   make article      the article as a page and a PDF, in outputs/report/
# Each creates the virtual environment .venv if there is none. PYTHON=... selects the interpreter.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SOURCES := nbs tests tools benchmarks docs

.PHONY: help reproduce test test-slow docs article sync lock bench clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,6p' Makefile | sed 's/^# *//'

$(STAMP): pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c requirements.lock -e '.[repro,dev]'
	touch $(STAMP)

# with the instruction set of the committed records, a processor with AVX-512 gives their numbers too
SAME_NUMBERS := $(if $(filter x86_64,$(shell uname -m)),ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell)

reproduce: $(STAMP)
	$(SAME_NUMBERS) $(BIN)/cadm reproduce

test: $(STAMP)
	$(BIN)/ruff check --quiet $(SOURCES)
	$(BIN)/ruff format --quiet --check $(SOURCES) cadm_paper
	$(BIN)/lint-imports --no-logo >/dev/null 2>&1 || $(BIN)/lint-imports --no-logo
	$(BIN)/python tools/count.py
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

# slow tests: kills, browsers (Chromium on the path, or CADM_CHROMIUM), wheels; tests of missing programs are skipped with the reason
test-slow: $(VENV)/.installed-slow
	$(BIN)/python -m pytest -m slow

$(VENV)/.installed-slow: $(STAMP)
	$(BIN)/python -m pip install --quiet -c requirements.lock -e '.[repro,slurm,dev,docs,browser]'
	touch $@

docs: $(VENV)/.installed-docs
	$(BIN)/python tools/docs.py

$(VENV)/.installed-docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c requirements.lock -e '.[repro,dev,docs]'
	touch $@

# the PDF needs Chromium (on the path, or CADM_CHROMIUM)
article: $(VENV)/.installed-slow
	$(BIN)/python tools/article.py

# notebooks -> cadm_paper/, README.md, badges
sync: $(STAMP)
	$(BIN)/ruff check --quiet --fix $(SOURCES)
	$(BIN)/ruff format --quiet $(SOURCES)
	$(BIN)/nbdev_export
	$(BIN)/ruff format --quiet cadm_paper
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py
	$(BIN)/python tools/badges.py

# requirements.lock from pyproject.toml: pins are kept if they still fit; `make lock UPGRADE=--upgrade` uses the newest versions.
lock: $(STAMP)
	$(BIN)/python -m pip install --quiet uv
	cp requirements.lock requirements.lock.new
	$(BIN)/python -m uv pip compile pyproject.toml --all-extras $(UPGRADE) --universal --python-version 3.11 --no-annotate \
		--no-emit-index-url --no-emit-find-links --no-header --quiet --output-file requirements.lock.new
	{ grep '^#' requirements.lock; cat requirements.lock.new; } > requirements.lock.whole
	mv requirements.lock.whole requirements.lock
	rm requirements.lock.new

# all benchmarks, and the table of benchmarks/README.md: an hour on two idle cores
bench: $(STAMP)
	$(BIN)/python benchmarks/table.py --run

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis

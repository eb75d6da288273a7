# make book     execute the chapters, build the book, print the page to open
# make test     everything that has to hold: lint, types, the book, all tests
# make check    the quick loop: lint, types, quick tests
# make chapter C=rewinding             execute one chapter as written
# make paper   C=rewinding F=cifar10   the same with a preset, and keep what it measured in book/results
# make figure   draw the README's figure from book/results
# make bench    the side-by-side timings, kept in benchmarks/results
# make setup    the environment .venv, which every other target makes when it is not there
# make clean    remove what was built; the environment and the trainings stay

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# One thread for each process: two processes side by side are faster than one with two threads.
export OMP_NUM_THREADS = 1

.PHONY: book test check lint chapter paper figure bench setup clean

book: $(READY)
	@$(BIN)/memloc build

test: lint
	$(BIN)/memloc build
	$(BIN)/pytest -q -n 2 --dist loadgroup

check: lint
	$(BIN)/pytest -q -n 2 -m "not slow and not browser"

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

chapter: $(READY)
	@$(BIN)/memloc run $(or $(C),$(error say which: make chapter C=NAME))

paper: $(READY)
	@$(BIN)/memloc run $(or $(C),$(error say which: make paper C=NAME F=PRESET)) -f $(or $(F),$(error say F=PRESET)) --record

figure: $(READY)
	$(BIN)/python book/figure.py

bench: $(READY)
	@$(BIN)/python benchmarks/record.py

setup: $(READY)

# The stamp is written last, so that an interrupted installation is repeated.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "memloc needs Python 3.11 or newer: name one with make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make an environment: install its package python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check -e '.[book,test,bench,sweep]' -c constraints.txt
	@touch $@

clean:
	rm -rf _build

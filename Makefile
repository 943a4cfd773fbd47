# Everything works in .venv; every target does its own set-up and is safe to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := dev

.PHONY: quickstart compare test slow lint clean

# A stamp newer than what it was made from means the environment is whole; an interrupted install leaves none.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python -m speechjax.main --config=configs/pretrain/apc.py:size=tiny --workdir=runs/quickstart \
	    --config.data.source=embedded --config.data.shapes=1 --config.train.steps=800 --config.train.eval_every=200

# Every objective on the same speech, one table: make compare ARGS='--source=folder:/data/speech --hours=4'
ARGS ?= --source=embedded:2 --hours=2
compare: $(VENV)/.installed
	$(BIN)/python -m speechjax.compare --out=runs/compare $(ARGS)

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

# Real processes, whole runs and the golden first steps of every objective.
slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build *.egg-info

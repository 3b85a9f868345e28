# make demo   a fresh machine to a base model, an assistant, an aligned one, and a page that compares them
# make play   a page on this machine, after the demo: guess, pick, train, compare
# make lessons  after the demo: what is said of how models are trained, measured
# make test   a fresh machine to a tested checkout
# make lint   style and types
#
# Interrupted and started again, the demo goes on where it was. TRAIN, SFT, SAMPLE, POLICY and ASK add options
# to its stages, PLAY to the page's server, LESSON to every lesson; LESSONS names some of them.

PYTHON ?= python3
BIN := .venv/bin
LESSONS = $(wildcard lessons/[0-9]*.py)
RESUME = $(if $(wildcard $(1)/run.json),--resume,$(2))

.PHONY: demo play lessons test lint style types

demo: .venv/installed
	$(BIN)/python train.py $(call RESUME,out/base,$(TRAIN))
	$(BIN)/python sft.py $(call RESUME,out/sft,$(SFT))
	$(BIN)/python rlhf.py --stage sample $(call RESUME,out/rlhf,$(SAMPLE))
	$(BIN)/python rlhf.py --stage rank
	$(BIN)/python rlhf.py --stage agreement
	$(BIN)/python rlhf.py --stage reward $(call RESUME,out/rlhf/reward,)
	$(BIN)/python rlhf.py --stage policy $(call RESUME,out/rlhf/ppo,$(POLICY))
	$(BIN)/python -m minillm.compare out/base out/sft out/rlhf/ppo $(ASK)

play: .venv/installed
	$(BIN)/python -m minillm.play $(PLAY)

lessons: .venv/installed
	for lesson in $(LESSONS); do $(BIN)/python $$lesson $(LESSON) || exit; done

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TESTS)

lint: style types

style: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks
	MYPYPATH=lessons $(BIN)/mypy lessons

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --editable '.[test]'  # Python compiles what is used, when it is
	touch $@

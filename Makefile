# Shortcuts for people; nothing depends on them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install run test slow lint format ci
install: $(BIN)/cdpo-train
$(BIN)/cdpo-train: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c requirements.lock -e '.[test,dev]'
	@touch $@
run: install
	$(BIN)/cdpo-train
test: install
	$(BIN)/pytest -n 2 -m "not slow"
slow: install
	$(BIN)/pytest -n 2 --dist loadfile -m slow
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
ci:
	.ci/run

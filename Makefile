# make demo: the demo study, end to end.   make test: the test suite.   make check: lint, format, types.
# make docs: the documentation as a site, docs/_build/index.html; a broken link is an error.
# make test-long: what is rare and slow, and not in `make test`: random kills, long fuzzing, every case on every engine.
# TEST_PROCESSES=9 make test: where there are more cores than two; two processes have the Slurm tests, and mostly wait.
# make test-versions: the core tests with the lowest versions that pyproject.toml allows, then with the newest and the
# newest Python that is installed, each in a new environment of 6 GB (about 3 GB to download), and those of checkpoints on
# the lowest patch release of our Python that is installed. make test-versions-short: one short way through the package
# instead of the core tests, and of those of checkpoints the ones that what a version reads and writes decides.
PYTHON ?= python3
VENV ?= .venv
TEST_PROCESSES ?= 5
BIN := $(VENV)/bin
# PYTHONDONTWRITEBYTECODE, where it is set, makes each of the many processes compile torch anew: twice the time of an import.
# Test processes are forked from one that has imported torch and what else the tests import.
PROCESSES = --tx '$(TEST_PROCESSES)*popen//python=$(BIN)/python tests/fork_server.py'
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(PROCESSES) --dist loadfile --no-loadscope-reorder --durations 10
CORE_TESTS := tests/test_versions.py $(wildcard tests/test_data_*.py tests/test_models_*.py tests/test_train_*.py)
RESUME_TESTS := tests/test_train_resume.py
LOADING_TESTS := $(addprefix $(RESUME_TESTS)::test_,killed_inside_a_checkpoint_write \
	a_checkpoint_of_an_older_version_is_resumed a_checkpoint_holds_no_pickled_table_of_contents \
	no_code_in_a_checkpoint_is_run)
UV_ENV := UV_CONSTRAINT=constraints.txt $(if $(wildcard $(PIP_FIND_LINKS)),UV_FIND_LINKS=$(PIP_FIND_LINKS))

demo: $(VENV)/.installed-demo
	$(BIN)/depthmup transfer configs/digits_resnet.yaml

test: $(VENV)/.installed-dev
	$(PYTEST) $(TESTS)

test-long: $(VENV)/.installed-dev
	$(PYTEST) -m long $(TESTS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.installed-dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build

$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(UV_ENV) $(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[$*]'
	touch $@

test-versions: $(VENV)/.installed-dev
	tests/versions.sh patch $(RESUME_TESTS)
	PYTHON=$(PYTHON) tests/versions.sh lowest test $(CORE_TESTS)
	tests/versions.sh newest test $(CORE_TESTS)

test-versions-short: $(VENV)/.installed-dev
	tests/versions.sh patch $(LOADING_TESTS)
	PYTHON=$(PYTHON) tests/versions.sh lowest test-core tests/test_versions.py
	tests/versions.sh newest test-core tests/test_versions.py $(LOADING_TESTS)

clean:
	rm -rf runs shards docs/_build

.PHONY: demo test test-long check docs test-versions test-versions-short clean

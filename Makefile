# make demo: both phases on this machine, then a look at the store.  make test: the tests.  Either makes .venv first.

VENV ?= .venv
MARK ?= not slurm and not slow
JOBS ?= 2
NEWEST := .venv-newest
SHORT := $(wildcard $(addprefix tests/test_,$(addsuffix .py,attention_* budget kernels norms packing rescore scoring self_test store_* \
	train_gate train_packed train_trainer)))
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# The first of these that is Python 3.11 to 3.13. Another one: make PYTHON=/path/to/python3.12 …
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
ifndef PYTHON
PYTHON := $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c '$(IN_RANGE)' >/dev/null 2>&1 && echo $(p))))
endif

SQL := select row, round(ref_chosen_logps, 1) as chosen, round(ref_rejected_logps, 1) as rejected, \
	round(ref_chosen_logps / num_chosen_tokens - ref_rejected_logps / num_rejected_tokens, 3) as margin_per_token \
	from pairs order by margin_per_token limit 5

.PHONY: help demo test test-slurm test-all test-newest gpu lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    both phases with a tiny model: a reference store in store/demo, a DPO run in runs/demo (two minutes)"
	@echo "make test    the tests, but those of the next two lines; JOBS=4 for four processes instead of two"
	@echo "make test-slurm  the batch scripts on real Slurm daemons, installed if absent (root; ten minutes)"
	@echo "make test-all    all of them, packed ZeRO-2 training against TRL's too: what CI runs"
	@echo "make test-newest  the tests of scoring, training's forward, gate and store with the newest torch and transformers, in $(NEWEST)"
	@echo "make gpu     all that is claimed for GPUs, on this machine's: a report in runs/gpu (eight minutes)"
	@echo "make lint    ruff, and mypy on store/ and precompute/scorer/"
	@echo "make clean   remove what the demo, the tests and the linter made; $(VENV) stays"
	@echo "make $(VENV)   only the environment; demo, test and lint make it themselves"
	@echo "make UV=1 …  install with uv instead of pip; TORCH=torch==… and TRANSFORMERS=transformers==… name others: README, Install"

$(VENV): $(INSTALLED)

# make UV=1 … installs with uv instead of pip. TORCH and TRANSFORMERS name others than constraints.txt does, such as TORCH=torch==2.13.1; which build
# of torch (CPU, CUDA) is what UV_TORCH_BACKEND, or pip's index, says.
PINNED_TORCH := $(shell grep '^torch==' constraints.txt)
PINNED_TRANSFORMERS := $(shell grep '^transformers==' constraints.txt)
TORCH ?= $(PINNED_TORCH)
TRANSFORMERS ?= $(PINNED_TRANSFORMERS)
PINS := $(VENV)/constraints.txt
# Another torch chooses its setuptools (2.11 wants one before 82), another transformers its tokenizers.
UNPINNED := $(if $(filter-out $(PINNED_TORCH),$(TORCH)),-e '^torch==' -e '^setuptools==') \
	$(if $(filter-out $(PINNED_TRANSFORMERS),$(TRANSFORMERS)),-e '^transformers==' -e '^tokenizers==')
ifdef UV
MAKE_VENV = uv venv --quiet --allow-existing --python $(PYTHON) $(VENV)
INSTALL = uv pip install --python $(PY) -c $(PINS)
else
MAKE_VENV = $(PYTHON) -m venv $(VENV)
INSTALL = $(PY) -m pip install --disable-pip-version-check -c $(PINS)
endif

# torch comes first: packages that look for it while they are built then find it. g++ is for precompute/scorer/kernels.cpp and, with Python's
# headers, for DeepSpeed's CPU operator: both are compiled at first use.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found (python3 is $$(python3 --version 2>&1)). Debian, Ubuntu: sudo apt-get install python3 python3-venv python3-dev. Elsewhere: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c '$(IN_RANGE)' || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); this project needs Python 3.11, 3.12 or 3.13." >&2; exit 1; }
ifdef UV
	@command -v uv >/dev/null || { echo "uv not found: pip install uv, or leave out UV=1" >&2; exit 1; }
else
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments. Debian, Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
endif
	@command -v g++ >/dev/null || { echo "g++ not found; scoring on a CPU and DeepSpeed compile their kernels with it. Debian, Ubuntu: sudo apt-get install g++" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null || { echo "Python.h not found; DeepSpeed's CPU operator needs it. Debian, Ubuntu: sudo apt-get install python3-dev" >&2; exit 1; }
	@echo "Installing into $(VENV) ($$($(PYTHON) --version)). The first time this takes a few minutes."
	$(MAKE_VENV)
	@{ grep -v -e '^#' $(UNPINNED) constraints.txt; echo '$(TORCH)'; echo '$(TRANSFORMERS)'; } > $(PINS)
	$(INSTALL) '$(TORCH)'
	$(INSTALL) '$(TRANSFORMERS)' -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	@for old in store/demo runs/demo; do if [ -e $$old ]; then echo "Removing $$old of an earlier demo"; rm -rf $$old; fi; done
	@printf '\n== 1 of 3 == Score the frozen reference model once, keep its log-probs on disk\n\n$$ python cli.py precompute --dataset demo\n'
	@$(PY) cli.py precompute --dataset demo
	@printf '\n== 2 of 3 == Train DPO from the store; no reference model is loaded\n\n$$ python cli.py train --ref-store store/demo\n'
	@$(PY) cli.py train --ref-store store/demo
	@printf '\n== 3 of 3 == What lies between: Parquet files that any SQL reads\n\n$$ python cli.py inspect --ref-store store/demo\n'
	@$(PY) cli.py inspect --ref-store store/demo
	@printf '\nThe five pairs whose rejected answer the reference likes best compared with the chosen one (nats):\n\n$$ python cli.py inspect --ref-store store/demo --sql "%s"\n' "$(SQL)"
	@$(PY) cli.py inspect --ref-store store/demo --sql "$(SQL)"
	@printf '%s\n' '' \
		'Made:  store/demo   the reference store: token ids and log-probs of every pair, and the identity of the model that gave them' \
		'       runs/demo    the trained model and the record of its run' \
		'       demo/model   the model that both phases started from' \
		'' \
		'Next:  source $(VENV)/bin/activate' \
		'       python cli.py inspect --ref-store store/demo                          # read on in SQL' \
		'       python cli.py verify --ref-store store/demo --model demo/model        # score again, compare' \
		'       python cli.py precompute --dataset YOURS.jsonl --model DIR_OR_HUB_ID --max-length 2048 --dtype bfloat16' \
		'       python cli.py train --ref-store store/YOURS'

# Files are dealt to JOBS processes, in the order of their names: what the tests of a file share is made once, and the last long file starts two
# processes of its own. One thread per process, for several tests start two or three.
test: $(INSTALLED)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 $(PY) -m pytest -q -m "$(MARK)" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

test-slurm:
	@$(MAKE) --no-print-directory test MARK=slurm

test-all:
	@$(MAKE) --no-print-directory test MARK=

# The newest torch and transformers, whatever constraints.txt says, and the tests that would tell whether they compute the same.
test-newest:
	rm -rf $(NEWEST)
	@$(MAKE) --no-print-directory test VENV=$(NEWEST) TORCH=torch TRANSFORMERS=transformers TESTS='$(SHORT)'
	@$(NEWEST)/bin/python -c 'import torch, transformers; print("Run with torch", torch.__version__, "and transformers", transformers.__version__)'

# What is installed by hand in $(VENV) is as good; a machine with GPUs may have no network. make gpu VENV=$$VIRTUAL_ENV takes another one.
gpu:
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "trl", "deepspeed", "pytest"))))' 2>/dev/null \
		|| $(MAKE) --no-print-directory $(INSTALLED)
	@$(PY) benchmarks/gpu.py

lint: $(INSTALLED)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

clean:
	rm -rf build logs .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info demo/model demo/.model-* store/demo runs/demo
	find . -name __pycache__ -not -path './.venv*/*' -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Every command a newcomer types.  Environments are made on first use and remade when pyproject.toml or
# constraints.txt changes; nothing outside this folder and the user's cache is touched.
PYTHON ?= python3
PIP_FLAGS = -q --disable-pip-version-check
BIN = .venv/bin
WORKDIR ?= runs/quickstart
STAGE ?= sft# sft, or dpo or rl: the second stage too; chain: a chain of seven stages
# Large pages for large arrays, where Linux leaves that to the program: 8 and 18 % of two DPO steps on CPU.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
DRAWS ?= 500# of make compose
# A folder of data that are not part of the repository: humaneval/HumanEval.jsonl.gz, gsm8k/test.jsonl; tests without theirs are skipped.
ifdef POSTTRAIN_DATA
export POSTTRAIN_DATA := $(abspath $(POSTTRAIN_DATA))
endif
WORKERS ?= 2# test processes; a file of tests stays in one, for what its tests share

.PHONY: help quickstart test test-slow test-all test-compilers test-newest check format oracle bench compile-70b plans scaling memory-claims offload optimizers mutate compose fuzz docs clean
help:
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v.major}.{v.minor}; write make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

# The reference libraries, apart from our own: torch pins what we do not want pinned.
.venv-oracle/ready: pyproject.toml constraints.txt oracle-constraints.txt
	$(PYTHON) -m venv .venv-oracle
	.venv-oracle/bin/python -m pip install $(PIP_FLAGS) torch==2.13.0
	.venv-oracle/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt -c oracle-constraints.txt \
	  transformers peft trl bitsandbytes accelerate mergekit xllamacpp 'lm-eval[api]' -e '.[dev]'
	@touch $@

# Compilers for accelerators that are not here, of the versions that jax 0.10.2 pins; no driver and no NVIDIA library.
.venv-tpu/ready: .venv/ready
	mkdir -p .venv-tpu
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --upgrade --target .venv-tpu/site 'libtpu==0.0.42.*' \
	  jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2
	@touch $@

quickstart: .venv/ready ## environment, embedded model, LoRA fine-tune on text-to-SQL, report; STAGE=dpo: then DPO on its mistakes; STAGE=rl: then GRPO; STAGE=chain: a chain of stages in its place
	$(BIN)/posttrain fetch smollm2
ifeq ($(STAGE),chain)
	$(BIN)/posttrain chain --config=quickstart_chain --workdir=$(WORKDIR)-chain
else
	$(BIN)/posttrain train --config=configs/quickstart.py --workdir=$(WORKDIR)
endif
ifeq ($(STAGE),dpo)
	[ -d $(WORKDIR)/merged ] || $(BIN)/posttrain export --workdir=$(WORKDIR) --out=$(WORKDIR)/merged --merge
	[ -f $(WORKDIR)/pairs.jsonl ] || $(BIN)/posttrain pairs --model=$(WORKDIR)/merged --task=sql --out=$(WORKDIR)/pairs.jsonl
	$(BIN)/posttrain train --config=configs/quickstart_dpo.py:model=$(WORKDIR)/merged,data=$(WORKDIR)/pairs.jsonl --workdir=$(WORKDIR)-dpo
endif
ifeq ($(STAGE),rl)
	$(BIN)/posttrain train --config=configs/quickstart_rl.py:start=$(WORKDIR) --workdir=$(WORKDIR)-rl
endif

test: .venv/ready ## the fast suite
	$(BIN)/python -m pytest -m "not slow and not oracle" -n $(WORKERS) --dist loadfile

test-slow: .venv/ready ## what the fast suite leaves out: the other cases of each kind, whole commands, every printed command
	$(BIN)/python -m pytest -m "slow and not oracle" -n $(WORKERS) --dist loadfile

test-compilers: .venv-tpu/ready ## what compiles for TPUs and NVIDIA's cards that are not here, the slow cases too
	JAX_PLATFORMS=cpu PYTHONPATH=.venv-tpu/site $(BIN)/python -m pytest -m compilers -n $(WORKERS) --dist loadfile

test-all: .venv/ready ## the fast suite and the slow tests
	$(BIN)/python -m pytest -m "not oracle"

test-newest: ## the fast suite on the newest jax, where a Python >= 3.12 is found (also among pyenv's)
	@for v in 3.14 3.13 3.12; do for p in python$$v $$HOME/.pyenv/versions/$$v.*/bin/python$$v; do \
	  [ -z "$$newest" ] && $$p -c 'import venv, ssl' 2>/dev/null && newest=$$p; done; done; \
	if [ -z "$$newest" ]; then echo "test-newest: no working Python >= 3.12 found; nothing was tested"; exit 1; fi; \
	$$newest -m venv .venv-newest && .venv-newest/bin/python -m pip install $(PIP_FLAGS) -U jax -e '.[dev]' && \
	.venv-newest/bin/python -c 'import jax, sys; print("jax", jax.__version__, "on Python", sys.version.split()[0])' && \
	.venv-newest/bin/python -m pytest -m "not slow and not oracle" -n $(WORKERS) --dist loadfile

fuzz: .venv/ready ## 2,000 spoiled inputs of every kind: read right or refused in a sentence; INPUT=rows:123 repeats one
	$(BIN)/python -m tests.fuzz.run $(if $(INPUT),--input=$(INPUT))

compose: .venv/ready ## 500 random combinations of everything: run, learn, shard, resume, export; DRAW=123 repeats one; ONLINE=1: of runs that write
	$(BIN)/python -m tests.compose.run $(if $(ONLINE),--online) $(if $(DRAW),--draw=$(DRAW),--draws=$(DRAWS) --workers=$(WORKERS))

check: .venv/ready ## format, lint, types, examples in docstrings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ty check
	$(BIN)/python -m pytest --doctest-modules posttrain_jax

FOLDER ?=# of `make mutate`: losses, objectives, merge, optim, quant, adapters; all when empty
SAMPLE ?= 25# breaks drawn per folder; 0: all of them

mutate: .venv/ready ## small faults put into the code one at a time, and those that no test notices; FOLDER=losses SAMPLE=25
	$(BIN)/python -m tests.mutation.mutate --sample=$(SAMPLE) --workers=$(WORKERS) $(if $(FOLDER),--folder=$(FOLDER))

.venv/ready-docs: .venv/ready
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev,docs]'
	@touch $@

docs: .venv/ready-docs ## the pages of docs/ as HTML in build/docs, with every field and the API; a broken link is an error
	$(BIN)/python -m sphinx -b html -q -W --keep-going -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

oracle: .venv-oracle/ready ## live comparison with transformers, peft, trl, bitsandbytes, mergekit, llama.cpp and lm-eval; POSTTRAIN_DATA=FOLDER with humaneval/ adds HumanEval
	.venv-oracle/bin/python -m posttrain_jax fetch smollm2
	.venv-oracle/bin/python -m pytest tests/oracle -m oracle -n $(WORKERS) --dist loadfile

bench: .venv-oracle/ready ## speed and memory beside PyTorch + PEFT and TRL, on the same cores in one run
	.venv-oracle/bin/python -m posttrain_jax fetch smollm2
	.venv-oracle/bin/python experiments/bench.py
	.venv-oracle/bin/python experiments/bench_dpo.py
	.venv-oracle/bin/python experiments/bench_grpo.py
	.venv-oracle/bin/python experiments/bench_generation.py
	for modules in default all; do for more in "" --peer; do \
	  .venv-oracle/bin/python experiments/bench_serving.py --modules $$modules $$more || exit 1; done; done

compile-70b: .venv-tpu/ready ## Llama-3-70B QLoRA compiled for TPUs that are not here
	PYTHONPATH=.venv-tpu/site $(BIN)/python experiments/compile_70b.py

plans: .venv-tpu/ready ## five trainings on seven sets of accelerators that are not here: what fits, how fast; FRESH=1 begins anew
	PYTHONPATH=.venv-tpu/site $(BIN)/python experiments/plans.py $(if $(FRESH),--fresh)

scaling: .venv-tpu/ready ## what a step sends on 8 to 4,096 TPUs that are not here, and where links bind it; FRESH=1 begins anew
	PYTHONPATH=.venv-tpu/site $(BIN)/python experiments/scaling.py $(if $(FRESH),--fresh)

memory-claims: .venv-tpu/ready ## what playbooks say about memory, beside arithmetic and the compilers; FRESH=1 begins anew
	PYTHONPATH=.venv-tpu/site $(BIN)/python experiments/memory_claims.py $(if $(FRESH),--fresh)

offload: .venv-tpu/ready ## full fine-tuning of 8B with state and parameters in host memory, compiled for TPUs that are not here
	PYTHONPATH=.venv-tpu/site $(BIN)/python experiments/offload.py

optimizers: .venv/ready ## full fine-tuning of the embedded model with every optimizer: bytes, loss, seconds
	$(BIN)/posttrain fetch smollm2
	$(BIN)/python experiments/optimizers.py

clean:
	rm -rf .venv .venv-oracle .venv-tpu .venv-newest .cache runs

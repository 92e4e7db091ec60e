# Every target makes its own virtual environment first; the stamp file makes the second call install nothing.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed.stamp
ALL_STAMP := $(VENV)/optional.stamp
OUTPUT ?= runs/sample.mp4
PLAN   ?= experiments/ablations/attention.yaml
LOGDIR ?= runs
TENSORBOARD = http://localhost:6006/

# $(call needs,NAME,example) ends with a sentence where the variable was not given.
needs = @$(if $($(1)),:,echo 'make $@ needs $(1)=..., for example $(1)=$(2)' >&2; exit 2)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format bench bench-quick eval sample train ablations tensorboard clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

install: $(STAMP)  ## make the virtual environment

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is %d.%d" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,reference]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps clean-fid
	@touch $@

demo: $(STAMP)  ## render clips, train tokenizer, captioner and DiT, sample, score: 14 minutes on 2 CPU cores
	$(BIN)/python -m sora_lightning demo

# A process for each core, one thread in each.
test: $(STAMP)  ## the tests that CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m "not slow and not gpu"

test-all: $(ALL_STAMP)  ## all tests, the slow ones and those of optional packages too
	$(BIN)/python -m pytest

# litdata names torchvision, whose wheels do not load beside a CPU-only torch, and runs without it.
$(ALL_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[scenes]' selenium wandb
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps litdata boto3 botocore s3transfer jmespath obstore tifffile
	@touch $@

lint: $(STAMP)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## speed, beside the machine's own matrix product: make bench [ARGS="denoisers"]
	$(BIN)/python -m tests.bench $(ARGS)

bench-quick: $(STAMP)  ## fail where a key ratio of speed lost more than 15 % of experiments/results/bench
	$(BIN)/python -m tests.bench.guard $(ARGS)

train: $(STAMP)  ## make train CONFIG=experiments/own_clips/tokenizer.yaml [ARGS="--data.manifest ..."]
	$(call needs,CONFIG,experiments/own_clips/tokenizer.yaml)
	$(BIN)/python -m sora_lightning fit --config $(CONFIG) $(ARGS)

sample: $(STAMP)  ## make sample CKPT=... PROMPT="a red circle moves left" [OUTPUT=...] [ARGS="--size 32x32"]
	$(call needs,CKPT,runs/demo/text_to_video/checkpoints/last.ckpt)
	$(call needs,PROMPT,"a red circle moves left")
	$(BIN)/python -m sora_lightning sample --checkpoint "$(CKPT)" --prompt "$(PROMPT)" --output "$(OUTPUT)" $(ARGS)

eval: $(STAMP)  ## make eval CKPT=... [PROTOCOL=demo] [REFERENCE=manifest] [ARGS="--output folder"]
	$(call needs,CKPT,runs/demo/text_to_video/checkpoints/last.ckpt)
	$(BIN)/python -m evaluation --checkpoint "$(CKPT)" $(if $(PROTOCOL),--protocol $(PROTOCOL)) $(if $(REFERENCE),--reference $(REFERENCE)) $(ARGS)

ablations: $(STAMP)  ## make ablations [PLAN=experiments/ablations/attention.yaml] [ARGS=--plan]
	$(BIN)/python -m sora_lightning ablate $(PLAN) $(ARGS)

tensorboard: $(STAMP)  ## make tensorboard [LOGDIR=runs/ablations/attention/tensorboard]
	@echo 'curves and moving samples: $(TENSORBOARD)   of an ablation, margins: $(TENSORBOARD)#custom_scalars   table: $(TENSORBOARD)#hparams'
	$(BIN)/tensorboard --logdir $(LOGDIR) --samples_per_plugin images=100 --port 6006

clean:  ## remove runs and the virtual environment
	rm -rf runs $(VENV)

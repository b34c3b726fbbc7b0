# Two commands do everything: `make demo` and `make test`. Both first make .venv with exact, hashed versions.
# Both force the CPU: they need no GPU, no compiler and no download other than the packages.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ON_CPU := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu PATH="$(CURDIR)/$(BIN):$$PATH"
DEMO := runs/demo

.PHONY: env demo test lint types lock

env: $(STAMP)

# Where Python may write no byte code, importing torch would take a minute each time.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)

$(STAMP): requirements.lock setup.py
	@command -v $(PYTHON) >/dev/null || { echo "make env: $(PYTHON) not found; set PYTHON=/path/to/python (3.11 or newer)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --require-hashes $(COMPILE) -r requirements.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --editable .
	touch $(STAMP)

# The main job, small: a teacher, then stagewise distillation with 1 teacher rank and 2 ZeRO-2 students, all real.
demo: env
	rm -rf $(DEMO)
	$(ON_CPU) python recipes/train_teacher.py --train-shards digits:train --val-shards digits:val \
		--test-shards digits:test --num-classes 10 --image-size 32 --augment shift --teacher skd_narrow_resnet26 \
		--head-duration 300steps --global-batch-size 64 --num-workers 0 --lr 1e-2 --run-dir $(DEMO)/teacher
	$(ON_CPU) deepspeed --num_accelerators 3 recipes/digits_demo.py --teacher-ranks 1 \
		--teacher-checkpoint $(DEMO)/teacher/student/model.safetensors --run-dir $(DEMO)

test: env lint types
	OMP_NUM_THREADS=1 $(ON_CPU) python -m pytest

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

lock: env
	$(BIN)/uv pip compile setup.py --extra dev --universal --python-version 3.11 --generate-hashes --quiet \
		--custom-compile-command "make lock" -o requirements.lock

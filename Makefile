# demo · test · slow · real · faults · lint · bench · clean: each makes its own .venv when there is none.
PYTHON ?= python3
VENV := .venv/bin
# One thread: several times faster for models this small, and no slower where the cores are shared.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test slow real faults lint bench clean

demo: .venv/installed
	$(VENV)/python recipes/sft_lora.py configs/tiny.yaml --training.output_dir runs/tiny-lora
	$(VENV)/python recipes/evaluate_adapter.py runs/tiny-lora --shots 4
	$(VENV)/python recipes/merge_adapter.py runs/tiny-lora
	$(VENV)/python recipes/evaluate_adapter.py runs/tiny-lora --model runs/tiny-lora/merged

test: .venv/installed-dev
	$(VENV)/python -m pytest -n 2

slow: .venv/installed-dev
	$(VENV)/python -m pytest -m slow

real: .venv/installed-dev
	OMP_NUM_THREADS=2 $(VENV)/python -m pytest -m real tests/test_real_base.py

# Hours: each kind of fault at STATES file operations, MIXES random ones from SEED on, each fuzzer for five minutes.
SEED ?= 0
STATES ?= 20000
MIXES ?= 200
faults: .venv/installed-dev
	$(VENV)/python tests/faults/injector.py --states $(STATES) --seed $(SEED) --mixes $(MIXES)
	PYTHONPATH=. $(VENV)/python tests/faults/fuzz.py --minutes 5 --seed $(SEED)

lint: .venv/installed-dev
	$(VENV)/python -m ruff check .
	$(VENV)/python -m ruff format --check .
	$(VENV)/python -m mypy

bench: .venv/installed-dev
	$(VENV)/python benchmarks/prepare_data.py --runs 2 --json benchmarks/results/prepare_data.json
	$(VENV)/python benchmarks/merge.py --rounds 2
	$(VENV)/python benchmarks/monitor.py
	$(VENV)/python benchmarks/train_tiny.py --json benchmarks/results/train_tiny.json
	$(VENV)/python benchmarks/startup.py --rounds 2 --json benchmarks/results/startup.json

clean:
	rm -rf .venv runs

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(VENV)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo study check test lint clean

# The main job on the embedded default: small models, 2,400 pairs, a laptop's CPU.
# Beside it, the same number of steps from scratch.
TRAIN = $(BIN)/python train.py --src demo/source --tgt demo/target \
	--data demo/pairs/train.tar --val demo/pairs/val.tar \
	--batch-size 32 --micro-batch 32 --clip 0.5 --augment none --workers 0

# On the CPU, also where there is a GPU: its figures are the README's, and what is so small would wait for
# kernels to compile.
demo study: export CUDA_VISIBLE_DEVICES =

demo: .venv/run
	rm -rf out/demo out/demo-from-scratch
	$(TRAIN) --init auto --warm-up-steps 60 --steps 240 --lr 1e-3 --out out/demo
	$(TRAIN) --from-scratch --steps 300 --lr 2e-3 --out out/demo-from-scratch
	$(BIN)/python -m demo.report out/demo out/demo-from-scratch

# The paper in miniature, docs/miniature.md: hours, resumable. Tables and pictures of what comes out lie in
# out/study/.
study: .venv/run
	$(BIN)/python -m study.make all
	$(BIN)/python -m study.runs
	$(BIN)/python -m study.report --results out/study/results --out out/study

# One thread a process, and processes side by side: OpenMP's threads spin while they wait.
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

# What trains nothing and starts no process, and the linter: an answer within a minute.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not slow"

lint: .venv/dev
	$(BIN)/ruff check .

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt -c requirements-dev.txt matplotlib
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv out

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo chat study check test lint clean

# The main job on the embedded default: small models, 2,400 pairs, a laptop's CPU.
# Beside it, the same number of steps from scratch.
PAIRS = --data demo/pairs/train.tar --val demo/pairs/val.tar \
	--batch-size 32 --micro-batch 32 --clip 0.5 --augment none --workers 0
TRAIN = $(BIN)/python train.py --src demo/source --tgt demo/target $(PAIRS)

# On the CPU, also where there is a GPU: its figures are the README's, and what is so small would wait for
# kernels to compile.
demo chat study: export CUDA_VISIBLE_DEVICES =

demo: .venv/run
	rm -rf out/demo out/demo-from-scratch
	$(TRAIN) --init auto --warm-up-steps 60 --steps 240 --lr 1e-3 --out out/demo
	$(TRAIN) --from-scratch --steps 300 --lr 2e-3 --out out/demo-from-scratch
	$(BIN)/python -m demo.report out/demo out/demo-from-scratch

# A conversation about the demo's scenes with SmolLM2-135M-Instruct (docs/vicuna.md): the demo's VPG is moved
# to it, and learns to converse. Made once.
CHAT = out/smollm2-chat
chat: $(CHAT)/done
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/python chat.py $(CHAT) docs/scene.png; \
	else echo "now: $(BIN)/python chat.py $(CHAT) docs/scene.png (or --page)"; fi

$(CHAT)/done: | .venv/dev
	rm -rf out/smollm2 $(CHAT)
	$(BIN)/python demo/smollm2.py datasets/smollm2
	$(BIN)/python -m demo.conversations out/conversations
	$(BIN)/python train.py --src demo/source --tgt datasets/smollm2 $(PAIRS) --val-samples 60 --gate 0 \
		--init captions --warm-up-steps 60 --warm-up-lr 1e-3 --steps 120 --lr 1e-3 --val-every 60 \
		--out out/smollm2
	$(BIN)/python finetune.py --model out/smollm2 --instruct out/conversations/train \
		--val out/conversations/val --val-samples 60 --batch-size 16 --micro-batch 16 --steps 180 \
		--lr 2e-3 --clip 0.5 --workers 0 --val-every 60 --out $(CHAT)
	touch $@

# The paper in miniature, docs/miniature.md: hours, resumable. Tables and pictures of what comes out lie in
# out/study/.
study: .venv/run
	$(BIN)/python -m study.make all
	$(BIN)/python -m study.runs
	$(BIN)/python -m study.report --results out/study/results --out out/study

# One thread a process, and processes side by side: OpenMP's threads spin while they wait.
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

# What trains nothing, starts no process and takes no seconds, and the linter: an answer within a minute.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow"

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

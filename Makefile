# make demo    train, evaluate and generate on the built-in shapes, CPU, about ten minutes -> runs/demo/report.html
# make test    the test suite
# Both set themselves up in .venv; all they need is make and python3 (3.11 or newer) with venv.

PYTHON ?= python3
PY = .venv/bin/python
RUN ?= runs/demo
SHAPES = shapes:objects=1,size=0.6-0.9

.PHONY: demo test
demo: .venv/ready
	$(PY) train.py --out $(RUN) --data $(SHAPES) --perceptual none
	$(PY) eval.py zeroshot $(RUN) --limit 1000
	$(PY) eval.py probe $(RUN) --train-limit 5000 --limit 1000
	$(PY) eval.py recon $(RUN) --limit 1000 --perceptual none
	$(PY) dit.py latents $(RUN) --n 12000 --fresh
	$(PY) dit.py train $(RUN)/latents --out $(RUN)/dit --size nano --steps 3000 --batch 64 --lr 1e-3 --warmup 50 --precision bf16
	$(PY) dit.py sample $(RUN)/dit --per-class 20 --points 50 --cfg 3 --cfg-channels all
	$(PY) eval.py fid $(RUN)/dit/samples --run $(RUN) --features classifier --few --limit 1000 --train-limit 5000 --judge-steps 600
	$(PY) eval.py report $(RUN)

test: .venv/ready
	$(PY) -m pytest -q tests

.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'python 3.11 or newer is needed, this is ' + sys.version)"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

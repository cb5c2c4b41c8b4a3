# make demo    train, evaluate and generate on the built-in shapes, on a CPU -> runs/demo/report.html
# make test    ruff check, then the test suite
# Both install what they need into .venv. They ask for make and for python3 (3.11 or newer) with venv.
#
# The demo is a chain of stages. A finished stage leaves a file done-STAGE in the run folder and is
# skipped the next time; an interrupted training goes on from its last checkpoint.
# To start over, delete the run folder.

PYTHON ?= python3
PY = .venv/bin/python
RUN ?= runs/demo
SHAPES = shapes:objects=1,size=0.75-0.9

.PHONY: demo test
.NOTPARALLEL:

# $(call begin,STAGE): print the time and how long the stage is expected to take on this machine
begin = @date "+%T  $(1)"; grep "^$(1):" $(RUN)/expected.txt

demo: $(RUN)/done-report
	@echo "The demo is complete: open $(RUN)/report.html"

$(RUN)/expected.txt: | .venv/ready
	@mkdir -p $(RUN)
	@$(PY) study/expected.py > $@.part
	@mv $@.part $@
	@cat $@

$(RUN)/done-tokenizer: | $(RUN)/expected.txt
	$(call begin,tokenizer)
	$(PY) train.py --out $(RUN) --data $(SHAPES) --perceptual none --save-every 100
	@touch $@

$(RUN)/done-zeroshot: $(RUN)/done-tokenizer
	$(call begin,zeroshot)
	$(PY) eval.py zeroshot $(RUN) --limit 1000
	@touch $@

$(RUN)/done-probe: $(RUN)/done-zeroshot
	$(call begin,probe)
	$(PY) eval.py probe $(RUN) --train-limit 5000 --limit 1000
	@touch $@

$(RUN)/done-recon: $(RUN)/done-probe
	$(call begin,recon)
	$(PY) eval.py recon $(RUN) --limit 1000 --perceptual none
	@touch $@

$(RUN)/done-latents: $(RUN)/done-recon
	$(call begin,latents)
	$(PY) dit.py latents $(RUN) --n 6000 --fresh
	@touch $@

$(RUN)/done-dit: $(RUN)/done-latents
	$(call begin,dit)
	$(PY) dit.py train $(RUN)/latents --out $(RUN)/dit --size pico --steps 750 --batch 64 \
	    --lr 8e-3 --warmup 50 --save-every 100
	@touch $@

$(RUN)/done-samples: $(RUN)/done-dit
	$(call begin,samples)
	$(PY) dit.py sample $(RUN)/dit --per-class 20 --points 50 --cfg 5 --set cfg_channels=all \
	    --fresh
	@touch $@

$(RUN)/done-fid: $(RUN)/done-samples
	$(call begin,fid)
	$(PY) eval.py fid $(RUN)/dit/samples --run $(RUN) --features classifier --few \
	    --limit 1000 --train-limit 3000 --set judge_steps=200
	@touch $@

$(RUN)/done-report: $(RUN)/done-fid
	$(call begin,report)
	$(PY) eval.py report $(RUN)
	@date "+%T  done"
	@touch $@

test: .venv/ready
	$(PY) -m ruff check
	$(PY) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder tests    # one process per core

.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'python 3.11 or newer is needed, this is ' + sys.version)"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

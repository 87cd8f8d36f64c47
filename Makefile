# `make demo` and `make test` need nothing but Python 3.11 or later: each makes its own environment when there is none.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint bench bench-gpu test-cuda12 clean

$(VENV)/.ready: requirements.txt requirements-common.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.ready-dev: requirements-dev.txt $(VENV)/.ready
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

$(VENV)-cuda12/.ready: requirements-cuda12.txt requirements-common.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)-cuda12
	$(VENV)-cuda12/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-cuda12.txt -r requirements-dev.txt
	touch $@

SMALL := --arch resnet18 --crop-size 64 --batch-size 32 --moco-k 256 --moco-m 0.999 --log-every 24

LUNGS := --images demo/phantoms/images --masks demo/phantoms/masks --val-fraction 0.02 --test-fraction 0.1
FEW := --num-train 4 --epochs 5 --min-steps-per-epoch 4 --runs 5 --arch resnet18 --size 64

demo/phantoms/test_list.txt: $(VENV)/.ready
	rm -rf demo/phantoms
	$(RUN) -m pipeline.phantom demo/phantoms --num-images 2000 --size-px 128

demo: demo/phantoms/test_list.txt  ## Phantoms, shards, both stages of pre-training, exports, fine-tuning; made for a laptop's CPU.
	$(RUN) shard_cxr14.py pack demo/phantoms/images --out demo/shards --size 128 \
	    --labels demo/phantoms/Data_Entry_2017.csv --boxes demo/phantoms/BBox_List_2017.csv \
	    --train-val-list demo/phantoms/train_val_list.txt --test-list demo/phantoms/test_list.txt
	$(RUN) train.py demo/shards --mode dir --run-dir demo/dir --epochs 7 $(SMALL)
	$(RUN) train.py demo/shards --mode dira --run-dir demo/dira --epochs 2 $(SMALL) --init-from demo/dir/checkpoints/last.pt
	$(RUN) finetune.py segment $(LUNGS) $(FEW) --weights random --run-dir demo/lungs-random
	$(RUN) finetune.py segment $(LUNGS) $(FEW) --weights demo/dira/export/unet.pth --run-dir demo/lungs-dira
	@echo
	@echo "Look at demo/dir/curves.png and the last of demo/dira/reconstructions/*.png (rows: input, output, target)."
	@echo "Weights to fine-tune: demo/dira/export/unet.pth (smp.Unet), resnet18.pth (torchvision), resnet18.safetensors (timm)."

test: $(VENV)/.ready-dev  ## All tests.
	$(RUN) -m pytest -q

lint: $(VENV)/.ready-dev  ## Style and likely mistakes.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

BENCHMARKS := bench_shard bench_loader bench_stages bench_train
STEP_BENCHMARKS := bench_step bench_scaling precision_band

bench: $(VENV)/.ready-dev  ## All benchmarks; reports in benchmarks/results. Options: make bench OPTIONS="--images DIR".
	for name in $(BENCHMARKS); do $(RUN) -m benchmarks.$$name $(OPTIONS) || exit 1; done
	for name in $(STEP_BENCHMARKS); do $(RUN) -m benchmarks.$$name || exit 1; done
	$(RUN) -m benchmarks.report

bench-gpu: $(VENV)/.ready-dev  ## On a machine with GPUs: the tests that need one, and what is to be measured there.
	$(RUN) -m pytest -q -rs tests/test_gpu.py tests/test_optim.py tests/test_graph.py
	$(RUN) -m benchmarks.bench_loader --device cuda $(OPTIONS)
	$(RUN) -m benchmarks.bench_step --device cuda
	$(RUN) -m benchmarks.bench_train --device cuda --num-images 2048 $(OPTIONS)
	$(RUN) -m benchmarks.bench_train --device cuda --num-images 2048 --modes dira --batch-size 16 --cuda-graphs $(OPTIONS)
	$(RUN) -m benchmarks.bench_scaling --device cuda
	$(RUN) -m benchmarks.precision_band --device cuda
	$(RUN) -m benchmarks.report

test-cuda12: $(VENV)-cuda12/.ready  ## All tests on the stack for V100 and older drivers.
	$(VENV)-cuda12/bin/python -m pytest -q

clean:
	rm -rf demo

# make demo: SLIP and CLIP on handwritten digits, scored zero-shot. make demo-all: every evaluation.
# make test: the tests. make lint: the linter. make constraints: the versions they passed with.
SHELL = bash
PYTHON ?= python3
BIN = .venv/bin
RUNS = runs/digits
FOLDERS = $(RUNS)/SLIP $(RUNS)/CLIP
TRAIN = $(BIN)/python main.py --dataset coco --root data/digits \
  --metadata data/digits/annotations/captions_train2017.json --val-dataset digits \
  --epochs 84 --batch-size 64 --lr 1e-3 --ssl-mlp-dim 512 --ssl-emb-dim 128 --workers 0 \
  --eval-freq 4 --print-freq 100
# Digits have a left and a right, and are small: other crops, and steps, than photographs.
CROPS = --no-flip --crop-min 0.5
TUNE = --preset small --epochs 40 --warmup-epochs 2 --batch-size 64 --lr 1e-3 --aa none \
  --reprob 0 --mixup 0 --cutmix 0 $(CROPS)

.PHONY: demo demo-all test lint constraints clean
.DELETE_ON_ERROR:
.PRECIOUS: $(RUNS)/%/checkpoint.done $(RUNS)/%/results.json

# Both runs at once, each on one thread: so the numbers do not depend on how many cores there are.
demo: LAST = results.json
demo-all: LAST = finetune.json
demo demo-all: export OMP_NUM_THREADS = 1
demo demo-all:
	@$(MAKE) --no-print-directory -j2 $(FOLDERS:%=%/$(LAST))
	$(BIN)/python report.py $(FOLDERS) --output $(RUNS)/report.html --picture $(RUNS)/report.png

# A run that was interrupted resumes. Its lines begin with its name; exec lets signals reach it.
$(RUNS)/%/checkpoint.done: data/digits
	exec $(TRAIN) --model $*_VITTINY8 --output-dir $(RUNS)/$* > >(sed -u 's/^/$*: /') 2>&1
	touch $@

$(RUNS)/%/results.json: $(RUNS)/%/checkpoint.done
	$(BIN)/python eval_zeroshot.py --resume $(RUNS)/$*/checkpoint.pt --datasets digits \
	  --output-dir $(RUNS)/$* --workers 0

$(RUNS)/%/finetune.json: $(RUNS)/%/results.json
	for classifier in knn logistic linear; do $(BIN)/python main_linear.py --dataset digits \
	  --pretrained $(RUNS)/$*/checkpoint.pt --classifier $$classifier --output-dir $(RUNS)/$* \
	  --workers 0 --epochs 30 --lr 1 --print-freq 100 $(CROPS) || exit; done
	$(BIN)/python main_finetune.py --dataset digits --pretrained $(RUNS)/$*/checkpoint.pt \
	  --output-dir $(RUNS)/$* --workers 0 --print-freq 100 $(TUNE)

data/digits: | .venv/run
	$(BIN)/python make_dataset.py digits --root data/digits

test: .venv/dev
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# For pip's -c, by hand: make and continuous integration install the newest versions allowed. CUDA's
# packages are left out, and torch's suffix +cu130, say: they are of one build of torch.
constraints: test
	{ echo "# The versions that the tests last passed with: pip install -r requirements.txt -c $@.txt"; \
	  $(BIN)/python -m pip freeze --local | sed -E '/^(nvidia|cuda|triton)/d; s/\+[a-z0-9.]+$$//'; } \
	  > $@.part && mv $@.part $@.txt

# pip chooses torch and torchvision together, in one command: they must be of one release.
.venv/run: requirements.txt
	@echo "Installing PyTorch and the rest of $< into .venv:" \
	  "about 6 GB with PyTorch's CUDA build, some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r $<
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	@echo "Installing the tools for the tests and the linter into .venv: about 65 MB."
	$(BIN)/python -m pip install --quiet -r $<
	touch $@

clean:
	rm -rf .venv data/digits $(RUNS)

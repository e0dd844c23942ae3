# make demo: the whole job on handwritten digits. make test: the tests. make lint: the linter.
PYTHON ?= python3
BIN = .venv/bin
RUNS = runs/digits
TRAIN = $(BIN)/python main.py --dataset coco --root data/digits \
  --metadata data/digits/annotations/captions_train2017.json --val-dataset digits \
  --epochs 40 --batch-size 96 --lr 1e-3 --ssl-mlp-dim 512 --ssl-emb-dim 128 --workers 0
# Digits have a left and a right, and are small: other crops, and steps, than photographs.
CROPS = --no-flip --crop-min 0.5
TUNE = --preset small --epochs 40 --warmup-epochs 2 --batch-size 64 --lr 1e-3 --aa none \
  --reprob 0 --mixup 0 --cutmix 0 $(CROPS)

.PHONY: demo test lint clean
.DELETE_ON_ERROR:
.PRECIOUS: $(RUNS)/%/checkpoint.done

demo: $(RUNS)/SLIP/finetune.json $(RUNS)/CLIP/finetune.json
	$(BIN)/python report.py $(RUNS)/SLIP $(RUNS)/CLIP --output $(RUNS)/report.html \
	  --picture $(RUNS)/report.png

# A run that was interrupted goes on where it stopped.
$(RUNS)/%/checkpoint.done: data/digits
	$(TRAIN) --model $*_VITTINY8 --output-dir $(RUNS)/$*
	touch $@

$(RUNS)/%/finetune.json: $(RUNS)/%/checkpoint.done
	$(BIN)/python eval_zeroshot.py --resume $(RUNS)/$*/checkpoint.pt --datasets digits \
	  --output-dir $(RUNS)/$* --workers 0
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

# pip chooses torch and torchvision together, in one command: they must be of one release.
.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv data/digits $(RUNS)

# make demo: the whole job on handwritten digits. make test: the tests. make lint: the linter.
PYTHON ?= python3
BIN = .venv/bin
RUNS = runs/digits
TRAIN = $(BIN)/python main.py --dataset coco --root data/digits \
  --metadata data/digits/annotations/captions_train2017.json --val-dataset digits \
  --epochs 25 --batch-size 96 --lr 1e-3 --ssl-mlp-dim 512 --ssl-emb-dim 128 --workers 0

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(RUNS)/SLIP/results.json $(RUNS)/CLIP/results.json
	$(BIN)/python report.py $(RUNS)/SLIP $(RUNS)/CLIP --picture $(RUNS)/report.png

# A run that was interrupted goes on where it stopped.
$(RUNS)/%/results.json: data/digits
	$(TRAIN) --model $*_VITTINY8 --output-dir $(RUNS)/$*
	$(BIN)/python eval_zeroshot.py --resume $(RUNS)/$*/checkpoint.pt --datasets digits \
	  --output-dir $(RUNS)/$* --workers 0

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

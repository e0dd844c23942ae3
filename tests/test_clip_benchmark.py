"""CLIP_benchmark's zero-shot evaluation of an export gives our accuracies, to the last digit.

The weights are random, so that classes are confused in all ways; docs/export.md has trained ones.
"""

import json

import torch
from test_export import save_checkpoint
from test_layouts import random_weights

import eval_zeroshot
import export
import make_dataset
import utils
from catalog import LABELS, TEMPLATES


def run(script, text):
    script.main(script.get_args_parser().parse_args(text.split()))


def test_clip_benchmark_scores_the_demo_as_we_do(tmp_path, monkeypatch):
    from clip_benchmark.metrics import zeroshot_classification
    from clip_benchmark.models.open_clip import load_open_clip
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    root, folder = tmp_path / "digits", tmp_path / "run"
    run(make_dataset, f"digits --root {root}")
    catalog = tmp_path / "catalog.json"
    entry = {"path": "digits", "type": "imagefolder", "train": "train", "test": "test"}
    catalog.write_text(json.dumps({"digits": entry}))
    common = f"--catalog {catalog} --output-dir {folder} --workers 0 --device cpu"
    folder.mkdir()
    model = save_checkpoint(folder / "checkpoint.pt", "SLIP_VITTINY8")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(state | {"state_dict": random_weights(model.state_dict())}, folder / "checkpoint.pt")
    run(eval_zeroshot, f"--resume {folder}/checkpoint.pt --datasets digits {common}")
    ours = json.loads((folder / "results.json").read_text())["digits"]
    assert len(ours["per_class"]) == 10 and sum(x > 0 for x in ours["per_class"].values()) > 3

    output = tmp_path / "open_clip"
    run(export, f"--resume {folder}/checkpoint.pt --format open_clip --output {output}")
    model, transform, tokenizer = load_open_clip(f"local-dir:{output}", pretrained=None)
    # It makes a float of an array with one element, which NumPy no longer does.
    monkeypatch.setattr(zeroshot_classification, "float", lambda x: x.item(), raising=False)
    names, templates = (utils.read_json(path, path)["digits"] for path in (LABELS, TEMPLATES))
    theirs = zeroshot_classification.evaluate(
        model,
        DataLoader(ImageFolder(root / "test", transform), 256),
        tokenizer,
        names,
        [template.replace("{}", "{c}") for template in templates],
        "cpu",
        amp=False,
    )
    assert 100 * theirs["acc1"] == ours["acc1"] and 100 * theirs["acc5"] == ours["acc5"]

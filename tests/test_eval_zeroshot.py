"""Zero-shot scoring: metrics against scikit-learn, the classifier, the command, its errors."""

import hashlib
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import train, write_folders
from launch import run_script

import eval_zeroshot
import utils
from catalog import CATALOG, LABELS, TEMPLATES, load_catalog, split_name
from evaluation import Evaluation
from infra import devices
from models import create_model
from pretrained import load_model
from transforms import CenterCrop
from utils import InputError

FP32 = devices.Precision("fp32", torch.device("cpu"))
OURS = ("digits", "imagenet80")
PUBLISHED = """food101 cifar10 cifar100 cub200 sun397 cars aircraft dtd pets caltech101 flowers
mnist fer2013 stl10 eurosat resisc45 gtsrb kitti_distance country211 patch_camelyon ucf101_frames
kinetics700_frames clevr_counts hateful_memes rendered_sst2 imagenet""".split()
SHIFTED = ("imagenetv2", "imagenet_sketch", "imagenet_r", "imagenet_a")  # ImageNet's classes


@pytest.fixture(scope="module")
def tables():
    return [utils.read_json(path, path) for path in (CATALOG, LABELS, TEMPLATES)]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The folder of a run, its checkpoint barely trained."""
    return train(tiny, tmp_path_factory.mktemp("trained"), model="CLIP_NANO8")


def test_the_26_sets_of_the_paper_and_the_demos(tables):
    catalog, labels, templates = tables
    assert set(catalog) == {*PUBLISHED, "digits", *SHIFTED}
    assert set(labels) == {*PUBLISHED, "digits", "birdsnap", "voc2007"}
    assert set(templates) == {*labels, "imagenet80"}
    assert len(set(templates["imagenet80"])) == 80
    assert set(templates["imagenet"]) < set(templates["imagenet80"])
    shared = {name: entry["labels"] for name, entry in catalog.items() if entry.get("labels")}
    assert shared == dict.fromkeys(SHIFTED, "imagenet")
    splits = {name: split_name(catalog, name, is_train=False) for name in catalog}
    val = "cub200 eurosat kitti_distance patch_camelyon ucf101_frames clevr_counts imagenet".split()
    assert {name for name, split in splits.items() if split == "val"} == set(val)
    assert splits["kinetics700_frames"] == "val_images" and splits["hateful_memes"] == "dev"
    filelists = {name for name, entry in catalog.items() if entry["type"] == "filelist"}
    assert filelists == {"sun397", "clevr_counts"}


def test_labels_and_templates_are_pinned(tables):
    """Their contents were compared entry by entry with the archived ones; this keeps them."""
    digests = [
        hashlib.sha256(json.dumps({k: t[k] for k in sorted(t) if k not in OURS}).encode())
        for t in tables[1:]
    ]
    assert [d.hexdigest()[:16] for d in digests] == ["ee699b87c7851c38", "b9ceb68b373fff35"]


@pytest.mark.parametrize("batch_size", [3, 256, None])
def test_classifier_equals_one_class_at_a_time(batch_size):
    model = create_model("CLIP_NANO8").eval()
    classes, templates = ["dog", ["cat", "kitten"], "x"], ["a {}.", "photo of the {}"]
    got = eval_zeroshot.build_classifier(model, classes, templates, Evaluation(FP32), batch_size)
    for row, names in zip(got, (["dog"], ["cat", "kitten"], ["x"]), strict=True):
        texts = [template.format(name) for name in names for template in templates]
        with torch.no_grad():
            embeds = F.normalize(model.encode_text(model.tokenizer(texts)), dim=-1)
        assert torch.allclose(row, F.normalize(embeds.mean(0), dim=-1), atol=1e-5)


def test_prompts_of_like_length_share_a_batch(monkeypatch):
    """Each batch is cut to its own longest prompt, and all ranks ask to stop as often."""
    model, checks, shapes = create_model("CLIP_NANO8").eval(), [], []
    encode = model.encode_text

    def watched(text):
        shapes.append(tuple(text.shape))
        return encode(text)

    monkeypatch.setattr(model, "encode_text", watched)
    classes = ["dog", "dog " * 90, "cat", "a dog of " * 6, "owl"]
    evaluation = Evaluation(FP32, poll=lambda: checks.append(len(shapes)))
    eval_zeroshot.build_classifier(model, classes, ["{}"], evaluation, 2)
    assert shapes == [(2, 77), (2, 3), (1, 3)] and checks == [0, 1, 2]


def evaluate_flags(tiny, trained, out, *extra):
    flags = ["--resume", trained / "checkpoint.pt", "--catalog", tiny / "catalog.json"]
    return [*flags, "--output-dir", out, "--workers", 0, "--device", "cpu", *extra]


def test_the_command_writes_results(tiny, trained, tmp_path):
    run = run_script("eval_zeroshot.py", evaluate_flags(tiny, trained, tmp_path))
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "results.json").read_text())["digits"]
    assert result["metric"] == "top1" and result["split"] == "test"
    assert (result["images"], result["classes"], result["prompts"]) == (30, 10, 3)
    assert f"{result['accuracy']:6.2f}" in run.stdout

    two = run_script("eval_zeroshot.py", evaluate_flags(tiny, trained, tmp_path / "two"), ranks=2)
    assert two.returncode == 0, two.stderr
    assert json.loads((tmp_path / "two/results.json").read_text())["digits"] == result
    assert two.stdout.count("digits") == 1


def test_scores_equal_a_plain_loop(tiny, trained):

    model, _ = load_model(trained / "checkpoint.pt")
    catalog = load_catalog(tiny / "catalog.json")
    labels, templates = (utils.read_json(p, p) for p in (LABELS, TEMPLATES))
    task = eval_zeroshot.open_task("digits", CenterCrop(32), catalog, labels, templates)
    ranking = eval_zeroshot.rank_images(model, task, Evaluation(FP32, 7, 0))
    result = eval_zeroshot.summarize_task(task, ranking)
    hits = 0
    with torch.no_grad():
        texts = eval_zeroshot.build_classifier(
            model, task.classes, task.templates, Evaluation(FP32)
        )
        for image, label in task.dataset:
            embed = model.encode_image(model.normalize(image[None]))
            hits += (embed @ texts.T).argmax().item() == label
    assert result["accuracy"] == pytest.approx(100 * hits / 30)


def test_several_checkpoints_and_other_prompts(tiny, trained, tmp_path, capsys):
    import shutil

    call(tiny, trained, tmp_path / "one", "--prompts", "imagenet80")
    (tmp_path / "b").mkdir()
    for name in ("x.pt", "y.pt"):
        shutil.copy(trained / "checkpoint.pt", tmp_path / "b" / name)
    both = [tmp_path / "b/x.pt", tmp_path / "b/y.pt"]
    call(tiny, trained, tmp_path / "two", "--prompts", "imagenet80", "--resume", *both)
    one = json.loads((tmp_path / "one/results.json").read_text())["digits"]
    assert one.pop("checkpoint") == str(trained / "checkpoint.pt")
    assert (one["model"], one["prompt_set"], one["prompts"]) == (
        "CLIP_NANO8", "imagenet80", 80,
    )  # fmt: skip
    for name, path in zip(("b-x", "b-y"), both, strict=True):
        got = json.loads((tmp_path / "two" / name / "results.json").read_text())["digits"]
        assert got == one | {"checkpoint": str(path)}
    assert f"{tmp_path}/b/y.pt:" in capsys.readouterr().out
    with pytest.raises(InputError, match="--prompts 'x' is none of food101"):
        call(tiny, trained, tmp_path, "--prompts", "x")
    with pytest.raises(InputError, match="checkpoints of equal folder and name"):
        call(tiny, trained, tmp_path, "--resume", *both, tmp_path / "b/x.pt")


def call(tiny, trained, out, *extra):
    flags = map(str, evaluate_flags(tiny, trained, out, *extra))
    eval_zeroshot.main(eval_zeroshot.get_args_parser().parse_args(list(flags)))


def test_bad_input(tiny, trained, tmp_path):
    with pytest.raises(InputError, match="^unknown dataset 'nope'; choose from digits"):
        call(tiny, trained, tmp_path, "--datasets", "nope")
    with pytest.raises(InputError, match="checkpoint.pt' is absent; check the path"):
        call(tiny, tmp_path, tmp_path)
    with pytest.raises(InputError, match="catalog .* No such file"):
        call(tiny, trained, tmp_path, "--catalog", tmp_path / "none.json")
    (tmp_path / "labels.json").write_text('{"digits": ["one", "two"]}')
    with pytest.raises(InputError, match="has 10 classes, but labels.json has 2"):
        call(tiny, trained, tmp_path, "--labels", tmp_path / "labels.json")
    for text, match in (
        ('{"digits": "zero to nine"}', "'digits' must be lists of texts"),
        ('{"digits": 5}', "'digits' must be lists of texts"),
        ('{"digits": [[]]}', "labels of 'digits': .* is neither a text nor a list of texts"),
        ("[1]", "labels .* is no JSON object"),
    ):
        (tmp_path / "labels.json").write_text(text)
        with pytest.raises(InputError, match=match):
            call(tiny, trained, tmp_path, "--labels", tmp_path / "labels.json")
    for text, match in (
        ('{"digits": ["a digit"]}', "each must be a text with {}"),
        ('{"digits": []}', "templates of 'digits': there is none; give one with {} for the class"),
    ):
        (tmp_path / "templates.json").write_text(text)
        with pytest.raises(InputError, match=match):
            call(tiny, trained, tmp_path, "--templates", tmp_path / "templates.json")
    (tmp_path / "catalog.json").write_text('{"digits": {"type": "imagefolder", "path": 5}}')
    with pytest.raises(InputError, match="'digits': path is no text: 5"):
        call(tiny, trained, tmp_path, "--catalog", tmp_path / "catalog.json")
    (tmp_path / "catalog.json").write_text('{"digits": {"type": "imagefolder", "path": "none"}}')
    with pytest.raises(InputError, match="no set of the catalog is present"):
        call(tiny, trained, tmp_path, "--catalog", tmp_path / "catalog.json")
    with pytest.raises(InputError, match=r"digits: folder .*none is absent"):
        flags = ("--catalog", tmp_path / "catalog.json", "--datasets", "digits")
        call(tiny, trained, tmp_path, *flags)
    assert not (tmp_path / "results.json").exists()


def test_a_method_without_text_cannot_be_prompted(tiny, trained, tmp_path):
    train(tiny, tmp_path, model="SIMCLR_NANO8")
    with pytest.raises(InputError, match="SIMCLR_NANO8: it has no text .* of CLIP or SLIP"):
        call(tiny, tmp_path, tmp_path)
    both = trained / "checkpoint.pt", tmp_path / "checkpoint.pt"
    with pytest.raises(InputError, match="SIMCLR_NANO8: it has no text"):
        call(tiny, trained, tmp_path / "out", "--resume", *both)
    assert not (tmp_path / "out").exists()  # the first has not been scored either


def test_results_are_added_to_those_of_other_sets(tiny, trained, tmp_path):
    call(tiny, trained, tmp_path, "--datasets", "digits")
    first = [json.loads((tmp_path / f"{n}.json").read_text()) for n in ("results", "examples")]
    assert first[0]["digits"]["prompt_set"] == "digits"
    tables = {}
    for what, path in (("labels", LABELS), ("templates", TEMPLATES)):
        tables[what] = tmp_path / f"{what}.json"
        tables[what].write_text(json.dumps({"other": utils.read_json(path, what)["digits"]}))
    entry = {"path": str(tiny / "digits"), "type": "imagefolder"}
    (tmp_path / "catalog.json").write_text(json.dumps({"other": entry}))
    tables["catalog"] = tmp_path / "catalog.json"
    call(tiny, trained, tmp_path, *(x for k, v in tables.items() for x in (f"--{k}", v)))
    for name, old in zip(("results", "examples"), first, strict=True):
        table = json.loads((tmp_path / f"{name}.json").read_text())
        assert set(table) == {"digits", "other"} and table["digits"] == old["digits"]


def test_weights_that_are_not_finite_score_nothing(tiny, trained, tmp_path):
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    state["state_dict"]["visual.norm.bias"][0] = float("nan")
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(InputError, match="outputs are not finite: its checkpoint's weights"):
        call(tiny, trained, tmp_path, "--resume", tmp_path / "c.pt")


def test_absent_sets_are_reported(tiny, trained, tmp_path, capsys):
    write_folders(tmp_path / "digits" / "test", each=1)
    entry = {"type": "imagefolder", "path": "digits"}
    catalog = {"digits": entry, "mnist": {"type": "special", "path": "nowhere"}}
    (tmp_path / "catalog.json").write_text(json.dumps(catalog))
    call(tiny, trained, tmp_path, "--catalog", tmp_path / "catalog.json")
    assert "absent, not scored: mnist" in capsys.readouterr().out

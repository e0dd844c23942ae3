"""Recall against a brute-force count, both kinds of caption files, the command and its errors."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import PeakMemory, save_image, train_flags
from launch import run_script

import eval_retrieval
import main
from utils import InputError


def embeddings(n=40, per_image=3, width=6):
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(n).repeat_interleave(per_image)
    images = torch.randn(n, width, generator=generator)
    texts = images[owners] + torch.randn(n * per_image, width, generator=generator)
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1), owners


def test_recall_is_a_brute_force_count(monkeypatch):
    monkeypatch.setattr(eval_retrieval, "CHUNK", 7)
    images, texts, owners = embeddings()
    got = eval_retrieval.retrieval_scores(images, texts, owners)
    scores = images @ texts.T
    for k in (1, 5, 10):
        hits = [
            bool((owners[row.argsort(descending=True)[:k]] == i).any())
            for i, row in enumerate(scores)
        ]
        assert got[f"image_to_text_recall{k}"] == pytest.approx(100 * sum(hits) / len(hits))
        hits = [
            int(owners[j]) in row.argsort(descending=True)[:k] for j, row in enumerate(scores.T)
        ]
        assert got[f"text_to_image_recall{k}"] == pytest.approx(100 * sum(hits) / len(hits))
    places = [  # by a full sort
        1 + int((row.argsort(descending=True) == owners[j]).nonzero())
        for j, row in enumerate(scores.T)
    ]
    assert got["text_to_image_mean_rank"] == pytest.approx(np.mean(places))
    assert got["text_to_image_median_rank"] == np.median(places)
    assert 1 < got["image_to_text_median_rank"] < got["image_to_text_mean_rank"] < 60
    assert 0 < got["text_to_image_recall1"] < got["text_to_image_recall10"] < 100


def test_images_stay_below_the_root(tmp_path):
    save_image(tmp_path / "out.png", 0)
    (tmp_path / "root").mkdir()
    for path in ("../out.png", str(tmp_path / "out.png")):
        with pytest.raises(InputError, match="image '.*out.png' leaves its folder '.*root'"):
            eval_retrieval.Images(tmp_path / "root", [path], 32)
        assert len(eval_retrieval.Images(tmp_path / "root", [path], 32, allow_outside=True)) == 1


def test_collapsed_embeddings_are_no_better_than_chance():
    images, texts, owners = embeddings(n=40)
    got = eval_retrieval.retrieval_scores(torch.ones_like(images), torch.ones_like(texts), owners)
    # Everything is equal and stays in its order: 3 captions an image.
    expected = {1: 1, 5: 2, 10: 4}
    for k in (1, 5, 10):
        assert got[f"image_to_text_recall{k}"] == pytest.approx(100 * expected[k] / 40)
        assert got[f"text_to_image_recall{k}"] == pytest.approx(100 * k / 40)


def test_memory_is_linear(monkeypatch):
    monkeypatch.setattr(eval_retrieval, "CHUNK", 256)

    def peak(n):
        data = embeddings(n, 1)
        with PeakMemory() as memory:
            eval_retrieval.retrieval_scores(*data)
        return memory.peak

    assert peak(2048) < 5 * peak(512)  # all scores at once: 16 times


@pytest.fixture(scope="module")
def retrieval(tiny, tmp_path_factory):
    """A trained checkpoint, pictures and their captions in both kinds of file."""
    root = tmp_path_factory.mktemp("retrieval")
    main.main(
        main.get_args_parser().parse_args(
            train_flags(tiny, root / "run", model="CLIP_NANO8", val="none")
        )
    )
    karpathy, images, annotations = [], [], []
    for i in range(9):
        save_image(root / f"val/{i}.jpg", i)
        texts = [f"picture {i} number {t}" for t in range(6 if i else 2)]
        row = {"filepath": "val", "filename": f"{i}.jpg", "split": "test" if i < 8 else "val"}
        karpathy.append({**row, "sentences": [{"raw": t} for t in texts]})
        images.append({"id": 100 + i, "file_name": f"{i}.jpg"})
        annotations += [{"image_id": 100 + i, "caption": t} for t in texts]
    (root / "karpathy.json").write_text(json.dumps({"images": karpathy}))
    coco = {"images": images, "annotations": annotations}
    (root / "coco.json").write_text(json.dumps(coco))
    return root


def flags(retrieval, out, captions="karpathy.json", root="", *extra):
    flags = ["--resume", retrieval / "run/checkpoint.pt", "--captions", retrieval / captions]
    flags += ["--root", retrieval / root, "--output-dir", out, "--workers", 0, "--device", "cpu"]
    return [*map(str, flags), *map(str, extra)]


def call(*args):
    eval_retrieval.main(eval_retrieval.get_args_parser().parse_args(flags(*args)))


def test_the_command_on_one_and_two_ranks(retrieval, tmp_path, capsys):
    call(retrieval, tmp_path / "one")
    assert (
        "karpathy: 8 images, 37 captions; recall at 1, 5, 10, mean and median rank"
        in capsys.readouterr().out
    )
    one = json.loads((tmp_path / "one/retrieval.json").read_text())
    assert (one["karpathy"]["images"], one["karpathy"]["captions"]) == (8, 2 + 7 * 5)
    two = run_script("eval_retrieval.py", flags(retrieval, tmp_path / "two"), ranks=2)
    assert two.returncode == 0, two.stderr
    assert json.loads((tmp_path / "two/retrieval.json").read_text()) == one
    call(retrieval, tmp_path / "one", "coco.json", "val")
    both = json.loads((tmp_path / "one/retrieval.json").read_text())
    assert both["coco"]["images"] == 9 and both["karpathy"] == one["karpathy"]


def test_a_caption_set_of_any_kind(retrieval, tmp_path):
    """The same pairs as a table and as its Arrow file; a blank caption is none."""
    lines = [f"val/{i}.jpg,picture {i}" for i in range(9)]
    (tmp_path / "t.csv").write_text("\n".join(["filepath,title", *lines]) + "\n")
    call(retrieval, tmp_path, tmp_path / "t.csv", "", "--dataset", "csv", "--name", "table")
    (arrow,) = tmp_path.glob("*.arrow")
    call(retrieval, tmp_path, arrow, "", "--name", "arrow")
    scores = json.loads((tmp_path / "retrieval.json").read_text())
    assert scores["table"] == scores["arrow"]
    assert (scores["table"]["images"], scores["table"]["captions"]) == (9, 9)
    assert scores["table"]["image_to_text_median_rank"] >= 1
    assert eval_retrieval.first_texts(["", "a", " ", "b", "c"], 2) == ["a", "b"]


def test_a_coco_file_without_a_list_of_images(tmp_path):
    table = {"annotations": [{"image_id": 7, "caption": "a"}, {"image_id": 7, "caption": "b"}]}
    (tmp_path / "c.json").write_text(json.dumps(table))
    found = eval_retrieval.read_captions(tmp_path / "c.json", "test", 5)
    assert found == ([("000000000007.jpg", ["a", "b"])], {})


def test_bad_rows_are_counted_and_not_the_end(tmp_path):
    good = {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "a"}, "b", {"raw": 7}]}
    rows = [good, None, {"split": "test"}, {**good, "filename": None, "sentences": [{"raw": "c"}]}]
    rows += [{"filename": "b.jpg", "split": "test", "sentences": None, "filepath": None}]
    (tmp_path / "k.json").write_text(json.dumps({"images": rows}))
    found, left_out = eval_retrieval.read_captions(tmp_path / "k.json", "test", 5)
    assert found == [("a.jpg", ["a", "b"])]
    assert left_out == {
        f"rows malformed, the first in {tmp_path}/k.json, row 1: 'NoneType' object has no "
        "attribute 'get'": 2,
        "rows without an image path": 1,
        "rows with a caption that is no text": 1,
        "images without any caption": 1,
    }

    captions = [{"image_id": 7, "caption": "a"}, {"image_id": None, "caption": "b"}, 3]
    captions += [{"image_id": "x", "caption": "c"}]
    (tmp_path / "c.json").write_text(json.dumps({"annotations": captions}))
    found, left_out = eval_retrieval.read_captions(tmp_path / "c.json", "test", 5)
    assert found == [("000000000007.jpg", ["a"])]
    assert list(left_out.values()) == [1, 1, 1] and "rows without an image path" in left_out
    assert "rows of an image that has no file name and no number" in left_out


@pytest.mark.parametrize("tower", ["image", "text"])
def test_weights_that_are_not_finite_score_nothing(tower, retrieval, tmp_path):
    state = torch.load(retrieval / "run/checkpoint.pt", weights_only=True)
    state["state_dict"][f"{tower}_projection"].fill_(float("nan"))
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(InputError, match="outputs are not finite: its checkpoint's weights"):
        call(retrieval, tmp_path, "karpathy.json", "", "--resume", tmp_path / "c.pt")
    assert not (tmp_path / "retrieval.json").exists()


def test_bad_input(retrieval, tmp_path):
    with pytest.raises(InputError, match="split 'dev' is absent; choose from test, val"):
        call(retrieval, tmp_path, "karpathy.json", "", "--split", "dev")
    with pytest.raises(
        InputError, match=r"9 of 9 captioned images are absent below --root .*0.jpg"
    ):
        call(retrieval, tmp_path, "coco.json", "nowhere")
    (retrieval / "odd.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="odd.json is neither Karpathy's nor COCO's"):
        call(retrieval, tmp_path, "odd.json")
    (retrieval / "odd.json").write_text('{"images": [], "annotations": [{"image_id": 3}]}')
    with pytest.raises(InputError, match="a caption names image 3, which is not listed"):
        call(retrieval, tmp_path, "odd.json")
    (retrieval / "odd.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(InputError, match="has no image with captions"):
        call(retrieval, tmp_path, "odd.json")
    assert not (tmp_path / "retrieval.json").exists()

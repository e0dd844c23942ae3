"""The digits: a caption set and held-out folders that share no image."""

import make_dataset
import utils
from captions import load_captions
from datasets import LABELS


def test_digits(tmp_path, capsys):
    root = tmp_path / "digits"
    make = make_dataset.get_args_parser().parse_args(["digits", "--root", str(root)])
    make_dataset.main(make)
    assert "1348 images with 6740 captions, 449 held out" in capsys.readouterr().out

    captions = load_captions("coco", root / "annotations/captions_train2017.json")
    assert len(captions) == 1348 and len(captions[0][1]) == 5
    names = utils.read_json(LABELS, "labels")["digits"]
    folders = sorted(path.name for path in (root / "test").iterdir())
    assert folders == [f"{i}_{name}" for i, name in enumerate(names)]
    test = {int(path.stem) for path in (root / "test").glob("*/*.png")}
    train = {int(path.stem) for path in (root / "train2017").glob("*.jpg")}
    assert len(test) == 449 and len(train) == 1348 and not test & train
    named = {path.stem: path.parent.name[2:] for path in (root / "train").glob("*/*.png")}
    for i in range(0, 1348, 50):  # every caption of an image names the digit of its folder
        image, texts = captions[i]
        assert all(named[image[-8:-4]] in text for text in texts)

    make_dataset.main(make)
    assert "is there already" in capsys.readouterr().out

"""The names of class folders against labels.json, in every script that scores a labelled set."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data
from helpers import save_image, train_flags
from test_eval_zeroshot import evaluate_flags
from test_main_linear import flags as probe_flags

import classes
import eval_zeroshot
import main
import main_finetune
import main_linear
import make_dataset
import utils
from catalog import (
    LABELS,
    TEMPLATES,
    classes_of,
    get_downstream_dataset,
    load_catalog,
    unchanged,
)
from classes import check_order
from torchvision_sets import ALIASES
from transforms import CenterCrop
from utils import InputError

NAMES = utils.read_json(LABELS, "labels")


def compare(folders, labels, name="mine"):
    numbers = {folder: i for i, folder in enumerate(folders)}
    return check_order(name, SimpleNamespace(class_to_idx=numbers), labels)


def test_names_that_agree():
    labels = ["polar bear", ["cat", "kitten"], "dog", "\u72ac"]
    for folders in (
        ["polar_bear", "Cat", "DOG", "\u72ac"],
        ["000.Polar-Bear", "1_kitten", "2 dog", "n01440764-\u72ac"],
    ):
        assert compare(folders, labels) == (folders, [])
    assert compare(["crane", "a", "Crane"], ["crane", "b", "crane"]) == (["crane", "Crane"], ["a"])


@pytest.mark.parametrize(
    "folders",
    [
        ["00000", "00001", "00002"],
        ["n01440764", "n01443537", "n01484850"],
        ["train", "...", "x"],
    ],
)
def test_names_that_tell_nothing(folders, capsys):
    assert compare(folders, ["tench", "!", "\u72ac"]) == ([], folders)


def test_torchvisions_names_are_known():
    """Folders may have the names of torchvision's classes, country211 those of its codes."""
    codes = sorted(ALIASES["country211"])
    assert compare(codes, NAMES["country211"], "country211") == (codes, [])
    faces = ["BACKGROUND_Google", "Faces", "Faces_easy", "Leopards"]
    assert compare(faces, NAMES["caltech101"], "caltech101") == (faces[1:], faces[:1])
    with pytest.raises(InputError, match="'Leopards' is class 0, 'background', by its place, but"):
        compare(faces[::-1], NAMES["caltech101"], "caltech101")


def test_the_name_of_another_class_is_an_error():
    match = "mine: folder '2_cat' is class 1, 'dog', by its place, but class 0, .*, by its name; re"
    with pytest.raises(InputError, match=match):
        compare(["x", "2_cat"], [["kitten", "cat"], "dog"])


def write_set(root, folders, split="test"):
    for i, folder in enumerate(folders):
        for k in range(2):
            save_image(root / "set" / split / folder / f"{k}.png", 10 * i + k)
    entry = {"path": "set", "type": "imagefolder"}
    (root / "catalog.json").write_text(json.dumps({"digits": entry}))
    return root / "catalog.json"


def open_test(catalog, labels, **options):
    sets = load_catalog(catalog, **options)
    return get_downstream_dataset(sets, next(iter(sets)), False, unchanged, labels)


def test_names_that_confirm_some_classes_are_noted_once(tmp_path, capsys):
    catalog = write_set(tmp_path, ["a", "b", "dog", "e"])
    for _ in range(2):
        open_test(catalog, ["x", "y", "dog", "z"])
    assert capsys.readouterr().out == (
        "note: digits: 1 of 4 class folders have the name of their class in labels.json; taken by "
        "their place: 'a', 'b', 'e'\n"
    )
    open_test(catalog, ["x", "y", "z", "dog"], ignore_names=True)
    open_test(catalog, ["x", "y", "z", "w"])
    assert capsys.readouterr().out == ""


def test_folders_of_a_filelist(tmp_path):
    """Its numbers, too, may contradict the folders of its images."""
    root = tmp_path / "mine"
    root.mkdir()
    entry = {"path": "mine", "type": "filelist", "test": "val"}
    (tmp_path / "catalog.json").write_text(json.dumps({"mine": entry}))
    images = ["c/cat/0.png", "c/cat/1.png", "d/dog/0.png", "mixed/0.png", "mixed/1.png", "0.png"]
    np.save(root / "val_images.npy", np.array(images))
    np.save(root / "val_labels.npy", np.array([0, 0, 1, 0, 1, 0]))
    found = open_test(tmp_path / "catalog.json", ["cat", "dog"])
    assert found.class_to_idx == {"cat": 0, "dog": 1, "": 0}
    np.save(root / "val_labels.npy", np.array([1, 1, 0, 0, 1, 0]))
    with pytest.raises(InputError, match="mine: folder 'cat' is class 1, 'dog', by its place"):
        open_test(tmp_path / "catalog.json", ["cat", "dog"])


def run_zeroshot(tiny, probed, catalog, out, *extra):
    given = [*evaluate_flags(tiny, probed / "run", out), "--catalog", catalog, *extra]
    eval_zeroshot.main(eval_zeroshot.get_args_parser().parse_args(list(map(str, given))))


def run_main(tiny, probed, catalog, out, *extra):
    given = [*train_flags(tiny, out), "--catalog", catalog, "--evaluate", *extra]
    given += ["--resume", probed / "run/checkpoint.pt"]
    main.main(main.get_args_parser().parse_args(list(map(str, given))))


def run_probe(tiny, probed, catalog, out, *extra):
    given = probe_flags(probed, out, "--catalog", catalog, "--classifier", "knn", "--k", 1, *extra)
    main_linear.main(main_linear.get_args_parser().parse_args(given))


def run_finetune(tiny, probed, catalog, out, *extra):
    given = probe_flags(probed, out, "--catalog", catalog, "--warmup-epochs", 0, *extra)
    main_finetune.main(main_finetune.get_args_parser().parse_args(given))


@pytest.mark.parametrize("run", [run_zeroshot, run_main, run_probe, run_finetune])
def test_every_script_stops_at_folders_in_another_order(run, tiny, probed, tmp_path):
    """Folders of digits by name: eight is first in the order of the alphabet."""
    for split in ("train", "test"):
        catalog = write_set(tmp_path, NAMES["digits"], split)
    match = "digits: folder 'eight' is class 0, 'zero', by its place, but class 8, 'eight', by its"
    with pytest.raises(InputError, match=match):
        run(tiny, probed, catalog, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(tiny, probed, catalog, tmp_path / "out", "--ignore-folder-names")


def test_check_takes_the_flag_and_sees_the_training_split(tmp_path, capsys):
    write_set(tmp_path, [f"{i}_{name}" for i, name in enumerate(NAMES["digits"])])
    flags = ["check", "--catalog", str(write_set(tmp_path, NAMES["digits"], "train"))]
    with pytest.raises(InputError, match="cannot be used as they are: digits"):
        make_dataset.main(make_dataset.get_args_parser().parse_args(flags))
    assert "folder 'eight' is class 0" in capsys.readouterr().out
    flags.append("--ignore-folder-names")
    make_dataset.main(make_dataset.get_args_parser().parse_args(flags))
    assert "10 classes, folder names ignored" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Classes of another set


def test_imagenets_classes_by_wordnets_id():
    """Every class has its id; the 200 of ImageNet-R and -A are those that timm lists."""
    labels = utils.read_json(LABELS, "labels")["imagenet"]
    ids = classes.wordnet_ids()
    assert list(ids.values()) == list(range(1000)) and list(ids) == sorted(ids)
    assert [labels[ids[n]] for n in ("n01440764", "n02123045", "n15075141")] == [
        "tench",
        "tabby cat",
        "toilet paper",
    ]
    assert classes.shared_classes("sketch", "imagenet", list(ids), labels) == labels
    info = Path(timm.data.__file__).parent / "_info"
    for kind in ("a", "r"):
        folders = (info / f"imagenet_{kind}_synsets.txt").read_text().split()
        places = (info / f"imagenet_{kind}_indices.txt").read_text().split()
        got = classes.shared_classes("subset", "imagenet", sorted(folders), labels)
        assert got == [labels[int(place)] for place in places] and len(got) == 200


def shifted(root, folders, **options):
    """A catalog of one set with ImageNet's classes, one image in each folder."""
    for i, folder in enumerate(folders):
        save_image(root / "mine/test" / folder / "0.png", i, (4, 4))
    entry = {"path": "mine", "type": "imagefolder", "labels": "imagenet", **options}
    (root / "catalog.json").write_text(json.dumps({"mine": entry}))
    return load_catalog(root / "catalog.json")


def open_shifted(catalog):
    tables = [utils.read_json(path, path) for path in (LABELS, TEMPLATES)]
    return eval_zeroshot.open_task("mine", CenterCrop(4), catalog, *tables)


def test_a_subset_is_scored_among_its_classes(tmp_path):
    task = open_shifted(shifted(tmp_path, ["n02123045", "n01440764", "n01443537_goldfish"]))
    assert task.classes == ["tench", "goldfish", "tabby cat"] and task.source == "imagenet"
    assert [label for _, label in task.dataset] == [0, 1, 2]
    assert len(task.templates) == 7


def test_numbered_folders_have_the_order_of_their_numbers(tmp_path):
    """As ImageNetV2's: 10 comes after 9, which torchvision's ImageFolder gets wrong."""
    table = {"imagenet": [f"class {c}" for c in "abcdefghijkl"]}
    catalog = shifted(tmp_path, map(str, range(12)))
    got = classes_of(catalog, "mine", False, table)
    dataset = get_downstream_dataset(catalog, "mine", False, str, got)
    assert got == table["imagenet"]
    assert [(path.split("/")[-2], label) for path, label in dataset.samples] == [
        (str(i), i) for i in range(12)
    ]


@pytest.mark.parametrize(
    "folders, labels, match",
    [
        (["1", "2", "3"], "abc", "3 folders are numbers, but not imagenet's classes 0 to 2, each"),
        (["0", "1"], "abc", "mine: its 2 folders are numbers, but not imagenet's classes 0 to 2"),
        (["a", "d"], "abc", "mine: folder 'd' is no class of imagenet; name the folders as its"),
        (["n99999999"], "abc", "mine: folder 'n99999999' is no class of imagenet"),
        (["a", "b"], "bca", "folders 'a' and 'b' are not in the order of imagenet's classes 2 and"),
        (["a"], "aab", "mine: folder 'a' is no class"),  # two classes of that name
    ],
)
def test_folders_of_a_wrong_order_or_of_no_class(tmp_path, folders, labels, match):
    catalog = shifted(tmp_path, folders)
    with pytest.raises(InputError, match=match) as error:
        classes_of(catalog, "mine", False, {"imagenet": list(labels)})
    assert "\n" not in str(error.value)


def test_check_knows_sets_of_anothers_classes(tmp_path, capsys):
    shifted(tmp_path, ["n01440764", "n02123045"])
    flags = ["check", "--catalog", str(tmp_path / "catalog.json")]
    make_dataset.main(make_dataset.get_args_parser().parse_args(flags))
    assert "test 2 images, no training split, some decoded; 2 classes" in capsys.readouterr().out
    shifted(tmp_path, [], labels="imagenot")
    with pytest.raises(InputError, match="cannot be used as they are: mine"):
        make_dataset.main(make_dataset.get_args_parser().parse_args(flags))
    assert "mine                 UNUSABLE  labels.json has no classes" in capsys.readouterr().out

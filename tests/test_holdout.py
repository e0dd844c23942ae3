"""make_dataset.py split: by the seed, no image in both parts, nothing lost, resumed."""

import json

import pytest
from helpers import rows as logged
from helpers import train, write_shards

import make_dataset
from infra import arrow
from infra.arrow import Captions
from utils import InputError


def rows(path):
    pairs = Captions(path)
    return [pairs[i] for i in range(len(pairs))]


def split(root, *flags):
    outputs = ["--output", root / "train.arrow", "--held-out", root / "val.arrow"]
    flags = ["split", "--metadata", root / "t.csv", "--number", 7, *outputs, *flags]
    make_dataset.main(make_dataset.get_args_parser().parse_args([str(flag) for flag in flags]))
    return rows(root / "train.arrow"), rows(root / "val.arrow")


@pytest.fixture
def table(tmp_path):
    """40 rows; each image has two, far apart; two captions occur twice each."""
    lines = [f"{i % 20}.jpg,{'a' if i in (3, 17) else 'caption'} {i % 19 % 17}" for i in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["filepath,title", *lines]) + "\n")
    return tmp_path


def test_the_parts_make_up_the_set(table, capsys):
    train, val = split(table)
    said = capsys.readouterr().out
    whole = Captions(next(table.glob("t.csv.*.arrow")))
    whole = [whole[i] for i in range(len(whole))]
    held = [path for path, _ in val]
    assert len(set(held)) == 7 and not set(held) & {path for path, _ in train}
    assert train == [row for row in whole if row[0] not in held]  # in their order
    assert held == [path for path in dict.fromkeys(p for p, _ in whole) if path in held]
    merged = {path: [t for p, texts in whole if p == path for t in texts] for path in held}
    assert dict(val) == merged and all(len(texts) == 2 for texts in merged.values())

    mine = {text for texts in merged.values() for text in texts}
    repeated = mine & {text for _, texts in train for text in texts}
    assert len(repeated) > 0
    assert f"val.arrow: 7 images, 14 captions, seed 0\n{table}/train.arrow: 26 pairs kept" in said
    assert "14 rows dropped; 14 held out\n" in said
    assert f"\n{len(repeated)} of the captions held out are also captions of other ima" in said


def test_the_seed_decides(table):
    first, again, other = split(table), split(table), split(table, "--seed", 1)
    assert first == again and first[1] != other[1]


def test_an_interrupted_split_resumes(table, monkeypatch):
    whole = split(table)
    monkeypatch.setattr(arrow, "BATCH", 8)
    write, written = arrow.write_arrow, []

    def write_three(path, batches, facts):
        if path.parent.name.startswith("train"):
            written.append(path)
            if len(written) == 4:
                raise KeyboardInterrupt
        write(path, batches, facts)

    monkeypatch.setattr(arrow, "write_arrow", write_three)
    with pytest.raises(KeyboardInterrupt):
        split(table)
    assert (table / "train.arrow.part").is_dir()
    assert split(table) == whole
    assert [path.name for path in written[4:]] == [f"{i:06d}.arrow" for i in (3, 4)] + [
        "merged.arrow"
    ]


def test_too_many(table):
    (table / "t.csv").write_text("filepath,title\na.jpg,x\na.jpg,y\n")
    with pytest.raises(InputError, match="has 1 images, too few to hold out 7"):
        split(table)
    assert not (table / "val.arrow").exists()


@pytest.mark.parametrize("flag", ["--metadata", "--held-out"])
def test_no_file_is_overwritten_by_the_other_part(table, flag):
    train, _ = split(table)
    with pytest.raises(InputError, match="--metadata and --output and --held-out must differ"):
        split(table, flag, table / "train.arrow", "--output", table / "x" / ".." / "train.arrow")
    assert rows(table / "train.arrow") == train


def test_outputs_are_named_arrow(table):
    with pytest.raises(InputError, match="--held-out val: name it .arrow"):
        split(table, "--held-out", "val")


def test_the_kind_of_a_set_is_any_source(table):
    captions = [{"image_id": i, "caption": f"c {i}"} for i in range(9)]
    (table / "c.json").write_text(json.dumps({"annotations": captions}))
    train, val = split(table, "--dataset", "coco", "--metadata", table / "c.json")
    assert len(train) == 2 and len(val) == 7


def test_pairs_of_shards_train_and_validate(table, capsys):
    """The training part keeps its shards; pairs held out are read from theirs."""
    pattern, folder = write_shards(table / "tars", [10, 10, 3]), str(table / "tars")
    train_part, _ = split(table, "--dataset", "webdataset", "--metadata", pattern)
    lengths = Captions(table / "train.arrow").lengths
    places = [int(path[:5]) for path, _ in train_part]
    assert lengths == [places.count(shard) for shard in range(3)] and sum(lengths) == 16
    flags = ["--dataset", "webdataset", "--metadata", table / "train.arrow", "--root", folder]
    flags += ["--val-metadata", table / "val.arrow", "--shuffle-window", 1]
    train(table, table / "run", *flags, model="CLIP_NANO8", val="none")
    (row,) = logged(table / "run")
    assert (row["val_images"], row["val_bad_images"], row["pairs"]) == (7, 0, 16)
    flags = ["--val-source", "webdataset", "--val-metadata", pattern, "--val-root", folder]
    train(table, table / "run", *flags, "--evaluate", model="CLIP_NANO8", val="none")
    assert "held-out pairs: loss" in capsys.readouterr().out.splitlines()[-3]

"""The verdict on a caption set: numbers, damage, a decoded sample; hostile indices."""

import json
import os

import pyarrow as pa
import pytest
from helpers import encoded, write_shards, write_tar

import checks
import make_dataset
from captions import load_captions
from infra import arrow
from utils import InputError


def check(root, *flags):
    (root / "none.json").write_text("{}")
    flags = ["check", "--catalog", root / "none.json", "--dataset", "webdataset", *flags]
    make_dataset.main(make_dataset.get_args_parser().parse_args(list(map(str, flags))))


def test_shards_and_their_faults_before_a_run(tmp_path, capsys):
    pattern = write_shards(tmp_path, [254, 6])
    check(tmp_path, "--metadata", pattern)
    out = capsys.readouterr().out
    sizes = [os.path.getsize(tmp_path / f"0000{i}.tar") / 1e6 for i in (1, 0)]
    assert out.startswith("webdataset           usable    260 images with captions in 2 shards")
    assert "6 to 254 pairs and {:.1f} to {:.1f} MB; 256 decoded, ".format(*sizes) in out
    assert out.endswith("images/s; 260 pairs kept, 0 rows dropped\n")

    members = [("a.jpg", encoded(0)), ("a.txt", b"a"), ("a.png", encoded(0)), ("b.jpg", b"no")]
    write_tar(tmp_path / "00002.tar", [*members, ("b.txt", b"b"), ("c.txt", b"c"), ("d.jpg", b"")])
    cut = tmp_path / "00001.tar"
    os.truncate(cut, cut.read_bytes().index(b"257.jpg") + 600)  # within the image
    check(tmp_path, "--metadata", f"{tmp_path}/{{00000..00002}}.tar")
    out, fault, remedy = capsys.readouterr().out.splitlines()[-3:]
    assert out.startswith(
        "webdataset           DAMAGED   259 images with captions in 3 shards of 2"
    )
    assert fault.strip() == f"{cut}: it ends in the middle"
    assert "behind the damage of 1 of 3 shards are lost: fetch these shards again" in remedy
    # Members and shards are no rows.
    assert "259 pairs kept, 2 rows dropped; 1 without" in out
    assert "; 1 members of a name that their shard has already" in out
    assert f"; 1 shards not readable to their end, the first {cut}: it ends" in out
    for reason in ("1 without an image", "1 without a caption"):
        assert reason in out
    assert ("decoded" in out and " of them unreadable" in out) or "b.jpg" not in out


@pytest.mark.parametrize("bad, is_usable", [(1, True), (2, False)])
def test_a_sample_of_the_images_is_decoded(tmp_path, capsys, bad, is_usable):
    members = [(f"{i}.jpg", b"no image" if i < bad else encoded(i)) for i in range(120)]
    texts = [(f"{i}.txt", b"a caption") for i in range(120)]
    write_tar(tmp_path / "0.tar", [*members, *texts])
    if is_usable:
        check(tmp_path, "--metadata", tmp_path / "0.tar")
        assert "1 of them unreadable (image " in capsys.readouterr().out
        return
    with pytest.raises(InputError, match="cannot be used as they are: webdataset; see above"):
        check(tmp_path, "--metadata", tmp_path / "0.tar")
    assert "UNUSABLE  2 of 120 images cannot be read; image " in capsys.readouterr().out


@pytest.mark.parametrize(
    "facts",
    [
        "{",
        "[1]",
        json.dumps({"lengths": [7], "counts": [1], "damaged": 5}),
        json.dumps({"lengths": "ab", "counts": {"kept": "x"}}),
        json.dumps({"lengths": [-1, 2, 0.0], "damaged": {"x": 3}}),
    ],
)
def test_facts_by_a_strangers_hand(tmp_path, facts):
    pairs = load_captions("webdataset", write_shards(tmp_path, [1]))
    table = pa.ipc.open_file(pairs.path).read_all()
    schema = arrow.SCHEMA.with_metadata({"facts": facts})
    with pa.ipc.new_file(tmp_path / "m.arrow", schema) as writer:
        writer.write_table(table)
    strange = load_captions("webdataset", tmp_path / "m.arrow")
    assert strange.lengths == [1]
    assert "1 images with captions" in checks.describe_pairs(strange, str(tmp_path))[0]

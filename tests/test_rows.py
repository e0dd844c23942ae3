"""One rule for the captions of every reader, and files with a few rows of another form."""

import gzip
import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import captions
from captions import load_captions
from eval_retrieval import read_captions
from infra import arrow, rows
from utils import InputError

LONG = "a long story " * 20_000  # over 128 KiB
GOOD = {"1.jpg": ["a dog"], "2.jpg": ["a cat"], "9.jpg": [LONG]}
NAN = float("nan")
# A caption and the reason to drop its row.
BAD = [
    (None, "without a caption"),
    (NAN, "without a caption"),
    ("", "without a caption"),
    (" \n", "without a caption"),
    (7, "with a caption that is no text"),
    ({"raw": "a dog", "id": 3}, "with a caption that is no text"),
    ("\ud800", "with a caption that is not UTF-8"),
]
BAD_LISTS = [
    ([], "without a caption"),
    ([None, NAN, ""], "without a caption"),
    (["a", 7], "with a caption that is no text"),
    (["a", ["b"]], "with a caption that is no text"),
    ([{"raw": "a"}], "with a caption that is no text"),
]


def counts_of(name, path, columns=("filepath", "title")):
    """({image: captions}, {reason: rows dropped}) of a conversion."""
    output = path.with_suffix(".arrow")
    counts = arrow.write_captions(output, captions.SOURCES[name](path, columns))
    pairs = arrow.Captions(output)
    found = dict(pairs[i] for i in range(len(pairs)))
    return found, {reason: n for reason, n in counts.items() if n and reason != arrow.KEPT}


def among(good, bad):
    """Rows with a bad one at the start, in the middle and at the end."""
    first, *others = good
    return [bad, first, bad, *others, bad]


def write_npy(path, values):
    np.save(path, np.array(values, dtype=object), allow_pickle=True)


def write_json(path, value):
    path.write_text(json.dumps(value))  # NaN as Python writes it


WRITERS = {  # (path, [(image, caption)]): metadata that hold any value
    "cc3m": lambda path, pairs: write_npy(
        path, [{"image_id": image, "captions": value} for image, value in pairs]
    ),
    "cc12m": lambda path, pairs: write_npy(
        path, [{"image_name": image, "image_id": NAN, "captions": value} for image, value in pairs]
    ),
    "redcaps": lambda path, pairs: write_json(
        path,
        [{"subreddit": "x", "image_id": i[:-4], "caption": v, "score": NAN} for i, v in pairs],
    ),
    "coco": lambda path, pairs: write_json(
        path, {"annotations": [{"image_id": i[:-4], "caption": v, "x": -NAN} for i, v in pairs]}
    ),
}
IMAGES = {"redcaps": "x/{}.jpg", "coco": "train2017/{:>012}.jpg"}


# A row of JSON has one caption, and ijson itself replaces half of a surrogate pair.
CASES = [(n, *case) for n in ("cc3m", "cc12m") for case in (*BAD, *BAD_LISTS)]
CASES += [(n, *case) for n in IMAGES for case in BAD if case[0] != "\ud800"]


@pytest.mark.parametrize("name, value, reason", CASES)
def test_rows_without_a_caption_are_counted_and_left_out(tmp_path, name, value, reason):
    good = [(image, texts[0]) for image, texts in GOOD.items()]
    path = tmp_path / f"m.{'npy' if name.startswith('cc') else 'json'}"
    WRITERS[name](path, among(good, ("3.jpg", value)))
    found, dropped = counts_of(name, path)
    names = {image: IMAGES.get(name, "{}.jpg").format(image[:-4]) for image in GOOD}
    assert found == {names[image]: texts for image, texts in GOOD.items()}
    assert dropped == {reason: 3}


@pytest.mark.parametrize("value", [None, NAN, "", {"a": 1}, True, ["x.jpg"]])
def test_rows_without_an_image_path_are_left_out(tmp_path, value):
    WRITERS["cc3m"](tmp_path / "m.npy", among([("1.jpg", "a"), (2, "b")], (value, "c")))
    found, dropped = counts_of("cc3m", tmp_path / "m.npy")
    assert found == {"1.jpg": ["a"], "2": ["b"]}  # and none is called None or nan
    assert list(dropped.values()) == [3] and "an image path" in next(iter(dropped))


def test_nulls_of_a_list_are_counted(tmp_path):
    WRITERS["cc3m"](tmp_path / "m.npy", [("1.jpg", ["a", None, "b", NAN]), ("2.jpg", ["c"])])
    assert counts_of("cc3m", tmp_path / "m.npy") == (
        {"1.jpg": ["a", "b"], "2.jpg": ["c"]},
        {arrow.NULLS: 2},
    )
    source = captions.open_cc3m(tmp_path / "m.npy", None)
    counts = arrow.write_captions(tmp_path / "x.arrow", source)
    assert arrow.describe(counts) == (
        "2 pairs kept, 0 rows dropped; 2 nulls among the captions of others"
    )


@pytest.mark.parametrize(
    "column, kept, reason",
    [
        (["a", None, "b"], [["a"], ["b"]], "without a caption"),
        ([["a", "x"], [], ["b"]], [["a", "x"], ["b"]], "without a caption"),
        ([[None], ["a"], ["b"]], [["a"], ["b"]], "without a caption"),
    ],
)
def test_parquet_columns_of_texts_and_lists(tmp_path, column, kept, reason):
    table = pa.table({"filepath": [f"{i}.jpg" for i in range(3)], "title": column})
    pa.parquet.write_table(table, tmp_path / "m.parquet")
    found, dropped = counts_of("csv", tmp_path / "m.parquet")
    assert list(found.values()) == kept and dropped == {reason: 1}


@pytest.mark.parametrize("column", [[{"raw": "a", "id": 1}], [3], [b"a"], [[[["a"]]]]])
def test_a_struct_is_no_caption(tmp_path, column):
    """It must not train on the names of its fields."""
    table = pa.table({"filepath": ["1.jpg"], "title": column})
    pa.parquet.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(InputError, match="1 rows dropped; 1 with a caption that is no text"):
        load_captions("csv", tmp_path / "m.parquet")


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_a_row_with_more_or_fewer_fields_than_the_header(tmp_path, separator):
    """An unquoted comma would cut the caption, or move the path into another column."""
    lines = ["id,title,filepath", '1,"a, b",1.jpg', "2,a, b,2.jpg", "3,c", "4,d,4.jpg"]
    lines += ['5,"e" f,x', '6,"g', 'h",6.jpg', ""]
    lines = [line.replace(",", separator) for line in lines]
    (tmp_path / "m.csv").write_text(
        "\n".join([*lines, f'6{separator}"g', f'h"{separator}6.jpg', ""])
    )
    assert counts_of("csv", tmp_path / "m.csv") == (
        {"1.jpg": [f"a{separator} b"], "4.jpg": ["d"], "6.jpg": ["g\nh"]},
        {
            "with more fields than the header": 1,
            "with fewer fields than the header": 1,
            "with quotes out of place": 1,
        },
    )


def test_flickr30ks_own_table(tmp_path):
    """Bars with spaces, and the row that lacks one."""
    text = """image_name| comment_number| comment
1.jpg| 0| A man " in blue "
2.jpg| 4   A dog runs across the grass .

3.jpg| 1| A child
"""
    (tmp_path / "m.csv").write_text(text)
    assert counts_of("csv", tmp_path / "m.csv", ("image_name", "comment")) == (
        {"1.jpg": [' A man " in blue "'], "3.jpg": [" A child"]},
        {"with fewer fields than the header": 1},
    )


def test_a_long_caption_and_bytes_that_are_no_text(tmp_path):
    content = f"filepath,title,x\n1.jpg,{LONG},\n2.jpg,caf\u00e9,\n".encode()
    (tmp_path / "m.csv").write_bytes(content + b"3.jpg,caf\xe9,\n4.jpg,a,\xff\n\n")
    assert counts_of("csv", tmp_path / "m.csv") == (
        {"1.jpg": [LONG], "2.jpg": ["caf\u00e9"], "4.jpg": ["a"]},
        {"with a caption that is not UTF-8": 1},
    )


def test_what_was_left_out_is_said_at_the_first_conversion(tmp_path, capsys):
    (tmp_path / "m.csv").write_text("filepath,title\n1.jpg,a\n2.jpg,\n")
    load_captions("csv", tmp_path / "m.csv")
    assert "1 pairs kept, 1 rows dropped; 1 without a caption" in capsys.readouterr().out
    load_captions("csv", tmp_path / "m.csv")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("column", [0, 1, 2])
def test_an_arrow_file_with_nulls_is_refused(tmp_path, column):
    texts = [None] if column == 1 else [[None] if column == 2 else ["a"]]
    batch = pa.record_batch([[None if column == 0 else "1.jpg"], texts], arrow.SCHEMA)
    if column == 1:
        batch = pa.record_batch([["1.jpg"], texts], arrow.SCHEMA)
    with pa.ipc.new_file(tmp_path / "m.arrow", arrow.SCHEMA) as writer:
        writer.write_batch(batch)
    with pytest.raises(InputError, match="m.arrow has nulls among its texts"):
        load_captions("csv", tmp_path / "m.arrow")


# --- COCO ---------------------------------------------------------------------------------------


def coco(ids, **images):
    rows = [{"image_id": i, "caption": text} for i, text in ids]
    return {"annotations": rows} | images


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_coco_with_ids_of_any_kind(tmp_path, mark, pack):
    table = coco(
        [("a-1", "x"), (7, "y"), ("7", "z"), (8.0, "u"), ("b-2", "lost"), (None, "v")],
        images=[{"id": "a-1", "file_name": "one.png"}, {"id": 8}, {"id": None, "file_name": "x"}],
        info={"score": NAN, "text": 'NaN "Infinity\\', "low": -float("inf")},
    )
    path = tmp_path / ("c.json.gz" if pack is gzip.compress else "c.json")
    path.write_bytes(pack(mark + json.dumps(table).encode()))
    found, dropped = counts_of("coco", path)
    assert found == {
        "train2017/one.png": ["x"],
        "train2017/000000000007.jpg": ["y", "z"],
        "train2017/000000000008.jpg": ["u"],
    }
    assert dropped == {
        "of an image that has no file name and no number": 1,
        "without an image path": 1,
    }


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none()
        | st.integers(-9, 9)
        | st.text()
        | st.sampled_from([NAN, float("-inf"), 0.5, "NaN"]),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=12,
    ),
    st.integers(1, 9),
    st.booleans(),
)
def test_nan_reads_as_null_and_texts_stay(value, size, escape):
    text = json.dumps(value, ensure_ascii=escape)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return
    file, parts = rows.NanAsNull(io.BytesIO(data)), []
    while part := file.read(size):
        parts.append(part)
    expected = json.loads(text, parse_constant=lambda name: None)
    assert json.loads(b"".join(parts)) == expected


def test_nan_does_not_repeat_rows(tmp_path):
    """The rows before it were read already."""
    (tmp_path / "m.json").write_text(
        "[" + ", ".join(f'{{"n": {i if i != 30_000 else "NaN"}}}' for i in range(40_000)) + "]"
    )
    numbers = [row["n"] for row in rows.Files([tmp_path / "m.json"]).json_rows("item")]
    assert numbers == [*range(30_000), None, *range(30_001, 40_000)]


# --- retrieval ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value, reason", [*BAD, (["a", "b"], "malformed")])
def test_retrieval_scores_no_caption_that_is_no_text(tmp_path, value, reason):
    texts = ["a", value, "b", "c", "d", "e", "f"]
    table = {"images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}]}
    table |= coco([*((1, text) for text in texts), (2, value)])
    write_json(tmp_path / "coco.json", table)
    images = [
        {"filename": name, "split": "test", "sentences": [{"raw": text} for text in own]}
        for name, own in (("1.jpg", texts), ("2.jpg", [value]))
    ]
    write_json(tmp_path / "karpathy.json", {"images": images})
    for name in ("coco.json", "karpathy.json"):
        found, left_out = read_captions(tmp_path / name, "test", 5)
        assert found == [("1.jpg", list("abcde"))]
        assert left_out.pop("images without any caption") == 1
        assert left_out.total() == 2 and all(text.startswith(f"rows {reason}") for text in left_out)


def test_an_image_without_a_path_is_named_after_its_number(tmp_path):
    table = coco([(1, "a")], images=[{"id": 1, "file_name": None}])
    write_json(tmp_path / "coco.json", table)
    found, _ = read_captions(tmp_path / "coco.json", "test", 5)
    assert found == [("000000000001.jpg", ["a"])]


# --- rows that do not parse ---------------------------------------------------------------------


def test_malformed_rows_are_one_reason_and_name_the_first(tmp_path):
    good = [(i, f"a {i}", "") for i in range(50)]
    bad = [(1,), None, ("x", "a", "b"), (1, 2, 3, 4)]
    (tmp_path / "m.pkl").write_bytes(pickle.dumps([*good, *bad]))
    found, dropped = counts_of("yfcc15m", tmp_path / "m.pkl")
    assert len(found) == 50 and list(dropped.values()) == [4]
    (reason,) = dropped
    assert reason.startswith(f"malformed, the first in {tmp_path}/m.pkl, row 50: not enough values")


def test_blank_lines_are_no_rows(tmp_path):
    for text in ("1\tx\n2\tx\n\n", "\n1\n 2\n\n"):
        (tmp_path / "s.tsv").write_text(text)
        np.save(tmp_path / "i.npy", np.array([2, 1]))
        ids, places = captions.match_ids(tmp_path / "s.tsv", tmp_path / "i.npy")
        assert ids.tolist() == [1, 2] and places.tolist() == [1, 0]
    (tmp_path / "t.tsv").write_text("a\thttp://x/1\n\nb\thttp://x/2\n\n")
    source = captions.open_conceptual(tmp_path / "t.tsv", "{row}")
    pairs = list(arrow.read_pairs(source))
    assert pairs == [("0", ["a"], 0), ("1", ["b"], 0)]

"""Damaged files of every kind: each of 1,000 and more mutations is read, or refused in one line."""

import bz2
import gzip
import io
import itertools
import json
import pickle
import shutil
import signal
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

import captions
import make_dataset
from infra import arrow, checkpoint, weights
from infra.archives import read_file
from transforms import EncodedImage
from utils import InputError

TEXTS = ["a dog", "two cats on a mat", "", "snow \u2603 \u00e9t\u00e9"]
ROWS = [(i * 7, TEXTS[i % 4], TEXTS[(i + 1) % 4]) for i in range(12)]


def encoded(form):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((40, 30)).save(buffer, form)
    return buffer.getvalue()


def saved(write, value):
    buffer = io.BytesIO()
    write(buffer, value)
    return buffer.getvalue()


def table():
    return pa.table({"filepath": [f"{i}.jpg" for i, *_ in ROWS], "title": [t for _, t, _ in ROWS]})


def arrow_file(buffer, compression):
    columns = [[f"{i}.jpg" for i, *_ in ROWS], [[a, b] for _, a, b in ROWS]]
    batch = pa.record_batch(columns, arrow.SCHEMA)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(buffer, arrow.SCHEMA, options=options) as writer:
        for _ in range(3):
            writer.write_batch(batch)


def zip_of(buffer, method):
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for i in range(3):
            archive.writestr(f"{i:03d}.jpg", encoded("JPEG"))


def tar_of(buffer, _):
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for i, name in enumerate(("000000000.jpg", "000000000.txt", "000000001.jpg")):
            member = tarfile.TarInfo(name)
            member.size = 10 + i
            archive.addfile(member, io.BytesIO(bytes(10 + i)))


def script(buffer, value):
    with pytest.warns(FutureWarning):  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(value), buffer)


def old(buffer, value):
    torch.save(value, buffer, _use_new_zipfile_serialization=False)


def every(path):
    pairs = arrow.Captions(path)
    return [pairs[i] for i in range(len(pairs))]


def load(dataset):
    def read(path):
        pairs = captions.load_captions(dataset, path)
        return [pairs[i] for i in range(len(pairs))]

    return read


def make(flags):
    """A subcommand of make_dataset.py; FOLDER stands for the damaged file's."""

    def read(path):
        output = path.parent / "out.arrow"
        words = f"{flags} --output {output}".replace("FOLDER", str(path.parent)).split()
        make_dataset.main(make_dataset.get_args_parser().parse_args(words))
        return every(output)

    return read


def read_weights(path):
    return {key: tensor.sum() for key, tensor in weights.read(path).tensors.items()}


def read_zip(path):
    return [read_file(path.parent, f"{path.name}/{i:03d}.jpg") for i in range(3)]


def read_image(path):
    return EncodedImage(read_file(path.parent, path.name), path).crops([(0, 0, 30, 40)], 16)


ANNOTATIONS = [{"image_id": i, "caption": a, "subreddit": "x"} for i, a, _ in ROWS]
COCO = json.dumps(
    {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": ANNOTATIONS}
).encode()
DICTS = np.array([{"image_id": f"{i}.jpg", "captions": [a, b]} for i, a, b in ROWS], dtype=object)
PHOTOS = "".join(f"{i}\t{'x	' * 7}{a}+%3Cb%3E\t{b}\tz\n" for i, a, b in ROWS).encode()
LINKS = "".join(f"{a} {i}\thttp://a.b/{i}.jpg\n" for i, a, _ in ROWS).encode()
CSV = "".join(["filepath,title\n", *(f'{i}.jpg,"{a}, {b}"\n' for i, a, b in ROWS)]).encode()
SUBSET = "".join(f"{i}\tx\n" for i, *_ in ROWS).encode()
INDEX = saved(np.save, np.arange(0, 100, dtype=np.int64))
KEYS = {"key": ["000000000", "000000001"], "caption": ["a", "b"], "status": ["success", "failed"]}
SHARD = saved(lambda b, t: pa.parquet.write_table(t, b), pa.table(KEYS))
CHECKPOINT = saved(
    lambda b, v: torch.save(v, b),
    {"state_dict": {"a": torch.zeros(3)}, "args": {"model": "x"}, "epoch": 1},
)
BARE = {f"a{i}": torch.zeros(3) for i in range(3)}
YFCC = "yfcc15m --subset FOLDER/subset.tsv --index FOLDER/index.npy --photos FOLDER/photos.txt"

# name of the damaged file: (its sound bytes, its reader)
KINDS = {
    "m.pkl": (pickle.dumps(ROWS), load("yfcc15m")),
    "m2.pkl": (pickle.dumps(ROWS, protocol=2), load("yfcc15m")),
    "m.npy": (saved(lambda b, v: np.save(b, v, allow_pickle=True), DICTS), load("cc3m")),
    "coco.json": (COCO, load("coco")),
    "redcaps.json": (json.dumps(ANNOTATIONS).encode(), load("redcaps")),
    "m.csv": (CSV, load("csv")),
    "m.parquet": (saved(lambda b, t: pa.parquet.write_table(t, b), table()), load("csv")),
    "m.arrow": (saved(arrow_file, None), load("csv")),
    "lz4.arrow": (saved(arrow_file, "lz4"), load("csv")),
    "photos.txt": (PHOTOS, make(YFCC)),
    "photos.txt.gz": (gzip.compress(PHOTOS), make(f"{YFCC}.gz")),
    "photos.txt.bz2": (bz2.compress(PHOTOS), make(f"{YFCC}.bz2")),
    "subset.tsv": (SUBSET, make(YFCC)),
    "index.npy": (INDEX, make(YFCC)),
    "links.tsv": (LINKS, make("cc3m --tsv FOLDER/links.tsv --root FOLDER --image-name subset.tsv")),
    "00000.parquet": (SHARD, make("cc12m --img2dataset FOLDER")),
    "00000.tar": (saved(tar_of, None), make("cc12m --img2dataset FOLDER")),
    "shard.tar": (saved(tar_of, None), load("webdataset")),
    "a.json": (
        json.dumps({"annotations": ANNOTATIONS}).encode(),
        make("redcaps --annotations FOLDER"),
    ),
    "b.json": (COCO, make("coco --captions FOLDER/b.json")),
    "stored.zip": (saved(zip_of, zipfile.ZIP_STORED), read_zip),
    "packed.zip": (saved(zip_of, zipfile.ZIP_DEFLATED), read_zip),
    "image.jpg": (encoded("JPEG"), read_image),
    "image.png": (encoded("PNG"), read_image),
    "checkpoint.pt": (CHECKPOINT, checkpoint.load),
    "bare.pt": (saved(lambda b, v: torch.save(v, b), BARE), read_weights),
    "old.pt": (saved(old, BARE), read_weights),
    "script.pt": (saved(script, torch.nn.Linear(2, 2)), read_weights),
    "a.safetensors": (save(BARE), read_weights),
}
COMPANIONS = ("subset.tsv", "index.npy", "photos.txt", "00000.parquet", "00000.tar")
CASES = 48  # of each kind

change = st.tuples(
    st.integers(0, 2**20 - 1),  # the place, as a share of the file
    st.sampled_from(["flip", "cut", "drop", "insert", "repeat"]),
    st.binary(min_size=1, max_size=8),
)


def mutate(data, changes):
    data = bytearray(data)
    for where, kind, extra in changes:
        at = where * len(data) >> 20
        if kind == "flip":
            data[at : at + len(extra)] = extra
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + len(extra)]
        elif kind == "insert":
            data[at:at] = extra
        else:
            data[at:at] = data[at : at + 64]
    return bytes(data)


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, tmp_path):
    sound, read = KINDS[name]
    numbers, refused = itertools.count(), []

    def prepare(data):
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        for other in COMPANIONS:
            (folder / other).write_bytes(KINDS[other][0])
        (folder / name).write_bytes(data)
        return folder / name

    assert read(prepare(sound))  # the file as it was can be read

    @settings(max_examples=CASES, deadline=None, derandomize=True, database=None)
    @given(st.lists(change, min_size=1, max_size=3))
    def check(changes):
        path = prepare(mutate(sound, changes))
        folder, before = path.parent, set(path.parent.iterdir())
        signal.alarm(60)  # a hang is a failure
        try:
            read(path)
        except InputError as error:
            refused.append(str(error))
            assert "\n" not in str(error)
            assert str(folder) in str(error)
            left = set(folder.iterdir()) - before  # a whole file, refused as its rows are read
            assert all(p.suffix == ".arrow" for p in left), left
        finally:
            signal.alarm(0)
            shutil.rmtree(folder)

    check()
    assert next(numbers) >= CASES and refused

"""The Arrow file of captions: its columns, and conversions that are interrupted."""

import itertools
import multiprocessing
import os
from collections import Counter

import pyarrow as pa
import pytest

from captions import load_captions, open_csv
from infra import arrow
from utils import InputError


def test_an_arrow_file_of_other_columns(tmp_path):
    table = pa.table({"image": ["1.jpg"], "captions": ["a"]})
    with pa.ipc.new_file(tmp_path / "m.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match="m.arrow: its columns are not image, captions"):
        load_captions("csv", tmp_path / "m.arrow")
    with pytest.raises(InputError, match="n.arrow.*No such file"):
        load_captions("csv", tmp_path / "n.arrow")


def test_a_changed_input_starts_anew(tmp_path, monkeypatch):
    """Parts of an interrupted conversion are of no use after a change of input or settings."""
    table, output = tmp_path / "t.csv", tmp_path / "out.arrow"
    monkeypatch.setattr(arrow, "BATCH", 2)
    for text, is_cut in (("a,b\nc,d\ne,f\n", True), ("A,B\nC,D\nE,F\n", False)):
        table.write_text(f"filepath,title\n{text}")
        source = open_csv(table, ("filepath", "title"))
        if is_cut:
            source.rows = interrupted(source.rows, 2)
            with pytest.raises(KeyboardInterrupt):
                arrow.write_captions(output, source)
            assert len(list(tmp_path.glob("out.arrow.part/*.arrow"))) == 1
        else:
            arrow.write_captions(output, source)
    pairs = arrow.Captions(output)
    assert [pairs[i] for i in range(len(pairs))] == [("A", ["B"]), ("C", ["D"]), ("E", ["F"])]


def interrupted(values, number):
    yield from itertools.islice(values, number)
    raise KeyboardInterrupt


@pytest.mark.parametrize("has_locks", [True, False])
def test_two_processes_convert_one_file_at_once(tmp_path, monkeypatch, has_locks):
    """Containers whose process numbers are equal: one converts, or each in a folder of its own."""
    (tmp_path / "t.csv").write_text("filepath,title\na,b\nc,d\n")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    if not has_locks:
        monkeypatch.setattr(arrow.utils, "open_lock", refuse)
    monkeypatch.setattr(arrow, "BATCH", 1)
    context = multiprocessing.get_context("fork")
    together = context.Barrier(3)

    def convert():
        together.wait()
        assert len(load_captions("csv", tmp_path / "t.csv")) == 2

    processes = [context.Process(target=convert) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".arrow", ".csv"]


def refuse(*args):
    raise OSError("no locks here")


def test_a_conversion_that_another_process_finished_is_not_done_again(tmp_path):
    table, output = tmp_path / "t.csv", tmp_path / "out.arrow"
    table.write_text("filepath,title\na,b\n")
    columns = ("filepath", "title")
    assert arrow.write_captions(output, open_csv(table, columns), reuse=True) == Counter(kept=1)
    assert not arrow.write_captions(output, open_csv(table, columns), reuse=True)
    assert arrow.write_captions(output, open_csv(table, columns)) == Counter(kept=1)

"""The benchmark of growth, and that time grows as its input does."""

import re

import pytest

import benchmark
from benchmarks import growth


def test_every_conversion_and_check_is_measured(tmp_path, capsys):
    flags = ["growth", "--images", "20", "--folder", str(tmp_path)]
    benchmark.main(*benchmark.get_args_parser().parse_known_args(flags))
    lines = capsys.readouterr().out.splitlines()[3:]
    assert len(lines) == len(growth.CONVERSIONS) + len(growth.CHECKS)
    assert all(re.fullmatch(r"  [\w ]+(  +\d+\.\d{3}){3} +\d+\.\d x", line) for line in lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "make, number", [(growth.coco, 2000), (growth.images_in_one_zip, 6000)], ids=["coco", "zip"]
)
def test_four_times_the_input_takes_about_four_times_as_long(make, number):
    """It was 16 times. CPU time, and the least of three, as a machine may be busy."""
    sizes = number, 4 * number
    small, large = (min(growth.seconds(make, n, None) for _ in range(3)) for n in sizes)
    assert large < 9 * small


def test_the_order_of_many_classes_is_checked_at_once():
    assert growth.seconds(growth.order_of_classes, 20_000, None) < 10  # it took minutes

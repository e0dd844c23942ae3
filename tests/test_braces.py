"""Patterns of file names."""

import pytest

from infra.braces import alternatives
from utils import InputError


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("x.tar", "x.tar"),
        ("{08..11}", "08 09 10 11"),
        ("{0..10..5}{a,b}", "0a 0b 5a 5b 10a 10b"),
        ("{cc3m,cc12m/{00000..00001}}.tar", "cc3m.tar cc12m/00000.tar cc12m/00001.tar"),
        ("{2..0}/{x}{,y}", "2/{x} 2/{x}y 1/{x} 1/{x}y 0/{x} 0/{x}y"),
        ("{a,b", "{a,b"),
    ],
)
def test_patterns(pattern, names):
    assert alternatives(pattern) == names.split(" ")


@pytest.mark.parametrize("pattern", ["{" * 3000 + "a" + "}" * 3000, "{a}" * 3000])
def test_more_braces_than_python_can_follow_are_one_line(pattern):
    with pytest.raises(InputError, match=r"has 3,000 braces; name a folder or a list$"):
        alternatives(pattern)


def test_a_pattern_of_too_many_names():
    with pytest.raises(InputError, match="names over 1,000,000 files"):
        alternatives("{0..9999}{0..999}{0..9999}.tar")

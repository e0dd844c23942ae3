"""Names of many files by one pattern with braces, as shells spell them."""

import re

from utils import InputError

MAX_NAMES = 10**6  # of one range, and of a pattern


def alternatives(pattern):
    """The texts that a pattern with braces stands for: {00..12}, {0..9..3}, {a,b{1..3}}.

    Raises InputError for more than MAX_NAMES, and for more braces than Python can follow.
    """
    try:
        return expand(pattern)
    except RecursionError:
        raise InputError(
            f"metadata {pattern[:80]}... has {pattern.count('{'):,} braces; name a folder or a list"
        ) from None


def expand(pattern):
    start = pattern.find("{")
    depth, cuts = 0, [start]
    for at in range(max(start, 0), len(pattern) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(pattern[at], 0)
        if depth == 1 and pattern[at] == ",":
            cuts.append(at)
        if depth == 0:
            parts = [pattern[a + 1 : b] for a, b in zip(cuts, [*cuts[1:], at], strict=True)]
            inner = [text for part in parts for text in expand(part)]
            if len(parts) == 1:
                inner = numbers(parts[0]) or ["{" + text + "}" for text in inner]
            ends = expand(pattern[at + 1 :])
            if len(inner) * len(ends) > MAX_NAMES:
                raise InputError(f"metadata {pattern} names over {MAX_NAMES:,} files; shorten it")
            return [pattern[:start] + text + end for text in inner for end in ends]
    return [pattern]


def numbers(text):
    """The numbers of a range such as 00000..02175 or 0..20..5; None if it is no range."""
    if not (found := re.fullmatch(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?", text)):
        return None
    first, last, step = int(found[1]), int(found[2]), int(found[3] or 1) or 1
    if abs(last - first) // step >= MAX_NAMES:
        raise InputError(f"metadata {{{text}}} names over {MAX_NAMES:,} files; shorten the range")
    is_padded = any(len(end) > 1 and end[0] == "0" for end in (found[1], found[2]))
    width = max(len(found[1]), len(found[2])) if is_padded else 0
    sign = 1 if first <= last else -1
    return [f"{number:0{width}}" for number in range(first, last + sign, sign * step)]

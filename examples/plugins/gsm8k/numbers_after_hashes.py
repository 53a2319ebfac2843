"""GSM8K's rule: the final answer is the number after `####`."""

from __future__ import annotations

import re
from typing import Union

MARK = "####"
NUMBER_CHARS_MAX = 64

# One number with its sign on either side of the currency; thousands are either grouped rightly or not at all.
_NUMBER = re.compile(
    r"""
    \s* (?P<sign>[-+\u2212]?) \s* [$€£]? \s* (?P<sign_inside>[-\u2212]?)
    (?P<whole> \d{1,3}(?:,\d{3})+ | \d+ | (?=\.\d) )
    (?: \.(?P<part>\d+) )?
    """,
    re.VERBOSE | re.ASCII,
)
# What follows may be a unit (`dollars`, `%`, `km/h`), but must not make another number of it: 48/2, 7.2e1, 1,2, 3.4.5.
_GOES_ON = re.compile(r"\s*[-+*/^=\u00d7\u00f7]\s*[\d($]|[.,]?\d|[eE][-+]?\d", re.ASCII)


def number(text: str) -> Union[str, None]:
    """The number that `text` starts with, in one spelling for all of its spellings; `None` when there is none."""
    found = _NUMBER.match(text)
    if found is None or found.end() - found.start() > NUMBER_CHARS_MAX or _GOES_ON.match(text, found.end()):
        return None
    if found["sign"] and found["sign_inside"]:
        return None
    whole = found["whole"].replace(",", "").lstrip("0") or "0"
    part = (found["part"] or "").rstrip("0")
    plain = f"{whole}.{part}" if part else whole
    is_negative = (found["sign"] or found["sign_inside"]) in ("-", "\u2212")
    return f"-{plain}" if is_negative and plain != "0" else plain


def final_answer(completion: str) -> Union[str, None]:
    """The number after the last `####`, on the same line; `None` when there is none."""
    before, mark, after = completion.rpartition(MARK)
    if not mark or before.endswith("#"):
        return None
    line = after.lstrip(" \t").split("\n", 1)[0]
    # Bold or boxed by habit: **72**.
    return number(line.lstrip("*"))

"""The grid of a landscape: places on its axes, out of what was typed or given."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from lox_stream.errors import OptionError
from lox_stream.names import printable, shown

MOST = 1000  # places on an axis
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")

Place = tuple[float, float]  # x, y


def places_of(text: str, option: str) -> tuple[float, ...]:
    """`FROM:TO:COUNT`, at even distances, or numbers with commas; raises OptionError.

    >>> places_of("-0.5:1.5:5", "--x"), places_of("0,1,0.3", "--x")
    ((-0.5, 0.0, 0.5, 1.0, 1.5), (0.0, 0.3, 1.0))
    """
    try:
        if ":" in text:
            first, last, count = text.split(":")
            start, end, n = _exact(first), _exact(last), int(_exact(count))
            if not re.fullmatch("[0-9]{1,4}", count) or not 2 <= n <= MOST or start == end:
                raise ValueError
            found = [float(start + (end - start) * i / (n - 1)) for i in range(n)]  # exact, and rounded once
        else:
            found = [float(_exact(word)) for word in text.split(",")]
    except (ValueError, OverflowError):
        found = []
    if not found or len({*found}) < len(found) or len(found) > MOST:
        raise OptionError(
            f"{option} is {printable(text)}, expected FROM:TO:COUNT such as -0.5:1.5:5, or numbers with commas, each "
            f"once and at most {MOST}"
        )
    return tuple(sorted(found))


def place_of(text: str) -> Place:
    """`X,Y` as two numbers; raises OptionError.

    >>> place_of("0.5,-1")
    (0.5, -1.0)
    """
    try:
        x, y = (float(_exact(word)) for word in text.split(","))
    except (ValueError, OverflowError):
        raise OptionError(f"--point is {printable(text)}, expected X,Y, two finite numbers such as 0.5,1") from None
    return x, y


def _exact(word: str) -> Fraction:
    """A plain decimal number; raises ValueError for another."""
    if not NUMBER.fullmatch(word.strip()):
        raise ValueError(f"{word!r} is no plain number")
    return Fraction(word.strip())


def require_places(numbers: Any, of: str) -> tuple[float, ...]:
    """Places on an axis as floats, in order; raises OptionError for what is no number, or named twice."""
    given = [*numbers] if isinstance(numbers, Iterable) and not isinstance(numbers, str | bytes) else None
    found = tuple(sorted(float(one) + 0.0 for one in given or () if is_number(one)))  # of which -0 is 0
    if not found or given is None or len({*found}) < len(given):
        raise OptionError(
            f"{of} is {shown(numbers if given is None else given)}, expected finite numbers, each once, in a list"
        )
    return found


def require_place(place: Any) -> Place:
    """A point as two floats; raises OptionError."""
    given = [*place] if isinstance(place, Iterable) and not isinstance(place, str | bytes) else []
    if len(given) != 2 or not all(map(is_number, given)):
        raise OptionError(f"the point is {shown(place)}, expected (x, y), two finite numbers")
    return float(given[0]) + 0.0, float(given[1]) + 0.0


def is_number(value: Any) -> bool:
    """Whether this is a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def number_text(number: float) -> str:
    """The shortest text that is this number: `0.3`, `-1`."""
    return repr(number).removesuffix(".0")


def place_text(place: Place) -> str:
    """`x 0.3, y -1`."""
    return f"x {number_text(place[0])}, y {number_text(place[1])}"

"""What a user can put right: the one error that ends a command with a single line, and the checks that raise it."""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections.abc import Iterable
from typing import Any

LARGEST = 2**63 - 1  # of the whole numbers that a key takes, as torch has no larger ones
MAY_BE_EMPTY = ("prompt",)  # texts that say something without a character


class UserError(Exception):
    """Something the user can put right: one line that says what, why and what would work. The front door exits with 2.

    details: further lines, one for each of several things.
    """

    exit_code = 2

    def __init__(self, line: str, details: Iterable[str] = ()) -> None:
        super().__init__("\n  ".join(map(escaped, (line, *details))))


def escaped(text: str) -> str:
    """`text`, in which may be what a user typed, on one line: control characters as Python writes them, very long words cut."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return re.sub(r"\S{500,}", lambda word: f"{word[0][:100]}...{word[0][-20:]}", line)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def argument(key: str, value: object) -> str:
    """KEY=VALUE as a shell takes it, for a line to be pasted."""
    return f"{key}={shlex.quote(str(value))}"


def near(word: str, among: Iterable[str]) -> str | None:
    """The name in `among` that has nearly the letters of `word`, or begins with it; None where no name is near."""
    among = list(among)
    close = difflib.get_close_matches(word, among, n=1, cutoff=0.7) or [x for x in among if len(word) > 2 and x.startswith(word)]
    return close[0] if close else None


def nearest(word: str, among: Iterable[str]) -> str:
    """Returns "; did you mean X?", or "" when nothing in `among` is near `word`."""
    close = near(word, among)
    return f"; did you mean {close}?" if close else ""


def one_of(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises UserError unless `value` is among `choices`."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f"{key}={value} is not a choice ({', '.join(choices)}){nearest(str(value), choices)}")


def at_least(low: float, **values: float | None) -> None:
    """Raises UserError for the first value (named group__key) that is under `low`, or nan; None passes."""
    for name, value in values.items():
        if value is not None and not value >= low:
            raise UserError(f"{name.replace('__', '.')}={value} must be at least {low}")


def check_values(config: Any, prefix: str = "") -> None:
    """Raises UserError for what no key of a configuration takes: a number that is not finite or too large, and an empty text.

    config: a dataclass, with dataclasses and lists in it. Its dicts are another library's arguments, and are left alone.
    """
    for name, value in vars(config).items():
        for one in value if isinstance(value, list) else [value]:
            if hasattr(one, "__dataclass_fields__"):
                check_values(one, f"{prefix}{name}.")
            elif isinstance(one, (int, float)):
                check_number(f"{prefix}{name}", one)
            elif one == "" and name not in MAY_BE_EMPTY:
                raise UserError(f"{prefix}{name} is empty; leave it out, or give it a value")


def check_number(key: str, value: float) -> None:
    """Raises UserError for a number that is not finite, or beyond 64 bits."""
    if isinstance(value, int) and abs(value) > LARGEST:
        said = value if abs(value) < 10**40 else "this number"  # Python refuses to print one of thousands of digits
        raise UserError(f"{key}: {said} is beyond 64 bits; at most {LARGEST}")
    if not math.isfinite(value):
        raise UserError(f"{key}={value} is not a finite number; give one")

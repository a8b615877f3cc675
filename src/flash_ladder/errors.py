"""What a user can put right: the one error that ends a command with a single line, and the checks that raise it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: one line that says what, why and what would work. The front door exits with 2."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(word: str, among: Iterable[str]) -> str:
    """Returns "; did you mean X?", or "" when nothing in `among` is close to `word`."""
    close = difflib.get_close_matches(word, list(among), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


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

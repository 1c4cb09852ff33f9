"""Errors that a user reads: one line that says what is wrong, where, and what would be right."""

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class MegamodError(Exception):
    """A fault that the user can mend. `train.main` and the tools print its one line and exit with status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # what a user gave may hold line breaks


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint for a mistyped `word`: `, did you mean 'x'?` when a choice is close, else the list of choices."""
    names = sorted(choices)
    if not names:
        return "there are none"
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(names)}"


def listed(names: Iterable[str], limit: int = 8) -> str:
    """`a, b, c and 12 more`: long lists stay one line."""
    items = list(names)
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def expected(what: str, at: os.PathLike[str] | str | None = None) -> Iterator[None]:
    """`with expected("a directory that can be made"):` — an operating-system error inside is said in these words.

    Args:
        at: the path to name; None: the one that the system names.

    Raises:
        MegamodError: for an OSError.
    """
    try:
        yield
    except OSError as error:
        raise MegamodError(f"{at or error.filename}: {error.strerror or error}: {what} was expected") from None


@contextmanager
def during(what: str) -> Iterator[None]:
    """`with during("loss dpo, step 3"):` — what a MegamodError inside says begins with these words."""
    try:
        yield
    except MegamodError as error:
        raise MegamodError(f"{what}: {error}") from None

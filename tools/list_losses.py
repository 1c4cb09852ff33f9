"""Write the list of losses in configs/LOSSES.md: formula and source from their docstrings, the error from what the tests measured.

    REPORT=1 python -m pytest tests/test_losses.py    # measures each loss against its reference number: configs/losses.json
    python tools/list_losses.py

A loss of which no error was measured is refused.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megamod import losses
from megamod.command import command
from megamod.errors import MegamodError

CONFIGS = Path(__file__).parents[1] / "configs"
PAGE, ERRORS = CONFIGS / "LOSSES.md", CONFIGS / "losses.json"
BEGIN, END = "<!-- list of losses: written by tools/list_losses.py -->", "<!-- end of the list of losses -->"


def every_loss() -> dict[str, Callable[..., losses.Loss]]:
    """Each function of megamod.losses that is called with a head and a batch, by name, in the file's order."""
    found = inspect.getmembers(losses, inspect.isfunction)
    own = [(f.__code__.co_firstlineno, name, f) for name, f in found if f.__module__ == losses.__name__ and not name.startswith("_")]
    return {name: f for _, name, f in sorted(own) if list(inspect.signature(f).parameters)[:2] == ["head", "batch"]}


def rendered(errors: Mapping[str, float]) -> str:
    """The list as a table.

    Args:
        errors: of each loss, the worst relative error of its value and gradients.

    Raises:
        MegamodError: a loss of which no error was measured, or one whose docstring does not begin with its formula.
    """
    lines = ["| loss | of a pair, an answer or a token | what it is | needs | worst error |", "|---|---|---|---|---|"]
    for name, function in every_loss().items():
        if name not in errors:
            raise MegamodError(f"{ERRORS}: no error of losses.{name}: REPORT=1 python -m pytest tests/test_losses.py was expected")
        said = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
        formula, colon, what = said.removesuffix(".").partition(": ")
        if not colon:
            raise MegamodError(f"losses.{name}: its docstring begins with {said[:40]!r}: formula, colon and name were expected")
        source = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[\g<0>](https://arxiv.org/abs/\1)", _cell(what))
        needed = ", ".join(sorted(losses.needs_of(function)))
        lines.append(f"| `{name}` | {_cell(formula)} | {source} | {needed} | {errors[name]:.0e} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def page(text: str, errors: Mapping[str, float]) -> str:
    """The page with its list written anew. Raises MegamodError."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise MegamodError(f"{PAGE}: the lines {BEGIN!r} and {END!r} were expected, each once")
    return text[: text.index(BEGIN) + len(BEGIN)] + "\n\n" + rendered(errors) + "\n\n" + text[text.index(END) :]


def measured() -> dict[str, float]:
    """What the tests measured last."""
    found: Any = json.loads(ERRORS.read_text(encoding="utf-8"))
    return {str(name): float(error) for name, error in found.items()}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), measured()), encoding="utf-8")
    print(f"{PAGE}: {len(every_loss())} losses")


if __name__ == "__main__":
    sys.exit(main())

"""What a command line does with the faults that its user can mend: one line, and exit status 1."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

from megamod.errors import MegamodError

P = ParamSpec("P")


def command(main: Callable[P, int | None]) -> Callable[P, int]:
    """Makes of `main` a command: it returns the exit status, 0 unless `main` says otherwise; after a MegamodError's line, 1.

    Under torchrun ranks that say the same say it once.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except MegamodError as error:
            _say(f"megamod: error: {error}")
            return 1

    return run


def _say(line: str) -> None:
    if "RANK" not in os.environ:
        print(line, file=sys.stderr)
        return
    from megamod.parallel.grid import say_once  # not above: it imports megatron-core, which most tools do without

    say_once(line)

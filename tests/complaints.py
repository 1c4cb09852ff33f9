"""What a user reads when something is wrong."""

from collections.abc import Callable
from typing import Any

import pytest

from megamod.errors import MegamodError


def complaint(call: Callable[[], Any]) -> str:
    """The one line of the MegamodError that `call` must raise."""
    with pytest.raises(MegamodError) as caught:
        call()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text

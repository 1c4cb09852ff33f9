"""What a tool's user sees of a fault: one line, and an exit status."""

import errno
from pathlib import Path

import pytest
from complaints import complaint

from megamod.command import command
from megamod.errors import MegamodError, expected


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_what_main_returns_is_the_status(returned: int | None, status: int) -> None:
    assert command(lambda: returned)() == status


def test_a_fault_is_a_line_and_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)

    @command
    def main(argv: list[str]) -> None:
        """Of the tool."""
        raise MegamodError(f"{argv[0]}: two\nlines")

    assert main(["x"]) == 1
    assert capsys.readouterr() == ("", "megamod: error: x: two lines\n")
    assert main.__doc__ == "Of the tool."


def test_what_no_user_can_mend_is_not_hidden() -> None:
    def main() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        command(main)()


def test_system_errors_say_what_would_be_right(tmp_path: Path) -> None:
    def write(at: str | None) -> None:
        with expected("a file that can be written", at):
            (tmp_path / "absent" / "x").write_text("")

    assert complaint(lambda: write(None)) == f"{tmp_path}/absent/x: No such file or directory: a file that can be written was expected"
    assert complaint(lambda: write("--out")) == "--out: No such file or directory: a file that can be written was expected"

    def fail() -> None:
        with expected("a disk"):
            raise OSError(errno.ENOSPC, "No space left on device", "/full")

    assert complaint(fail) == "/full: No space left on device: a disk was expected"

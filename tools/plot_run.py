"""Plot a run: its losses, what its validations found, learning rate and gradient norm, from metrics.jsonl.

python tools/plot_run.py runs/quickstart runs/quickstart/curves.png
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megamod.command import command
from megamod.data.jsonl import json_object, lines_of
from megamod.errors import MegamodError, expected
from megamod.files import replacing

Curve = tuple[list[int], list[float]]


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("out", type=Path, help="a PNG file")
    args = parser.parse_args()
    with expected("a PNG file that can be written"):
        plot(curves(args.run / "metrics.jsonl"), str(args.run), args.out)
    print(args.out)


def curves(file: Path) -> dict[str, Curve]:
    """Steps and values of every metric of a run. Raises MegamodError for a file that is not there, or damaged."""
    found: dict[str, Curve] = {}
    for where, line in lines_of(file):
        record: dict[str, Any] = json_object(line, where)
        step = record.pop("step", None)
        if not isinstance(step, int):
            raise MegamodError(f"{where}: no step: a line of a run's metrics.jsonl was expected")
        for name, value in record.items():
            if isinstance(value, int | float):
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    if not found:
        raise MegamodError(f"{file}: no numbers: has the run made a step?")
    return found


def plot(found: dict[str, Curve], title: str, out: Path) -> None:
    """A panel for the losses, one for the validations, one for learning rate and gradient norm; those that have something to show."""
    panels = {
        "loss": [name for name in found if name == "loss" or name.startswith("nll")],
        "validation": [name for name in found if name.startswith("eval/")],
        "gradient norm, learning rate": [name for name in ("grad_norm", "lr") if name in found],
    }
    shown = {what: names for what, names in panels.items() if names}
    if not shown:
        raise MegamodError(f"{title}: neither losses nor validations in metrics.jsonl")
    figure = Figure(figsize=(5 * len(shown), 4), dpi=110, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    for axes, (what, names) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        _draw(axes, found, names, what, is_validation=what == "validation")
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as draft:
        figure.savefig(draft, format="png")


def _draw(axes: Axes, found: dict[str, Curve], names: list[str], title: str, *, is_validation: bool) -> None:
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    for name in names:
        axes.plot(*found[name], label=name.removeprefix("eval/"), marker="o" if is_validation else None)
    if not is_validation and any(value > 0 for name in names for value in found[name][1]):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.legend(frameon=False)


if __name__ == "__main__":
    sys.exit(main())

"""A report: the numbers as JSON, and one page of plots.

Names in Chinese, Japanese or Korean are drawn in the first font of FONTS that the machine has. A character that no font has is
drawn as its escape, `\\u6b67`, so that nothing is shown as an empty box; metrics.json has every name as it is.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from megamod.errors import expected
from megamod.evaluate.metrics import BINS, FPRS, NAMES, Judged, Reading, Table, calibration, curve, headline, readings_of, tabulate
from megamod.files import replace_text, replacing

SIZE, DPI = (16.0, 10.0), 100  # inches, dots an inch
LATIN = "DejaVu Sans"  # comes with matplotlib
FONTS = (  # with Chinese characters, in the order of preference
    "Noto Sans CJK SC", "Source Han Sans SC", "Noto Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei",
    "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS", "Droid Sans Fallback", "Noto Serif CJK SC", "SimSun",
)  # fmt: skip
COLOURS: dict[Reading, str] = {"strict": "#c1432e", "loose": "#2f6fa8"}
GREY = "#777777"  # the baseline and whatever is not a measurement
TICK: dict[str, Any] = {"marker": "|", "color": "black", "markeredgewidth": 2, "linestyle": "none"}  # the baseline on a bar
BARS = 12  # in one panel; more do not read
LONGEST = 32  # characters of a name beside a bar
STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "grid.color": "#e4e4e4",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


@dataclass(frozen=True, eq=False)
class Side:
    """One model's part in the plots."""

    name: str  # as it is drawn
    metrics: Mapping[str, Any]
    table: Table


def write(
    metrics: Mapping[str, Any],
    judged: Sequence[Judged],
    directory: Path,
    *,
    title: str,
    baseline: tuple[str, Mapping[str, Any], Sequence[Judged]] | None = None,
) -> tuple[Path, Path]:
    """Write `metrics.json` and `report.png`, 1600 × 1000 pixels, into `directory`, which is made where it is missing.

    Args:
        metrics: what `metrics.measure(judged)` returned; the JSON file holds it as it is.
        judged: the rows, for the curves.
        directory: files of these names in it are replaced, each at once.
        title: of the page.
        baseline: name, metrics and rows of another model on the same conversations, drawn in grey beside ours; the JSON file has
            its metrics under `baseline`.

    Returns:
        The paths of the two files.

    Raises:
        MegamodError: the files cannot be written; the rows are not those that `tabulate` takes.
    """
    picture = _png(title, metrics, tabulate(judged), baseline and (baseline[0], baseline[1], tabulate(baseline[2])))
    record = dict(metrics) | ({"baseline": {"name": baseline[0], "metrics": baseline[1]}} if baseline else {})
    text = json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    json_file, png_file = directory / "metrics.json", directory / "report.png"
    with expected("a directory for the report", directory):
        directory.mkdir(parents=True, exist_ok=True)
        # Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes the escape that JSON reads back.
        replace_text(json_file, text.encode("utf-8", "backslashreplace").decode("utf-8"))
        with replacing(png_file) as draft:
            draft.write_bytes(picture)
    return json_file, png_file


def _png(title: str, metrics: Mapping[str, Any], table: Table, baseline: tuple[str, Mapping[str, Any], Table] | None) -> bytes:
    """The page of plots."""
    fonts = _fonts()
    sides = [Side("this model", metrics, table)]
    if baseline:
        sides.append(Side(_shown(baseline[0], fonts, LONGEST), baseline[1], baseline[2]))
    readings = max((readings_of(side.metrics) for side in sides), key=len)
    style: Any = STYLE | {"font.family": fonts}
    with matplotlib.rc_context():  # the user's own settings come back
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=SIZE, dpi=DPI)
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.07)
        figure.suptitle(_shown(title, fonts, 100), x=0.01, ha="left", fontsize=16, fontweight="bold")
        figure.supxlabel(_footer(metrics, readings), x=0.01, ha="left", fontsize=10, color=GREY)
        strips: Any = figure.subfigures(3, 1, height_ratios=[0.05, 1.1, 1])
        top, middle, bottom = strips
        _legend(top, sides, readings)
        grid = middle.add_gridspec(1, 3)  # rows of their own: long names below take no width up here
        _roc(middle.add_subplot(grid[0]), sides, readings)
        _precision_recall(middle.add_subplot(grid[1]), sides, readings)
        parts = grid[2].subgridspec(2, 1, height_ratios=[3, 1])
        upper = middle.add_subplot(parts[0])
        _reliability(upper, middle.add_subplot(parts[1], sharex=upper), sides, readings)
        grid = bottom.add_gridspec(1, 3, width_ratios=[1, 1.1, 1])
        _confusion(bottom.add_subplot(grid[0]), metrics)
        _bars(bottom.add_subplot(grid[1]), sides, readings, "categories", "recall", fonts)
        _bars(bottom.add_subplot(grid[2]), sides, readings, "languages", "f1", fonts)
        buffer = BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


# ---- panels


def _legend(strip: SubFigure, sides: Sequence[Side], readings: Sequence[Reading]) -> None:
    """What colours and dashes mean, once for the page."""
    handles = []
    for side, reading, style in _lines(sides, readings):
        handles.append(Line2D([], [], label=side.name if len(readings) == 1 else f"{side.name}, {reading}", **style))
    if len(sides) > 1:
        handles.append(Line2D([], [], label="the same, on bars", **TICK, markersize=10))
    strip.legend(handles=handles, loc="center left", bbox_to_anchor=(0.0, 0.5), ncols=len(handles), fontsize=10)


def _roc(axes: Axes, sides: Sequence[Side], readings: Sequence[Reading]) -> None:
    """Recall against FPR, whose axis is logarithmic: what matters in use is its left end."""
    negatives = max(int((~side.table.unsafe(reading)).sum()) for side, reading, _ in _lines(sides, readings))
    left = min(0.005, 0.5 / max(negatives, 1))  # the first false positive is to be seen
    for side, reading, style in _lines(sides, readings):
        unsafe = side.table.unsafe(reading)
        if unsafe.any() and not unsafe.all():
            _, tp, fp = curve(unsafe, side.table.score(reading))
            fpr, recall = np.append(0.0, fp[0] / (~unsafe).sum()), np.append(0.0, tp[0] / unsafe.sum())
            # Straight from point to point, as the area is counted: bent on this axis. It begins at its left edge: it has no 0.
            drawn = np.union1d(np.geomspace(left, 1, 400), fpr[fpr > left])
            axes.plot(drawn, np.interp(drawn, fpr, recall), label=_label(side, reading, "auroc"), **style)
    axes.set(xscale="log", xlim=(left, 1), ylim=(0, 1.02), xlabel="false-positive rate", ylabel="recall of unsafe")
    axes.set_title("ROC")
    axes.xaxis.set_major_formatter(_PERCENT)
    for share in FPRS.values():
        axes.axvline(share, color=GREY, linewidth=1, linestyle=":")
    _finish(axes, -0.13, "no curve: gold has one class")


def _precision_recall(axes: Axes, sides: Sequence[Side], readings: Sequence[Reading]) -> None:
    """The precision at which each recall is reached."""
    for side, reading, style in _lines(sides, readings):
        unsafe = side.table.unsafe(reading)
        if unsafe.any() and not unsafe.all():
            _, tp, fp = curve(unsafe, side.table.score(reading))
            caught = tp[0] > 0  # before the first, precision is 0 and nothing is recalled
            recall, precision = (tp[0] / unsafe.sum())[caught], (tp[0] / (tp[0] + fp[0]))[caught]
            recall, precision = np.append(0.0, recall), np.append(precision[0], precision)
            axes.plot(recall, precision, drawstyle="steps-pre", label=_label(side, reading, "pr_auc"), **style)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall of unsafe", ylabel="precision of unsafe")
    axes.set_title("Precision and recall")
    _finish(axes, -0.13, "no curve: gold has one class")


def _reliability(upper: Axes, lower: Axes, sides: Sequence[Side], readings: Sequence[Reading]) -> None:
    """Share of gold unsafe against the score, above how often each score is given."""
    rarest = 1.0
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
    for side, reading, style in _lines(sides, readings):
        rows, mean, share = calibration(side.table.unsafe(reading), side.table.score(reading))
        there = rows > 0
        rarest = min(rarest, float(rows[there].min() / rows.sum()))
        upper.plot(mean[there], share[there], marker="o", markersize=4, clip_on=False, **style)
        lower.stairs(rows / rows.sum(), np.linspace(0, 1, BINS + 1), **style)
        lower.plot([], [], label=_label(side, reading, "ece"), **style)
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share that is unsafe")
    upper.set_title("Reliability of the score")
    upper.tick_params(labelbottom=False)
    upper.grid(True)
    lower.set(xlabel="probability of unsafe", ylabel="rows", yscale="log", ylim=(0.5 * rarest, 1.5))
    lower.yaxis.set_major_locator(LogLocator(numticks=4))
    lower.yaxis.set_major_formatter(_PERCENT)
    lower.yaxis.set_minor_locator(NullLocator())
    _finish(lower, -0.5, "")


def _confusion(axes: Axes, metrics: Mapping[str, Any]) -> None:
    """Counts, coloured by their share of the gold severity's rows."""
    gold, said = metrics["confusion"]["gold"], metrics["confusion"]["said"]
    counts = np.array(metrics["confusion"]["counts"], dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        text = f"{counts[i, j]:,.0f}" + (f"\n{100 * share:.1f} %" if counts[i].any() else "")
        axes.text(j, i, text, ha="center", va="center", fontsize=13, color="white" if share > 0.6 else "#222222")
    axes.set_xticks(range(len(said)), said)
    axes.set_yticks(range(len(gold)), gold, rotation=90, va="center")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="said by this model", ylabel="gold")
    axes.set_title("Confusion")


def _bars(axes: Axes, sides: Sequence[Side], readings: Sequence[Reading], part: str, key: str, fonts: Sequence[str]) -> None:
    """`key` of each entry of `metrics[part]`: a bar for each reading, and a tick on it for the baseline's."""
    entries = sides[0].metrics[part]
    names = list(entries)[:BARS]
    slots = max(len(names), 3)  # one language alone is no wall
    height = 0.8 / len(readings)
    small = min(9.0, 220 * height / slots)  # points: a number is no higher than its bar
    for index, reading in enumerate(readings):
        for row, name in enumerate(names):
            place = row + (index - (len(readings) - 1) / 2) * height
            value, *others = (side.metrics[part].get(name, {}).get(reading, {}).get(key) for side in sides)
            axes.barh(place, value or 0.0, height * 0.9, color=COLOURS[reading], alpha=0.85)
            shown, colour = ("–", GREY) if value is None else (f"{value:.3f}", "white" if value > 0.12 else "black")
            axes.text(0.01, place, shown, va="center", fontsize=small, color=colour)
            for other in others:
                if other is not None:
                    axes.plot(other, place, **TICK, markersize=170 * height / slots, clip_on=False)
    labels = [f"{_shown(name, fonts, LONGEST)}  ({entries[name]['rows']:,})" for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=10 if len(names) <= 10 else 8)
    axes.set(xlim=(0, 1), ylim=(slots - 0.4, -0.6), xlabel="recall of unsafe" if key == "recall" else NAMES[key])
    more = f", the {BARS} largest of {len(entries)}" if len(entries) > BARS else ""
    axes.set_title(f"By {'category' if part == 'categories' else 'language'}{more}")
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    if not names:
        _say(axes, f"no {part} in the rows")


# ---- parts of panels

_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g} %")


def _lines(sides: Sequence[Side], readings: Sequence[Reading]) -> Iterator[tuple[Side, Reading, dict[str, Any]]]:
    """What is drawn as a line, and how: dashes tell the reading; the baseline is grey, and below ours."""
    for number, side in enumerate(sides):
        for reading in readings:
            look = (
                {"color": GREY, "linewidth": 1.4, "zorder": 2.0} if number else {"color": COLOURS[reading], "linewidth": 2.0, "zorder": 3.0}
            )
            yield side, reading, look | {"linestyle": "-" if reading == "strict" else "--"}


def _label(side: Side, reading: Reading, key: str) -> str:
    """`AUROC 0.912`."""
    value = side.metrics[reading][key]
    return f"{NAMES.get(key, 'area')} {'–' if value is None else f'{value:.3f}'}"


def _finish(axes: Axes, below: float, empty: str) -> None:
    """Grid, and a legend below the panel, where it covers no curve; or `empty` where nothing was drawn."""
    axes.grid(True)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, below), ncols=len(handles), handlelength=1.3, columnspacing=0.8
        )
    else:
        _say(axes, empty)


def _say(axes: Axes, text: str) -> None:
    """Words in the place of a plot."""
    box = {"facecolor": "white", "edgecolor": "none"}
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=12, color=GREY, bbox=box)


def _footer(metrics: Mapping[str, Any], readings: Sequence[Reading]) -> str:
    """The first numbers, and what the page's words mean."""
    parts = [f"{name} {value}" for name, value in headline(metrics)[:3]]
    if "intervals" in metrics:
        parts.append("[…]: 95 % bootstrap interval")
    if len(readings) > 1:
        parts.append("strict: controversial counts as unsafe, loose: as safe")
    return "   ·   ".join(parts)


# ---- names


def _fonts() -> list[str]:
    """Families for every text: the Latin one, then the first with Chinese that this machine has."""
    there = {entry.name for entry in fontManager.ttflist}
    return [LATIN, *[name for name in FONTS if name in there][:1]]


def _shown(name: str, fonts: Sequence[str], longest: int) -> str:
    """A name that can be drawn, on one line: escapes for what no font has, the end left out where it is too long."""
    known = [get_font(findfont(FontProperties(family=[family]))) for family in fonts]
    shown = ""
    for character in name:
        drawable = character.isprintable() and any(font.get_char_index(ord(character)) for font in known)
        shown += character if drawable else character.encode("unicode_escape").decode("ascii")
        if len(shown) > longest:
            return shown[: longest - 1] + "…"
    return shown

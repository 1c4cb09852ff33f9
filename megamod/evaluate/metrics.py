"""How well a model moderates: every number of a report, from judged conversations.

Two readings of three severities: *strict* counts controversial as unsafe, *loose* as safe. Each is applied to gold and to what the
model says, and each has a score, the probability of unsafe in that reading. Where neither gold nor the model knows controversial,
the two readings coincide, and both are reported.

Every number is a function of how often each row counts, `weights [r, n]`: ones give the estimate, resampled counts give the
bootstrap, so that an interval and its estimate share one definition. What is undefined is NaN inside and None in the result.

Shapes: n rows with a gold label, r weightings of them, k classes, g distinct scores.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megamod.errors import MegamodError
from megamod.verdicts import SEVERITIES, Severity, Verdict

Reading = Literal["strict", "loose"]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

UNSAFE_FROM: dict[Reading, int] = {"strict": 1, "loose": 2}  # the first of SEVERITIES that a reading counts as unsafe
BINS = 15  # of equal width on [0, 1], for calibration
FPRS = {"1": 0.01, "5": 0.05}  # false-positive rates in percent, as names have them, and as shares
TOLERANCE = 1e-3  # how far from 1 a row's scores may sum: softmax in bfloat16 is no better
CELLS = 1 << 20  # of `weights` at a time: bounds the bootstrap's memory

NAMES = {  # of the headline numbers, as a person reads them: of three severities, and of a reading
    "accuracy": "accuracy", "macro_f1": "macro-F1", "strict": "strict", "loose": "loose", "f1": "F1 of unsafe", "fpr": "FPR",
    "fnr": "FNR", "auroc": "AUROC", "recall_at_fpr_1": "recall at FPR 1 %", "recall_at_fpr_5": "recall at FPR 5 %", "ece": "ECE",
}  # fmt: skip
READING_KEYS = ("f1", "fpr", "fnr", "auroc", "recall_at_fpr_1", "recall_at_fpr_5", "ece")
HEADLINE = ("accuracy", "macro_f1", *(f"{reading}.{key}" for reading in UNSAFE_FROM for key in READING_KEYS))


@dataclass(frozen=True)
class Judged:
    """One conversation, what is true of it and what a model says of it."""

    scores: Mapping[Severity, float]  # probabilities of the severities that the model's verdict format has; they sum to 1
    label: Severity | None  # gold; None: not known, and the row is not measured
    categories: tuple[str, ...] = ()  # gold
    language: str | None = None
    verdict: Verdict | None = None  # parsed from greedy decoding; None: not decoded, or not parsed
    text: str | None = None  # what was decoded; None: nothing was
    kind: str | None = None  # a slice of the set to measure by, such as counter-speech
    notes: tuple[str, ...] = ()  # what whoever reads the verdict should know, such as that the text was read in windows

    @property
    def severity(self) -> Severity:
        """The most probable one; of equal ones the mildest."""
        return max(self.scores, key=lambda severity: (self.scores[severity], -SEVERITIES.index(severity)))


@dataclass(frozen=True, eq=False)  # eq=False: arrays have no single truth value
class Table:
    """The rows that have a gold label, as arrays. Severities are indices into SEVERITIES."""

    rows: list[Judged]
    gold: Integers  # [n]
    said: Integers  # [n]: the most probable severity; of equal ones the mildest
    scores: Floats  # [n, 3]: 0 for a severity that the model's format lacks

    def unsafe(self, reading: Reading) -> Flags:
        """[n]: gold is unsafe."""
        return self.gold >= UNSAFE_FROM[reading]

    def flagged(self, reading: Reading) -> Flags:
        """[n]: what the model says is unsafe, as a client reads it: the most probable severity, then mapped."""
        return self.said >= UNSAFE_FROM[reading]

    def score(self, reading: Reading) -> Floats:
        """[n] in [0, 1]: the probability of unsafe. Strict: 1 - p(safe), summed from the other side, which keeps the digits of
        small probabilities. Loose: p(unsafe)."""
        return np.minimum(self.scores[:, UNSAFE_FROM[reading] :].sum(axis=1), 1.0)

    def take(self, chosen: Flags) -> "Table":
        """The rows where `chosen [n]` is true."""
        rows = [row for row, wanted in zip(self.rows, chosen, strict=True) if wanted]
        return Table(rows, self.gold[chosen], self.said[chosen], self.scores[chosen])


def tabulate(judged: Sequence[Judged]) -> Table:
    """The rows with a gold label as arrays; every row is checked.

    Raises:
        MegamodError: no row has a gold label; a severity that is none; scores that are no probabilities. It names the row.
    """
    for index, row in enumerate(judged):
        _check(row, judged[0], f"row {index}")
    rows = [row for row in judged if row.label is not None]
    if not rows:
        raise MegamodError(f"none of {len(judged)} rows has a gold label: nothing can be measured")
    scores = np.array([[row.scores.get(severity, 0.0) for severity in SEVERITIES] for row in rows], dtype=np.float64)
    gold = np.array([SEVERITIES.index(row.label) for row in rows if row.label is not None], dtype=np.int64)
    return Table(rows, gold, scores.argmax(axis=1), scores)


def measure(judged: Sequence[Judged], *, intervals: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Every number of a report, over the rows that have a gold label.

    The severity that a row is given is the most probable one. Where gold never says controversial but the model can, the model's
    controversial counts as unsafe (strict) in `accuracy`, `macro_f1` and `severities`; `confusion` keeps it apart, and `strict`
    and `loose` judge both readings.

    Args:
        judged: all with scores over the same severities.
        intervals: how many bootstrap resamples of the rows; 0: no intervals.
        seed: of the resampling.

    Returns:
        A dict that `json.dumps` takes. Rates are shares in [0, 1]; what is undefined is None (recall without a positive, AUROC
        with one class, ...).

        - `rows`, `unlabelled`, `labels`: counts.
        - `accuracy`; `macro_f1`: the mean F1 of the severities that gold has; `severities`: precision, recall and F1 of each.
        - `confusion`: `counts[i][j]` rows of severity `gold[i]` were given `said[j]`.
        - `strict`, `loose`: `f1`, `precision`, `recall` of unsafe; `macro_f1` of unsafe and safe (of what gold has); `fpr`, `fnr`;
          `auroc`; `pr_auc` (average precision); `recall_at_fpr_1` and `_5`: the best recall of the rule "unsafe from this score on"
          whose FPR is at most that many percent, and `threshold_at_fpr_1` and `_5`, the highest score that reaches it (None:
          the best is to catch nothing); `ece`: the mean over rows, in 15 bins of equal width of the score, of
          |share of gold unsafe in the bin - mean score in the bin|; `brier`: the mean of (score - gold)².
        - `intervals`: [2.5 %, 97.5 %] percentiles over resamples of the rows, of the headline numbers and the thresholds; resamples
          in which a number is undefined are left out. A resample is rougher than its sample, so ECE's leans upwards.
        - `languages`, `kinds`: the headline numbers of each, the most frequent first.
        - `categories`: by gold category, the most frequent first: `rows`; in each reading `recall` among its unsafe rows and `fpr`
          among its safe ones (counter-speech, say); and, where verdicts were decoded, `said`: how well the category itself is named.
        - `decoded` (absent when nothing was): `rows`; `parse_rate`; `agreement` of the severity in the text with the scored one, of
          those that parsed; `categories`: `micro` and `macro` precision, recall and F1 (macro: over gold's categories).

        A decoded text that did not parse names no category. Rows that are not safe and have no gold category are left out of `said`
        and of `decoded.categories`: which one they have is not known.

    Raises:
        MegamodError: as `tabulate`; `intervals` below 0.
    """
    if intervals < 0:
        raise MegamodError(f"intervals = {intervals}: a number of resamples was expected, 0 for none")
    table = tabulate(judged)
    n = len(table.rows)
    has_controversial = bool((table.gold == 1).any())
    flat = {name: values[0] for name, values in _estimate(table, np.ones((1, n)), has_controversial).items()}
    result: dict[str, Any] = {
        "rows": n,
        "unlabelled": len(judged) - n,
        "labels": {severity: int((table.gold == i).sum()) for i, severity in enumerate(SEVERITIES)},
    }
    result |= _nest({name: _plain(value) for name, value in flat.items()})
    result["severities"] = _severities(table, has_controversial)
    result["confusion"] = _confusion_table(table)
    if intervals:
        bounds = _bootstrap(table, has_controversial, intervals, seed)
        result["intervals"] = {"resamples": intervals, "seed": seed, "percentiles": [2.5, 97.5]} | _nest(bounds)
    result["languages"] = _slices(table, [row.language for row in table.rows], has_controversial)
    result["kinds"] = _slices(table, [row.kind for row in table.rows], has_controversial)
    result["categories"] = _categories(table)
    if decoded := _decoded(table):
        result["decoded"] = decoded
    return result


def headline(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what a short table shows: `("strict AUROC", "0.912 [0.901, 0.923]")`, a dash for what is undefined.

    Readings that coincide are shown once, without their names.
    """
    readings = readings_of(metrics)
    lines = [("rows", f"{metrics['rows']:,}")]
    for name in HEADLINE:
        reading, dot, key = name.rpartition(".")
        if dot and reading not in readings:
            continue
        value, bounds = _at(metrics, name), _at(metrics.get("intervals", {}), name)
        shown = f"{NAMES[reading]} {NAMES[key]}" if dot and len(readings) > 1 else NAMES[key]
        lines.append((shown, "–" if value is None else f"{value:.3f}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")))
    if "decoded" in metrics:
        lines.append(("parse rate", f"{metrics['decoded']['parse_rate']:.3f}"))
    return lines


def readings_of(metrics: Mapping[str, Any]) -> tuple[Reading, ...]:
    """The readings that differ: one where neither gold nor the model's format has controversial."""
    both = "controversial" in (*metrics["confusion"]["gold"], *metrics["confusion"]["said"])
    return ("strict", "loose") if both else ("strict",)


def curve(unsafe: Flags, score: Floats, weights: Floats | None = None) -> tuple[Floats, Floats, Floats]:
    """What the rule "unsafe from this score on" catches, at each distinct score.

    Args:
        unsafe: [n], gold.
        score: [n].
        weights: [r, n], how often each row counts; left out: once each, r = 1.

    Returns:
        The distinct scores, falling [g]; true positives [r, g]; false positives [r, g].
    """
    weights = np.ones((1, len(score))) if weights is None else weights
    order = np.argsort(-score, kind="stable")
    falling = score[order]
    ends = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))  # rows of one score are flagged together  # [g]
    drawn = weights[:, order]
    caught = np.cumsum(drawn * unsafe[order], axis=1)[:, ends]
    return falling[ends], caught, np.cumsum(drawn, axis=1)[:, ends] - caught


def calibration(unsafe: Flags, score: Floats) -> tuple[Integers, Floats, Floats]:
    """Rows, mean score and share of gold unsafe in each of BINS bins, [BINS] each; NaN for the means of an empty bin."""
    place = _bin(score)
    rows = np.bincount(place, minlength=BINS)
    sums = np.stack([score, unsafe]) @ np.eye(BINS)[place]  # [2, BINS]
    mean, share = _ratio(sums, rows.astype(np.float64))
    return rows, mean, share


# ---- numbers as functions of weights


def _estimate(table: Table, weights: Floats, has_controversial: bool) -> dict[str, Floats]:
    """Each number that may be resampled, [r]; those of a reading under `strict.` and `loose.`."""
    counts = _confusion(table.gold, _given(table, has_controversial), len(SEVERITIES), weights)
    result = {"accuracy": _ratio(np.einsum("rkk->r", counts), counts.sum(axis=(1, 2))), "macro_f1": _rates(counts)[3]}
    for reading in UNSAFE_FROM:
        numbers = _binary(table.unsafe(reading), table.flagged(reading), table.score(reading), weights)
        result |= {f"{reading}.{name}": values for name, values in numbers.items()}
    return result


def _binary(unsafe: Flags, flagged: Flags, score: Floats, weights: Floats) -> dict[str, Floats]:
    """The numbers of one reading, [r] each."""
    counts = _confusion(unsafe.astype(np.int64), flagged.astype(np.int64), 2, weights)
    precision, recall, f1, macro_f1 = _rates(counts)
    total = counts.sum(axis=(1, 2))
    safe, positive = counts[:, 0].sum(axis=1), counts[:, 1].sum(axis=1)

    thresholds, tp, fp = curve(unsafe, score, weights)
    new_tp, new_fp = (np.diff(values, axis=1, prepend=0.0) for values in (tp, fp))  # [r, g]
    under_roc = (new_fp * (tp - new_tp / 2)).sum(axis=1)  # trapezoids: ties count half
    under_pr = (new_tp * _ratio(tp, tp + fp, otherwise=0.0)).sum(axis=1)
    both = safe * positive

    gaps = np.zeros((len(score), BINS))
    gaps[np.arange(len(score)), _bin(score)] = unsafe - score
    result = {
        "f1": f1[:, 1],
        "precision": precision[:, 1],
        "recall": recall[:, 1],
        "macro_f1": macro_f1,
        "fpr": _ratio(counts[:, 0, 1], safe),
        "fnr": _ratio(counts[:, 1, 0], positive),
        "auroc": _ratio(under_roc, both),
        "pr_auc": np.where(both > 0, _ratio(under_pr, positive), np.nan),
        "ece": _ratio(np.abs(weights @ gaps).sum(axis=1), total),
        "brier": _ratio(weights @ (score - unsafe) ** 2, total),
    }
    for percent, share in FPRS.items():
        # A quotient, not fp <= share * safe: 7/700 rounds to the number that 0.01 is, 0.01 * 700 does not round to 7.
        allowed = _ratio(fp, safe[:, None]) <= share  # [r, g], true up to some score
        best = (new_tp * allowed).sum(axis=1)
        reaches = np.minimum((tp < best[:, None]).sum(axis=1), len(thresholds) - 1)
        result[f"recall_at_fpr_{percent}"] = np.where(both > 0, _ratio(best, positive), np.nan)
        result[f"threshold_at_fpr_{percent}"] = np.where((both > 0) & (best > 0), thresholds[reaches], np.nan)
    return result


def _given(table: Table, has_controversial: bool) -> Integers:
    """[n]: the severity that each row is given; where gold has no controversial, the model's is unsafe."""
    return table.said if has_controversial else np.where(table.said == 1, 2, table.said)


def _confusion(gold: Integers, said: Integers, classes: int, weights: Floats) -> Floats:
    """How many rows of each class were given which: [r, k of gold, k of said]."""
    return (weights @ np.eye(classes * classes)[gold * classes + said]).reshape(-1, classes, classes)


def _rates(counts: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Precision, recall and F1 of each class [r, k], and the mean F1 of the classes that gold has [r], of counts [r, k, k]."""
    right = np.diagonal(counts, axis1=1, axis2=2)
    gold, said = counts.sum(axis=2), counts.sum(axis=1)
    f1 = _ratio(2 * right, gold + said)
    present = gold > 0
    macro_f1 = _ratio(np.where(present, f1, 0.0).sum(axis=1), present.sum(axis=1).astype(np.float64))
    return _ratio(right, said), _ratio(right, gold), f1, macro_f1


def _ratio(part: Floats, whole: Floats, otherwise: float = np.nan) -> Floats:
    """part / whole; `otherwise` where whole is 0."""
    shape = np.broadcast_shapes(part.shape, whole.shape)
    return np.divide(part, whole, out=np.full(shape, otherwise), where=np.broadcast_to(whole > 0, shape))


def _bin(score: Floats) -> Integers:
    """[n]: the bin of each score, [0, 1/15), [1/15, 2/15), ..., [14/15, 1]."""
    return np.minimum((score * BINS).astype(np.int64), BINS - 1)


def _bootstrap(table: Table, has_controversial: bool, resamples: int, seed: int) -> dict[str, list[float] | None]:
    """Percentile intervals of the headline numbers and the thresholds."""
    n = len(table.rows)
    rng = np.random.Generator(np.random.PCG64(seed))
    thresholds = (f"{reading}.threshold_at_fpr_{percent}" for reading in UNSAFE_FROM for percent in FPRS)
    parts: dict[str, list[Floats]] = {name: [] for name in (*HEADLINE, *thresholds)}
    step = max(1, CELLS // n)
    for first in range(0, resamples, step):
        r = min(step, resamples - first)
        drawn = rng.integers(n, size=(r, n)) + n * np.arange(r)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=r * n).reshape(r, n).astype(np.float64)
        numbers = _estimate(table, weights, has_controversial)
        for name, values in parts.items():
            values.append(numbers[name])
    bounds: dict[str, list[float] | None] = {}
    for name, pieces in parts.items():
        resampled = np.concatenate(pieces)
        defined = resampled[np.isfinite(resampled)]
        bounds[name] = np.percentile(defined, [2.5, 97.5]).tolist() if len(defined) else None
    return bounds


# ---- parts of the result


def _severities(table: Table, has_controversial: bool) -> dict[str, Any]:
    """Rows of gold, precision, recall and F1 of safe, unsafe and, where gold has it, controversial."""
    counts = _confusion(table.gold, _given(table, has_controversial), len(SEVERITIES), np.ones((1, len(table.rows))))
    precision, recall, f1, _ = _rates(counts)
    return {
        severity: {
            "rows": int(counts[0, i].sum()),
            "precision": _plain(precision[0, i]),
            "recall": _plain(recall[0, i]),
            "f1": _plain(f1[0, i]),
        }
        for i, severity in enumerate(SEVERITIES)
        if severity != "controversial" or has_controversial
    }


def _confusion_table(table: Table) -> dict[str, Any]:
    """Counts of gold (rows) by what the model says (columns), controversial only where gold, or the model's format, has it."""
    gold = [i for i, severity in enumerate(SEVERITIES) if severity != "controversial" or (table.gold == 1).any()]
    said = [i for i, severity in enumerate(SEVERITIES) if severity in table.rows[0].scores]
    counts = _confusion(table.gold, table.said, len(SEVERITIES), np.ones((1, len(table.rows))))[0].astype(int)
    return {
        "gold": [SEVERITIES[i] for i in gold],
        "said": [SEVERITIES[i] for i in said],
        "counts": counts[np.ix_(gold, said)].tolist(),
    }


def _slices(table: Table, names: Sequence[str | None], has_controversial: bool) -> dict[str, Any]:
    """The headline numbers of the rows of each name, the most frequent first."""
    result = {}
    for name, rows in _by_frequency(Counter(name for name in names if name is not None)):
        part = table.take(np.array([other == name for other in names]))
        numbers = _estimate(part, np.ones((1, rows)), has_controversial)
        result[name] = {"rows": rows, **_nest({key: _plain(numbers[key][0]) for key in HEADLINE})}
    return result


def _categories(table: Table) -> dict[str, Any]:
    """By gold category: rows, recall and false positives in each reading, and how well the category is named."""
    gold = [set(row.categories) for row in table.rows]
    said = _said_categories(table)
    result: dict[str, Any] = {}
    for category, rows in _by_frequency(Counter(name for names in gold for name in names)):
        here = np.array([category in names for names in gold])
        entry: dict[str, Any] = {"rows": rows}
        for reading in UNSAFE_FROM:
            unsafe, flagged = table.unsafe(reading)[here], table.flagged(reading)[here]
            entry[reading] = {"recall": _share(flagged[unsafe]), "fpr": _share(flagged[~unsafe])}
        if said:
            entry["said"] = _precision_recall_f1(*_hits(said, [category]))
        result[category] = entry
    return result


def _decoded(table: Table) -> dict[str, Any]:
    """Of the rows whose verdict was decoded: how many parsed, agreed with the scores, and named the categories."""
    decoded = np.array([_was_decoded(row) for row in table.rows])
    parsed = np.array([row.verdict is not None for row in table.rows])
    if not decoded.any():
        return {}
    agrees = np.array(
        [row.verdict is not None and row.verdict.severity == SEVERITIES[i] for row, i in zip(table.rows, table.said, strict=True)]
    )
    result: dict[str, Any] = {
        "rows": int(decoded.sum()),
        "parse_rate": _share(parsed[decoded]),
        "agreement": _share(agrees[parsed]),
    }
    pairs = _said_categories(table)
    known = sorted(set().union(*(gold for gold, _ in pairs)))
    if known:
        every = set().union(*(gold | said for gold, said in pairs))
        each = [_precision_recall_f1(*_hits(pairs, [category])) for category in known]
        result["categories"] = {
            "micro": _precision_recall_f1(*_hits(pairs, every)),
            # A category that is never said has no precision; in the mean it counts as 0, as its F1 does.
            "macro": {key: sum(numbers[key] or 0.0 for numbers in each) / len(each) for key in each[0]},
        }
    return result


def _said_categories(table: Table) -> list[tuple[set[str], set[str]]]:
    """(gold, said) of each decoded row whose gold categories are known: it has some, or is safe and has none."""
    return [
        (set(row.categories), set(row.verdict.categories) if row.verdict else set())
        for row in table.rows
        if _was_decoded(row) and (row.categories or row.label == "safe")
    ]


def _hits(pairs: Sequence[tuple[set[str], set[str]]], categories: Collection[str]) -> tuple[int, int, int]:
    """How often one of `categories` is both gold and said; gold; said."""
    chosen = set(categories)
    return (
        sum(len(gold & said & chosen) for gold, said in pairs),
        sum(len(gold & chosen) for gold, _ in pairs),
        sum(len(said & chosen) for _, said in pairs),
    )


def _precision_recall_f1(right: int, gold: int, said: int) -> dict[str, float | None]:
    return {
        "precision": right / said if said else None,
        "recall": right / gold if gold else None,
        "f1": 2 * right / (gold + said) if gold + said else None,
    }


def _was_decoded(row: Judged) -> bool:
    return row.text is not None or row.verdict is not None


def _by_frequency(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _share(flags: Flags) -> float | None:
    return float(flags.mean()) if len(flags) else None


def _plain(value: float) -> float | None:
    """A number that JSON has."""
    return float(value) if math.isfinite(value) else None


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a": 1, "b.c": 2}` → `{"a": 1, "b": {"c": 2}}`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        outer, dot, inner = name.partition(".")
        if dot:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[name] = value
    return nested


def _at(nested: Mapping[str, Any], name: str) -> Any:
    """What lies at `b.c`, or None."""
    value: Any = nested
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _check(row: Judged, first: Judged, where: str) -> None:
    """Raise where a row means nothing."""
    choices = ", ".join(SEVERITIES)
    for what, severity in (("label", row.label), ("verdict", row.verdict and row.verdict.severity)):
        if severity is not None and severity not in SEVERITIES:
            raise MegamodError(f"{where}: {what} {severity!r}: one of {choices} was expected")
    for name, value in row.scores.items():
        if name not in SEVERITIES:
            raise MegamodError(f"{where}: a score of {name!r}: one of {choices} was expected")
        if not isinstance(value, Real) or not 0 <= value <= 1 + TOLERANCE:  # the comparison is false for NaN
            raise MegamodError(f"{where}: the score of {name} is {value!r}: a probability from 0 to 1 was expected")
    if not {"safe", "unsafe"} <= set(row.scores):
        raise MegamodError(f"{where}: scores of {', '.join(row.scores) or 'nothing'}: at least safe and unsafe were expected")
    if set(row.scores) != set(first.scores):
        raise MegamodError(
            f"{where}: scores of {', '.join(row.scores)}, but of {', '.join(first.scores)} in row 0: one verdict format was expected"
        )
    if abs(sum(row.scores.values()) - 1) > TOLERANCE:
        raise MegamodError(f"{where}: the scores sum to {sum(row.scores.values()):.6g}: 1 was expected")

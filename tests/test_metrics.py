"""Metrics against scikit-learn, against the plainest code that says the same, and by hand."""

import json
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from complaints import complaint
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from megamod.evaluate import metrics
from megamod.evaluate.metrics import Judged, Reading, calibration, curve, headline, measure, tabulate
from megamod.verdicts import SEVERITIES, Severity, Verdict

pytestmark = pytest.mark.filterwarnings("error")

QUICK = settings(max_examples=60, deadline=None)
SAFE, CONTROVERSIAL, UNSAFE = SEVERITIES
READINGS: tuple[Reading, ...] = ("strict", "loose")


def judged(label: Severity | None, *scores: float, **more: Any) -> Judged:
    """A row with two or three scores."""
    keys = SEVERITIES if len(scores) == 3 else (SAFE, UNSAFE)
    return Judged(dict(zip(keys, scores, strict=True)), label, **more)


@st.composite
def some_rows(draw: st.DrawFn, most: int = 30) -> list[Judged]:
    """Rows of one verdict format. Small whole numbers, divided by their sum, make ties; floats make none."""
    keys = draw(st.sampled_from([SEVERITIES, (SAFE, UNSAFE)]))
    labels = draw(st.sampled_from([SEVERITIES, (SAFE, UNSAFE), (UNSAFE,), (SAFE, CONTROVERSIAL)]))
    number = draw(st.sampled_from([st.integers(0, 4), st.floats(1e-3, 1.0)]))
    parts = st.lists(number, min_size=len(keys), max_size=len(keys)).filter(any)
    rows = []
    for raw, label in draw(st.lists(st.tuples(parts, st.sampled_from(labels)), min_size=1, max_size=most)):
        rows.append(judged(label, *(value / sum(raw) for value in raw)))
    return rows


def random_rows(n: int, seed: int = 0, lift: float = 1.5, **more: Any) -> list[Judged]:
    """Rows of a model that is right the more often the greater `lift`."""
    rng = np.random.default_rng(seed)
    gold = rng.choice(3, n, p=[0.5, 0.3, 0.2])
    logits = rng.normal(size=(n, 3))
    logits[np.arange(n), gold] += lift
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return [judged(SEVERITIES[g], *scores, **more) for g, scores in zip(gold, p.tolist(), strict=True)]


def said(row: Judged) -> Severity:
    """The most probable severity, of equal ones the mildest."""
    best = max(row.scores.values())
    return next(s for s in SEVERITIES if row.scores.get(s) == best)


def unsafe(severity: Severity | None, reading: Reading) -> bool:
    return severity == UNSAFE or (severity == CONTROVERSIAL and reading == "strict")


def score(row: Judged, reading: Reading) -> float:
    return min(row.scores[UNSAFE] + (row.scores.get(CONTROVERSIAL, 0.0) if reading == "strict" else 0.0), 1.0)


def recall_at(gold: Sequence[bool], scores: Sequence[float], share: float) -> tuple[float, float | None]:
    """Every threshold is tried: the best recall, and the highest threshold that reaches it."""
    best: tuple[float, float | None] = (0.0, None)
    for threshold in sorted(set(scores), reverse=True):
        caught = sum(g and s >= threshold for g, s in zip(gold, scores, strict=True))
        wrong = sum(not g and s >= threshold for g, s in zip(gold, scores, strict=True))
        if wrong / (len(gold) - sum(gold)) <= share and caught / sum(gold) > best[0]:
            best = (caught / sum(gold), threshold)
    return best


def ece(gold: Sequence[bool], scores: Sequence[float]) -> float:
    total = 0.0
    for i in range(15):
        rows = [k for k, s in enumerate(scores) if min(int(s * 15), 14) == i]
        if rows:
            share = sum(gold[k] for k in rows) / len(rows)
            total += len(rows) / len(gold) * abs(share - sum(scores[k] for k in rows) / len(rows))
    return total


# ---- each number


@given(rows=some_rows())
@QUICK
def test_severities_against_scikit_learn(rows: list[Judged]) -> None:
    result = measure(rows, intervals=0)
    gold, given_ = [row.label for row in rows], [said(row) for row in rows]
    of_gold, of_said = result["confusion"]["gold"], result["confusion"]["said"]
    counts = confusion_matrix(gold, given_, labels=list(SEVERITIES))
    assert result["confusion"]["counts"] == [[counts[SEVERITIES.index(g), SEVERITIES.index(s)] for s in of_said] for g in of_gold]
    assert sum(map(sum, result["confusion"]["counts"])) == len(rows) == result["rows"] == sum(result["labels"].values())

    if CONTROVERSIAL not in gold:
        given_ = [UNSAFE if s == CONTROVERSIAL else s for s in given_]
    present = [s for s in SEVERITIES if s in gold]
    assert result["accuracy"] == pytest.approx(accuracy_score(gold, given_))
    assert result["macro_f1"] == pytest.approx(f1_score(gold, given_, labels=present, average="macro", zero_division=0))
    for severity, numbers in result["severities"].items():
        expected = precision_recall_fscore_support(gold, given_, labels=[severity], zero_division=np.nan)
        for key, value in zip(("precision", "recall", "f1"), expected, strict=False):
            assert numbers[key] == (None if math.isnan(value[0]) else pytest.approx(value[0])), key
        assert numbers["rows"] == expected[3][0]
    assert set(result["severities"]) == {SAFE, UNSAFE, *present}


@given(rows=some_rows(), reading=st.sampled_from(READINGS))
@QUICK
def test_readings_against_scikit_learn(rows: list[Judged], reading: Reading) -> None:
    result = measure(rows, intervals=0)[reading]
    gold = [unsafe(row.label, reading) for row in rows]
    flagged = [unsafe(said(row), reading) for row in rows]
    scores = [score(row, reading) for row in rows]
    (tn, fp), (fn, tp) = confusion_matrix(gold, flagged, labels=[False, True]).tolist()

    def ratio(part: float, whole: float) -> Any:
        return pytest.approx(part / whole) if whole else None

    assert result["precision"] == ratio(tp, tp + fp)
    assert result["recall"] == ratio(tp, tp + fn)
    assert result["fpr"] == ratio(fp, fp + tn)
    assert result["fnr"] == ratio(fn, tp + fn)
    assert result["f1"] == (pytest.approx(f1_score(gold, flagged, zero_division=0)) if tp + fp + fn else None)
    assert result["macro_f1"] == pytest.approx(f1_score(gold, flagged, labels=sorted(set(gold)), average="macro", zero_division=0))
    assert result["brier"] == pytest.approx(brier_score_loss(gold, scores, pos_label=True), abs=1e-12)
    assert result["ece"] == pytest.approx(ece(gold, scores), abs=1e-12)
    if len(set(gold)) == 2:
        assert result["auroc"] == pytest.approx(roc_auc_score(gold, scores))
        assert result["pr_auc"] == pytest.approx(average_precision_score(gold, scores))
        for percent in (1, 5):
            recall, threshold = recall_at(gold, scores, percent / 100)
            assert result[f"recall_at_fpr_{percent}"] == pytest.approx(recall)
            assert result[f"threshold_at_fpr_{percent}"] == threshold
    else:
        ranked = ("auroc", "pr_auc", "recall_at_fpr_1", "recall_at_fpr_5", "threshold_at_fpr_1", "threshold_at_fpr_5")
        assert [result[key] for key in ranked] == [None] * 6


@pytest.mark.parametrize(("safe", "wrong", "allowed"), [(100, 1, True), (99, 1, False), (700, 7, True), (100, 2, False)])
def test_a_false_positive_rate_of_exactly_one_percent_is_allowed(safe: int, wrong: int, allowed: bool) -> None:
    """`wrong` safe rows score as high as the unsafe ones."""
    rows = [judged(UNSAFE, 0.1, 0.9)] * 3 + [judged(SAFE, 0.1, 0.9)] * wrong + [judged(SAFE, 0.8, 0.2)] * (safe - wrong)
    result = measure(rows, intervals=0)["strict"]
    assert (result["recall_at_fpr_1"], result["threshold_at_fpr_1"]) == ((1.0, 0.9) if allowed else (0.0, None))


def test_of_thresholds_with_the_same_recall_the_highest_is_given() -> None:
    """Between 0.8 and 0.3 lie safe rows only, few enough for 5 %: flagging them would win nothing."""
    rows = [judged(UNSAFE, 0.2, 0.8)] * 2 + [judged(SAFE, 0.5, 0.5)] * 2 + [judged(SAFE, 0.9, 0.1)] * 98
    result = measure(rows, intervals=0)["loose"]
    assert (result["recall_at_fpr_5"], result["threshold_at_fpr_5"]) == (1.0, 0.8)


def test_bins_of_calibration() -> None:
    """Every bin has rows, of one label or both, and an edge belongs to the bin above it; 1 to the last."""
    scores = [*np.linspace(0, 1, 241).tolist(), *np.random.default_rng(0).random(100).tolist()]
    rows = [judged(UNSAFE if i % 3 else SAFE, 1 - p, p) for i, p in enumerate(scores)]
    gold = [row.label == UNSAFE for row in rows]
    assert measure(rows, intervals=0)["loose"]["ece"] == pytest.approx(ece(gold, scores), abs=1e-12)
    counts, mean, share = calibration(np.array(gold), np.array(scores))
    assert counts.sum() == len(rows) and (counts > 0).all()
    assert (counts * np.abs(mean - share)).sum() / len(rows) == pytest.approx(ece(gold, scores))
    counts, mean, share = calibration(np.array([True, True, False]), np.array([0.2, 1.0, 0.95]))
    assert np.flatnonzero(counts).tolist() == [3, 14]
    assert (mean[14], share[14], np.isnan(mean[0])) == (0.975, 0.5, True)


def test_small_scores_keep_their_order() -> None:
    """1 - p(safe) would be 0 for both."""
    rows = [judged(SAFE, 1.0, 1e-20, 1e-20), judged(UNSAFE, 1.0, 1e-20, 1e-18)]
    result = measure(rows, intervals=0)
    assert result["strict"]["auroc"] == result["loose"]["auroc"] == 1.0


@given(rows=some_rows(), data=st.data())
@QUICK
def test_a_weight_is_a_repetition(rows: list[Judged], data: st.DataObject) -> None:
    """What the bootstrap stands on: a row that is drawn three times counts as three rows, one never drawn as none."""
    weights = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)).filter(any))
    table = tabulate(rows)
    repeated = tabulate([row for row, weight in zip(rows, weights, strict=True) for _ in range(weight)])
    weighted = metrics._estimate(table, np.array([[1.0] * len(rows), weights]), has_controversial=True)
    plain = metrics._estimate(repeated, np.ones((1, len(repeated.rows))), has_controversial=True)
    for name, values in plain.items():
        assert weighted[name][1] == pytest.approx(values[0], nan_ok=True, abs=1e-12), name


def test_curve() -> None:
    thresholds, tp, fp = curve(np.array([True, False, True, False]), np.array([0.9, 0.5, 0.5, 0.1]))
    assert thresholds.tolist() == [0.9, 0.5, 0.1]
    assert (tp.tolist(), fp.tolist()) == ([[1, 2, 2]], [[0, 1, 2]])


# ---- by hand


HAND = [  # gold, p(safe), p(controversial), p(unsafe)
    judged(SAFE, 0.8, 0.1, 0.1, language="en"),
    judged(SAFE, 0.3, 0.6, 0.1, language="en", categories=("counter-speech",)),
    judged(CONTROVERSIAL, 0.2, 0.5, 0.3, language="zh", categories=("insult",)),
    judged(CONTROVERSIAL, 0.7, 0.2, 0.1, language="zh", categories=("insult", "threat")),
    judged(UNSAFE, 0.1, 0.1, 0.8, language="zh", categories=("threat",)),
    judged(UNSAFE, 0.1, 0.5, 0.4, categories=("threat",)),
    judged(None, 0.5, 0.4, 0.1),
]


def test_strict_and_loose_by_hand() -> None:
    result = measure(HAND, intervals=0)
    assert (result["rows"], result["unlabelled"]) == (6, 1)
    assert result["labels"] == {"safe": 2, "controversial": 2, "unsafe": 2}
    assert result["confusion"]["counts"] == [[1, 1, 0], [1, 1, 0], [0, 1, 1]]
    assert result["accuracy"] == 0.5
    assert result["macro_f1"] == pytest.approx((2 / 4 + 2 / 5 + 2 / 3) / 3)
    strict, loose = result["strict"], result["loose"]
    assert (strict["fpr"], strict["fnr"], strict["precision"]) == (1 / 2, 1 / 4, 3 / 4)
    assert (loose["fpr"], loose["fnr"], loose["precision"]) == (0, 1 / 2, 1)
    assert strict["auroc"] == 7 / 8  # of the 8 pairs, .3 (row 4) against .7 (row 2) is wrong
    assert loose["auroc"] == 1
    assert (strict["recall_at_fpr_5"], loose["recall_at_fpr_5"]) == (3 / 4, 1)
    assert list(result["languages"]) == ["zh", "en"]
    assert result["languages"]["en"]["strict"]["fpr"] == 1 / 2
    assert result["languages"]["en"]["strict"]["auroc"] is None
    assert result["categories"] == {
        "threat": {"rows": 3, "strict": {"recall": 2 / 3, "fpr": None}, "loose": {"recall": 1 / 2, "fpr": 0}},
        "insult": {"rows": 2, "strict": {"recall": 1 / 2, "fpr": None}, "loose": {"recall": None, "fpr": 0}},
        "counter-speech": {"rows": 1, "strict": {"recall": None, "fpr": 1}, "loose": {"recall": None, "fpr": 0}},
    }
    assert "decoded" not in result
    assert "intervals" not in result


def test_gold_without_controversial() -> None:
    """The model's controversial is unsafe in accuracy, apart in the confusion, and both in the readings."""
    result = measure([judged(SAFE, 0.2, 0.7, 0.1), judged(UNSAFE, 0.1, 0.6, 0.3), judged(SAFE, 1, 0, 0)], intervals=0)
    assert result["accuracy"] == 2 / 3
    assert result["confusion"] == {"gold": ["safe", "unsafe"], "said": list(SEVERITIES), "counts": [[1, 1, 0], [0, 1, 0]]}
    assert set(result["severities"]) == {"safe", "unsafe"}
    assert result["macro_f1"] == result["strict"]["macro_f1"] == pytest.approx(2 / 3)
    assert (result["strict"]["fnr"], result["loose"]["fnr"]) == (0, 1)


def test_two_severities_make_the_readings_coincide() -> None:
    rows = [judged(label, p, 1 - p) for label, p in zip((SAFE, UNSAFE) * 20, np.linspace(0, 1, 40).tolist(), strict=True)]
    result = measure(rows, intervals=20)
    assert result["strict"] == result["loose"]
    assert result["intervals"]["strict"] == result["intervals"]["loose"]
    assert result["macro_f1"] == result["strict"]["macro_f1"]
    assert [name for name, _ in headline(result)][:4] == ["rows", "accuracy", "macro-F1", "F1 of unsafe"]


def test_decoded() -> None:
    def row(label: Severity, gold: tuple[str, ...], severity: Severity | None, *categories: str) -> Judged:
        verdict = Verdict(severity, categories) if severity else None
        scores = (0.9, 0.1) if label == SAFE else (0.2, 0.8)
        return judged(label, *scores, categories=gold, verdict=verdict, text="x")

    rows = [
        row(UNSAFE, ("A", "B"), UNSAFE, "A"),
        row(UNSAFE, ("A",), SAFE),  # agrees not with the scores
        row(UNSAFE, ("B",), None),  # did not parse: names no category
        row(SAFE, (), UNSAFE, "C"),  # a category of no gold row, and a severity that the scores have not
        row(UNSAFE, (), UNSAFE, "B"),  # which category it has is not known
        judged(UNSAFE, 0.1, 0.9, categories=("A",)),  # not decoded
    ]
    result = measure(rows, intervals=0)
    assert result["decoded"] == {
        "rows": 5,
        "parse_rate": 4 / 5,
        "agreement": 2 / 4,
        "categories": {
            "micro": {"precision": 1 / 2, "recall": 1 / 4, "f1": 2 / 6},
            "macro": {"precision": 1 / 2, "recall": 1 / 4, "f1": (2 / 3 + 0) / 2},
        },
    }
    assert result["categories"]["A"]["said"] == {"precision": 1, "recall": 1 / 2, "f1": 2 / 3}
    assert result["categories"]["B"]["said"] == {"precision": None, "recall": 0, "f1": 0}
    assert ("parse rate", "0.800") in headline(result)


def test_decoded_without_categories_or_parsed_text() -> None:
    result = measure([judged(SAFE, 0.9, 0.1, text="hm")], intervals=0)
    assert result["decoded"] == {"rows": 1, "parse_rate": 0, "agreement": None}


# ---- intervals


def test_intervals() -> None:
    small, large = (measure(random_rows(n), intervals=300, seed=1) for n in (200, 3200))
    assert measure(random_rows(200), intervals=300, seed=1) == small
    assert measure(random_rows(200), intervals=300, seed=2)["intervals"] != small["intervals"]
    for name in metrics.HEADLINE:
        (low, high), estimate = metrics._at(small["intervals"], name), metrics._at(small, name)
        narrow = metrics._at(large["intervals"], name)
        # A quarter of the width, were the errors normal; recall at an FPR of 1 % hangs on one safe row of the 100.
        assert narrow[1] - narrow[0] < (1.0 if "recall" in name else 0.5) * (high - low), name
        if "ece" not in name:  # whose resamples lean upwards
            assert low <= estimate <= high, name
    low, high = large["intervals"]["accuracy"]
    accuracy = large["accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(accuracy * (1 - accuracy) / 3200), rel=0.12)
    low, high = large["intervals"]["strict"]["threshold_at_fpr_5"]
    assert low <= large["strict"]["threshold_at_fpr_5"] <= high


def test_intervals_do_not_depend_on_how_many_resamples_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(50)
    whole = measure(rows, intervals=30)
    monkeypatch.setattr(metrics, "CELLS", 50 * 7)
    parts = measure(rows, intervals=30)
    for name in metrics.HEADLINE:
        assert metrics._at(whole["intervals"], name) == pytest.approx(metrics._at(parts["intervals"], name)), name


@given(rows=some_rows(most=8))
@QUICK
def test_tiny_sets_are_json(rows: list[Judged]) -> None:
    result = measure(rows, intervals=10)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for name in ("strict.auroc", "loose.recall_at_fpr_1"):
        if metrics._at(result, name) is None:
            assert metrics._at(result["intervals"], name) is None
    assert all(isinstance(value, str) for _, value in headline(result))


def test_five_thousand_rows_are_quick() -> None:
    rows = random_rows(5000)
    start = time.process_time()  # others may keep the machine busy
    measure(rows)
    assert time.process_time() - start < 15


# ---- errors


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (judged(SAFE, 0.5, 0.6), ["row 1", "sum to 1.1"]),
        (judged(SAFE, math.nan, 0.6), ["row 1", "safe", "nan"]),
        (judged(None, math.inf, 0.6), ["row 1", "safe", "inf"]),
        (judged(SAFE, -0.1, 1.1), ["row 1", "safe", "-0.1"]),
        (judged("toxic", 0.5, 0.5), ["row 1", "label 'toxic'", "controversial"]),  # type: ignore[arg-type]
        (judged(SAFE, 0.5, 0.5, verdict=Verdict("bad")), ["row 1", "verdict 'bad'"]),  # type: ignore[arg-type]
        (Judged({"safe": 0.5, "toxic": 0.5}, SAFE), ["row 1", "'toxic'"]),  # type: ignore[dict-item]
        (Judged({"safe": "high", "unsafe": 0.5}, SAFE), ["row 1", "'high'"]),  # type: ignore[dict-item]
        (Judged({"safe": 1.0}, SAFE), ["row 1", "at least safe and unsafe"]),
        (Judged({}, SAFE), ["row 1", "nothing"]),
        (judged(SAFE, 0.5, 0.3, 0.2), ["row 1", "row 0", "one verdict format"]),
    ],
)
def test_rows_that_mean_nothing(row: Judged, words: list[str]) -> None:
    text = complaint(lambda: measure([judged(SAFE, 0.5, 0.5), row]))
    assert all(word in text for word in words), text


def test_nothing_to_measure() -> None:
    assert "none of 0 rows" in complaint(lambda: measure([]))
    assert "none of 2 rows has a gold label" in complaint(lambda: measure([judged(None, 0.5, 0.5)] * 2))
    assert "intervals = -1" in complaint(lambda: measure(HAND, intervals=-1))


def test_scores_in_half_precision_pass() -> None:
    rows = [Judged({SAFE: np.float32(0.3335), UNSAFE: np.float32(0.667)}, UNSAFE)]  # type: ignore[dict-item]
    assert measure(rows, intervals=0)["accuracy"] == 1.0

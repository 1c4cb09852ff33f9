"""The linear baseline: TF-IDF and logistic regression, the figure that a trained model has to reach."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from megamod.errors import MegamodError, nearest
from megamod.verdicts import SEVERITIES, Severity

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Languages = Sequence[str | None] | None

CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")
CJK_LANGUAGES = ("zh", "ja", "ko")


@dataclass(frozen=True)
class Features:
    """One set of n-grams, taken of the texts with CJK characters or of those without."""

    analyzer: str
    lengths: tuple[int, int]
    cjk: bool


FEATURES = (Features("word", (1, 2), cjk=False), Features("char", (2, 5), cjk=False), Features("char", (1, 3), cjk=True))


def linear_baseline(
    train_texts: Sequence[str],
    train_labels: Sequence[Severity],
    train_languages: Languages,
    test_texts: Sequence[str],
    test_languages: Languages,
    *,
    seed: int = 0,
    C: float = 2.0,
) -> Floats:
    """Probabilities of the test texts, [n, 3] in the order of SEVERITIES; a severity that was not trained gets 0.

    Words 1–2 and characters 2–5 of a text without CJK characters, characters 1–3 of one with them, those that occur in two texts
    or more. Severities weigh alike in training, as they do in macro-F1.

    Args:
        train_languages, test_languages: zh, ja and ko have CJK characters. None, for all or for one: see the text.
        seed: of the solver.
        C: the inverse of the regularisation's strength.

    Raises:
        MegamodError: no text to train on, columns of different lengths, or an unknown label.
    """
    if not train_texts or len(train_texts) != len(train_labels):
        raise MegamodError(f"{len(train_texts)} texts and {len(train_labels)} labels to train on: one label for each text was expected")
    if strange := set(train_labels) - set(SEVERITIES):
        raise MegamodError(f"unknown label {min(strange)!r}, {nearest(min(strange), SEVERITIES)}")
    trained = sorted(set(train_labels), key=SEVERITIES.index)
    train_cjk, test_cjk = _cjk(train_texts, train_languages), _cjk(test_texts, test_languages)
    scores = np.zeros((len(test_texts), len(SEVERITIES)))
    columns = [SEVERITIES.index(label) for label in trained]
    if len(trained) == 1 or not test_texts:
        scores[:, columns] = 1.0
        return scores
    pairs = [pair for f in FEATURES if (pair := _tfidf(f, train_texts, train_cjk, test_texts, test_cjk)) is not None]
    if not pairs:
        raise MegamodError(f"{len(train_texts)} texts to train on: no words or characters that two of them share")
    train, test = (sparse.hstack(parts, format="csr") for parts in zip(*pairs, strict=True))
    model = LogisticRegression(C=C, class_weight="balanced", max_iter=1000, tol=1e-4, random_state=seed)
    model.fit(train, [trained.index(label) for label in train_labels])
    scores[:, columns] = model.predict_proba(test)
    return scores


def _cjk(texts: Sequence[str], languages: Languages) -> Flags:
    """Which texts count as having CJK characters."""
    languages = [None] * len(texts) if languages is None else languages
    if len(languages) != len(texts):
        raise MegamodError(f"{len(texts)} texts, but {len(languages)} languages: one for each text, or None, was expected")
    both = zip(texts, languages, strict=True)
    return np.array([bool(CJK.search(t)) if lang is None else lang in CJK_LANGUAGES for t, lang in both], dtype=np.bool_)


def _tfidf(features: Features, train: Sequence[str], train_cjk: Flags, test: Sequence[str], test_cjk: Flags) -> tuple[Any, Any] | None:
    """Rows of the training and the test texts, empty where a text is of the other script. None: no n-gram that two texts share."""
    # float32 halves the memory; n-grams of one text only would be most of the columns, and teach nothing that transfers.
    vectorizer = TfidfVectorizer(analyzer=features.analyzer, ngram_range=features.lengths, min_df=2, sublinear_tf=True, dtype=np.float32)
    ours = [text for text, cjk in zip(train, train_cjk, strict=True) if cjk == features.cjk]
    if len(ours) < 2:
        return None
    try:
        vectorizer.fit(ours)
    except ValueError:  # scikit-learn's word for an empty vocabulary
        return None
    rows = []
    for texts, flags in ((train, train_cjk), (test, test_cjk)):
        rows.append(vectorizer.transform([t if cjk == features.cjk else "" for t, cjk in zip(texts, flags, strict=True)]))
    return rows[0], rows[1]

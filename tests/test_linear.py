"""The linear baseline: columns in the order of the severities, each script with its n-grams, better than the majority."""

import numpy as np
import pytest
from complaints import complaint

from megamod.data.bilingual import Row, generate
from megamod.evaluate.linear import Floats, linear_baseline
from megamod.verdicts import SEVERITIES, Severity

SAFE = ["a lovely day in the park", "the park is lovely", "what a lovely park", "今天天气很好", "天气真好啊", "天气好，出去走走"]
RUDE = ["you are a fool", "such a fool you are", "only a fool says so", "你是个笨蛋", "真是笨蛋", "笨蛋才这么说"]
THREAT = ["i will hurt you", "wait, i will hurt him", "we will hurt them", "我要打断他的腿", "打断你的腿", "小心被打断腿"]
LABELS: list[Severity] = [*["safe"] * 6, *["controversial"] * 6, *["unsafe"] * 6]  # type: ignore[list-item]
TEST = ["lovely park", "天气好", "a fool", "大笨蛋", "hurt her", "打断腿"]


def texts(rows: list[Row]) -> list[str]:
    return ["\n".join(message["content"] for message in row["messages"]) for row in rows]


def small(**keywords: float) -> Floats:
    return linear_baseline(SAFE + RUDE + THREAT, LABELS, None, TEST, None, **keywords)  # type: ignore[arg-type]


def test_probabilities_in_the_order_of_the_severities() -> None:
    scores = small()
    assert scores.shape == (6, 3)
    np.testing.assert_allclose(scores.sum(1), 1)
    assert [SEVERITIES[i] for i in scores.argmax(1)] == ["safe", "safe", "controversial", "controversial", "unsafe", "unsafe"]


def test_the_order_of_training_does_not_move_columns() -> None:
    scores = linear_baseline((SAFE + RUDE + THREAT)[::-1], LABELS[::-1], None, TEST, None)
    np.testing.assert_allclose(scores, small(), atol=1e-3)


def test_a_severity_that_was_not_trained_gets_nothing() -> None:
    scores = linear_baseline(SAFE + THREAT, LABELS[:6] + LABELS[12:], None, TEST, None)
    assert not scores[:, 1].any()
    np.testing.assert_allclose(scores.sum(1), 1)
    assert scores[5].argmax() == 2
    np.testing.assert_array_equal(linear_baseline(RUDE, LABELS[6:12], None, TEST, None), np.tile([0.0, 1.0, 0.0], (6, 1)))


def test_languages_say_what_the_texts_say() -> None:
    train, test = ["en", "en", "en", "zh", "zh", "zh"] * 3, ["en", "zh"] * 3
    np.testing.assert_array_equal(linear_baseline(SAFE + RUDE + THREAT, LABELS, train, TEST, test), small())
    np.testing.assert_array_equal(linear_baseline(SAFE + RUDE + THREAT, LABELS, [None, *train[1:]], TEST, test), small())


@pytest.mark.parametrize("first", [0, 3])
def test_one_language_alone(first: int) -> None:
    chosen = [i for i in range(18) if (i % 6) // 3 == first // 3]
    scores = linear_baseline([(SAFE + RUDE + THREAT)[i] for i in chosen], [LABELS[i] for i in chosen], None, TEST, None)
    assert scores[first // 3 :: 2].argmax(1).tolist() == [0, 1, 2]


def test_no_text_to_judge() -> None:
    assert linear_baseline(SAFE + RUDE, LABELS[:12], None, [], None).shape == (0, 3)


def test_the_same_twice() -> None:
    np.testing.assert_array_equal(small(seed=3), small(seed=3))


def test_stronger_regularisation_is_less_sure() -> None:
    assert small(C=0.01).max() < small(C=10.0).max()


def test_better_than_the_majority() -> None:
    train, held_out = generate(1200, 300, seed=2)
    gold = np.array([SEVERITIES.index(row["label"]) for row in held_out])
    scores = linear_baseline(texts(train), [row["label"] for row in train], None, texts(held_out), None)
    assert (scores.argmax(1) == gold).mean() > max(np.bincount(gold)) / len(gold) + 0.15


def test_complaints() -> None:
    assert "0 texts and 0 labels" in complaint(lambda: linear_baseline([], [], None, [], None))
    assert "2 texts and 1 labels" in complaint(lambda: linear_baseline(["a", "b"], ["safe"], None, [], None))
    assert "did you mean 'unsafe'?" in complaint(lambda: linear_baseline(SAFE[:2], ["safe", "unsave"], None, TEST, None))  # type: ignore[list-item]
    assert "6 texts, but 1 languages" in complaint(lambda: linear_baseline(SAFE[:2], ["safe", "unsafe"], None, TEST, ["en"]))
    assert "two of them share" in complaint(lambda: linear_baseline(["xyz", "uvw"], ["safe", "unsafe"], None, TEST, None))

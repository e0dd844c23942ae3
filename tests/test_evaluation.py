"""Metrics against scikit-learn's, the bootstrap against theory, and what is said of each class."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluation


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    labels = torch.tensor(rng.integers(0, 7, 400))
    return torch.tensor(rng.normal(size=(400, 7))) + F.one_hot(labels, 7), labels


def ranking(logits, labels):
    return evaluation.collect_ranking(evaluation.rank_classes(logits), labels)


def test_metrics_equal_scikit_learns(scores):
    from sklearn import metrics as sk  # here, as it takes each process of pytest seconds

    logits, labels = scores
    r, best = ranking(logits, labels), logits.argmax(1)
    acc1 = 100 * sk.accuracy_score(labels, best)
    acc5 = 100 * sk.top_k_accuracy_score(labels, logits, k=5)
    assert evaluation.top1(r) == pytest.approx(acc1)
    assert evaluation.top5(r) == pytest.approx(acc5)
    assert evaluation.mean_top1_top5(r) == pytest.approx((acc1 + acc5) / 2)
    balanced = 100 * sk.balanced_accuracy_score(labels, best)
    assert evaluation.mean_per_class(r) == pytest.approx(balanced)
    two = labels < 2
    auc = 100 * sk.roc_auc_score(labels[two], (logits[:, 1] - logits[:, 0])[two])
    assert evaluation.roc_auc(r.of(two)) == pytest.approx(auc)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_seen_in_the_margin(scores, value):
    logits, labels = scores[0][:2].clone(), scores[1][:2]
    logits[0, 6] = value  # neither of class 0 nor of 1
    assert ranking(logits, labels).margin.isfinite().tolist() == [False, True]
    assert torch.equal(ranking(logits, labels).margin[1], logits[1, 1] - logits[1, 0])


def test_every_protocol_metric_has_its_sets():
    assert {name: metric.__name__ for name, metric in evaluation.METRICS.items()} == {
        **dict.fromkeys(("aircraft", "pets", "caltech101", "flowers"), "mean_per_class"),
        "kinetics700_frames": "mean_top1_top5",
        "hateful_memes": "roc_auc",
    }


def test_few_classes():
    one = ranking(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
    assert evaluation.top1(one) == evaluation.top5(one) == 100
    two = ranking(torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([1, 1]))
    assert evaluation.top1(two) == 50 and evaluation.top5(two) == 100


def test_fewer_candidates_than_places():
    scores = torch.tensor([[-3.0, -1, 9, -2, 0, 8]])
    candidates = torch.tensor([[True, True, False, True, False, False]])
    found = evaluation.rank_classes(scores, candidates)
    assert found.tolist() == [[1, 3, 0, -1, -1, 2]]  # and the margin of classes 1 and 0
    ranked = evaluation.collect_ranking(found.expand(3, -1), torch.tensor([1, 0, 2]))
    assert evaluation.top1(ranked) == pytest.approx(100 / 3)
    assert evaluation.top5(ranked) == pytest.approx(200 / 3)
    assert evaluation.mean_top1_top5(ranked) == pytest.approx(50)


def test_class_numbers_survive_half_precision():
    scores = torch.zeros(1, 1000, dtype=torch.bfloat16)
    scores[0, 999], scores[0, 513] = 2, 1
    assert evaluation.rank_classes(scores)[0, :2].tolist() == [999, 513]


def test_the_interval_is_that_of_a_proportion(scores):
    r = ranking(*scores)
    low, high = evaluation.bootstrap_interval(evaluation.top1, r)
    p = evaluation.top1(r) / 100
    half = 100 * 1.96 * math.sqrt(p * (1 - p) / len(r.labels))
    assert high - low == pytest.approx(2 * half, rel=0.1)
    assert low < evaluation.top1(r) < high
    assert evaluation.bootstrap_interval(evaluation.top1, r) == [low, high]


def test_the_area_under_the_curve_has_an_interval_for_very_few_images():
    r = ranking(torch.tensor([[0.0, 1], [1, 0], [0, 2]]), torch.tensor([1, 0, 0]))
    low, high = evaluation.bootstrap_interval(evaluation.roc_auc, r, 50)
    assert 0 <= low <= high <= 100


def test_classes_and_confused_pairs():
    labels = torch.tensor([0, 0, 0, 1, 1, 3])
    predicted = torch.tensor([0, 1, 1, 1, 3, 3])
    r = ranking(F.one_hot(predicted, 4).double(), labels)
    got = evaluation.details("x", r, ["a", "b", "c", "d"])
    assert got["per_class"] == {"a": pytest.approx(100 / 3), "b": 50.0, "d": 100.0}
    assert got["confused"] == [["a", "b", 2], ["b", "d", 1]]
    assert evaluation.display_names(["crane", ["cat", "kitten"], "crane"]) == [
        "crane (0)",
        "cat",
        "crane (2)",
    ]

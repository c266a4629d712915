"""The metrics on many inputs: against scikit-learn, torchmetrics and a slow reading of the definitions, and every invariance."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from cadm_paper.metrics import MultiLabelMetrics, average_precision, metric_names, multilabel_metrics

CHECKED = settings(max_examples=60, deadline=None)


@st.composite
def evaluations(draw, ignored=True, ties=None):
    """Scores and labels N x C: few or many ties, rare or frequent labels, with or without ignored ones, float32 or float64."""
    n, c, seed = draw(st.integers(1, 30)), draw(st.integers(1, 9)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    levels = draw(st.sampled_from([2, 4, 10, 10**6])) if ties is None else 10 if ties else 10**9
    scores = rng.integers(0, levels + 1, (n, c)) / levels
    targets = (rng.random((n, c)) < draw(st.sampled_from([0.05, 0.3, 0.8]))).astype(np.int8)
    if ignored and draw(st.booleans()):
        targets[rng.random((n, c)) < 0.2] = -1
    return scores.astype(draw(st.sampled_from([np.float32, np.float64]))), targets


def slow_metrics(scores, targets, threshold=0.5, k=3):
    """The 13 numbers by loops over images and classes, straight from the definitions."""
    n, c = scores.shape
    threshold = scores.dtype.type(threshold)
    known = targets >= 0
    top = np.zeros((n, c), bool)
    for i in range(n):
        order = sorted((j for j in range(c) if known[i, j]), key=lambda j: (-scores[i, j], j))
        top[i, order[:k]] = True
    given = {"": known & (scores > threshold), f"_top{k}": top & (scores > threshold)}
    aps = []
    for j in range(c):
        hits = [i for i in range(n) if targets[i, j] == 1]
        terms = [
            sum(targets[m, j] == 1 for m in range(n) if scores[m, j] >= scores[i, j])
            / sum(known[m, j] for m in range(n) if scores[m, j] >= scores[i, j])
            for i in hits
        ]
        aps += [math.fsum(terms) / len(hits)] if hits else []
    mean = lambda values: math.fsum(values) / len(values) if values else 0.0
    divide = lambda a, b: a / b if b else 0.0
    f1 = lambda p, r: divide(2 * p * r, p + r)
    found = {"mAP": mean(aps)}
    for rule, predicted in given.items():
        correct, positive = predicted & (targets == 1), targets == 1
        occurs = [j for j in range(c) if positive[:, j].any()]
        cp = mean([divide(correct[:, j].sum(), predicted[:, j].sum()) for j in occurs])
        cr = mean([divide(correct[:, j].sum(), positive[:, j].sum()) for j in occurs])
        op, orec = divide(correct.sum(), predicted.sum()), divide(correct.sum(), positive.sum())
        found |= {
            f"{key}{rule}": v
            for key, v in dict(CP=cp, CR=cr, CF1=f1(cp, cr), OP=op, OR=orec, OF1=f1(op, orec)).items()
        }
    return found


@CHECKED
@given(evaluations(), st.sampled_from([0.0, 0.25, 0.5, 0.9]), st.integers(1, 11))
def test_definitions(data, threshold, k):
    ours, slow = multilabel_metrics(*data, threshold, k), slow_metrics(*data, threshold, k)
    assert list(ours)[:13] == list(slow) == list(metric_names(k))
    assert all(abs(ours[key] - slow[key]) < 1e-12 for key in slow)
    assert all(math.isfinite(value) and 0 <= value <= 1 for value in ours.values())


@pytest.mark.parametrize("ties", [False, True])
@CHECKED
@given(data=st.data())
def test_ap_is_scikit_learns(ties, data):
    scores, targets = data.draw(evaluations(ignored=False, ties=ties))
    for c, ap in enumerate(average_precision(scores.astype(np.float64), targets)):
        if targets[:, c].any():
            assert abs(ap - average_precision_score(targets[:, c], scores[:, c].astype(np.float64))) < 1e-9
        else:
            assert np.isnan(ap)


@settings(max_examples=20, deadline=None)
@given(evaluations(), st.sampled_from([0.25, 0.5]))
def test_torchmetrics_where_definitions_coincide(data, threshold):
    """All classes occur and every class is given and absent somewhere: then torchmetrics' macro means are ours."""
    from torchmetrics.functional.classification import (
        multilabel_average_precision,
        multilabel_f1_score,
        multilabel_precision,
        multilabel_recall,
    )

    scores, targets = (np.repeat(x, 2, axis=1) for x in data)  # it wants two classes at least
    c = scores.shape[1]
    scores = np.concatenate([scores, np.full((2, c), 0.9, scores.dtype)]).astype(np.float64)
    targets = np.concatenate([targets, np.ones((1, c), np.int8), np.zeros((1, c), np.int8)])
    ours, more = multilabel_metrics(scores, targets, threshold), dict(num_labels=c, ignore_index=-1)
    arrays = torch.from_numpy(scores), torch.from_numpy(targets).long()
    theirs = {"mAP": multilabel_average_precision(*arrays, average="macro", **more)}
    for name, function in (
        ("P", multilabel_precision),
        ("R", multilabel_recall),
        ("F1", multilabel_f1_score),
    ):
        theirs["CF1_mean" if name == "F1" else f"C{name}"] = function(
            *arrays, threshold=threshold, average="macro", **more
        )
        theirs[f"O{name}"] = function(*arrays, threshold=threshold, average="micro", **more)
    assert all(
        abs(ours[name] - float(value)) < 1e-6 for name, value in theirs.items()
    )  # torchmetrics divides in float32


@CHECKED
@given(evaluations(), st.integers(0, 2**32 - 1))
def test_order_and_division_of_images_do_not_matter(data, seed):
    scores, targets = data
    order = np.random.default_rng(seed).permutation(len(scores))
    parts = [MultiLabelMetrics() for _ in range(3)]
    for position, i in enumerate(order):
        parts[position % 3].update(scores[i : i + 1], targets[i : i + 1])
    whole = MultiLabelMetrics()
    for part in pickle.loads(pickle.dumps(parts)):  # what crosses between processes
        whole.merge(part)
    assert whole.compute() == multilabel_metrics(scores, targets)


@CHECKED
@given(evaluations(), st.integers(0, 2**32 - 1))
def test_order_of_classes_matters_only_in_ties_of_top_k(data, seed):
    scores, targets = data
    order = np.random.default_rng(seed).permutation(scores.shape[1])
    tied = any(len(set(row)) < len(row) for row in scores.tolist())
    before, after = (
        multilabel_metrics(scores, targets),
        multilabel_metrics(scores[:, order], targets[:, order]),
    )
    assert all(abs(before[key] - after[key]) < 1e-12 for key in before if not (tied and "top3" in key))
    assert np.array_equal(
        average_precision(scores, targets)[order],
        average_precision(scores[:, order], targets[:, order]),
        equal_nan=True,
    )


@CHECKED
@given(evaluations(), st.integers(0, 2**32 - 1))
def test_what_is_scored_for_an_ignored_label_does_not_matter(data, seed):
    scores, targets = data
    other = np.where(targets < 0, np.random.default_rng(seed).random(scores.shape), scores).astype(
        scores.dtype
    )
    assert multilabel_metrics(scores, targets) == multilabel_metrics(other, targets)


@CHECKED
@given(evaluations())
def test_torch_and_float16_inputs(data):
    scores, targets = data
    half = scores.astype(np.float16)
    expected = multilabel_metrics(half.astype(np.float32), targets)
    assert multilabel_metrics(torch.from_numpy(half), torch.from_numpy(targets)) == expected
    assert multilabel_metrics(torch.from_numpy(half.astype(np.float32)), targets.astype(float)) == expected


def test_streaming_keeps_its_inputs_and_its_answers():
    rng = np.random.default_rng(0)
    scores, targets = rng.random((20, 4)), rng.integers(-1, 2, (20, 4)).astype(np.int8)
    meter, expected = MultiLabelMetrics(), multilabel_metrics(scores, targets)
    meter.update(scores, targets)
    scores[:], targets[:] = 0.5, 0  # the caller's buffer is reused
    twice = MultiLabelMetrics().merge(meter).merge(meter)
    assert meter.compute() == expected and (len(meter), len(twice)) == (20, 40)
    meter.reset()
    assert (len(meter), len(twice)) == (0, 40)


@pytest.mark.parametrize(
    "scores, targets, says",
    [
        (np.zeros((2, 3, 1)), np.zeros((2, 3)), "not of shape (2, 3, 1)"),
        (np.zeros((2, 3)), np.zeros((3, 2)), "targets have the shape (3, 2) and scores (2, 3)"),
        (np.zeros((2, 0)), np.zeros((2, 0)), "not of shape (2, 0)"),
        (np.zeros((0, 3)), np.zeros((0, 3)), "no images"),
        (np.array([["a"]]), np.zeros((1, 1)), "scores must be numbers"),
        (np.array([[0.5]]), np.array([["a"]]), "targets must be numbers"),
        (np.array([[0.5, np.nan]]), np.zeros((1, 2)), "scores[0, 1] is nan"),
        (np.array([[np.inf]]), np.zeros((1, 1)), "scores[0, 0] is inf"),
        (np.array([[-1e-9]]), np.zeros((1, 1)), "scores[0, 0] is -1e-09"),
        (np.array([[0.5]]), np.array([[-2]]), "targets[0, 0] is -2"),
        (np.array([[0.5]]), np.array([[255]], np.uint8), "targets[0, 0] is 255"),
        (np.array([[0.5]]), np.array([[np.nan]]), "targets[0, 0] is nan"),
    ],
)
def test_bad_input_gets_one_line(scores, targets, says):
    with pytest.raises(ValueError) as error:
        multilabel_metrics(scores, targets)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_meters_that_do_not_fit_are_not_merged():
    a, b = MultiLabelMetrics(), MultiLabelMetrics()
    a.update([[0.5]], [[1]])
    b.update([[0.5, 0.5]], [[1, 0]])
    for bad, says in (
        (lambda: a.merge(b), "1 and 2 classes"),
        (lambda: a.update([[0.5, 0.5]], [[1, 0]]), "has 2 classes"),
        (lambda: a.merge(MultiLabelMetrics(k=5)), "k 5"),
        (lambda: MultiLabelMetrics().compute(), "no batch"),
    ):
        with pytest.raises(ValueError, match=says):
            bad()
    assert len(a) == 1

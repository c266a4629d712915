"""The metrics on many inputs: against scikit-learn, torchmetrics and slow loops, and their invariances."""

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
    """Scores and labels N x C: few or many ties, rare or frequent labels, some ignored, float32 or float64."""
    n, c, seed = draw(st.integers(1, 30)), draw(st.integers(1, 9)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    levels = draw(st.sampled_from([2, 4, 10, 10**6])) if ties is None else 10 if ties else 10**9
    scores = rng.integers(0, levels + 1, (n, c)) / levels
    targets = (rng.random((n, c)) < draw(st.sampled_from([0.05, 0.3, 0.8]))).astype(np.int8)
    if ignored and draw(st.booleans()):
        targets[rng.random((n, c)) < 0.2] = -1
    targets[rng.integers(n), rng.integers(c)] = 1  # an evaluation needs a present label
    return scores.astype(draw(st.sampled_from([np.float32, np.float64]))), targets


def slow_metrics(scores, targets, threshold=0.5, k=3):
    """The 13 metrics by loops over images and classes, from the definitions."""
    (n, c), known, positive = scores.shape, targets >= 0, targets == 1
    top, aps, threshold = np.zeros((n, c), bool), [], scores.dtype.type(threshold)
    for i in range(n):
        order = sorted((j for j in range(c) if known[i, j]), key=lambda j: (-scores[i, j], j))
        top[i, order[:k]] = True
    for j in range(c):
        above = [[m for m in range(n) if scores[m, j] >= scores[i, j]] for i in range(n) if positive[i, j]]
        terms = [sum(positive[m, j] for m in a) / sum(known[m, j] for m in a) for a in above]
        aps += [math.fsum(terms) / len(terms)] if terms else []
    mean = lambda values: math.fsum(values) / len(values) if values else 0.0
    divide = lambda a, b: a / b if b else 0.0
    f1 = lambda p, r: divide(2 * p * r, p + r)
    found, occurs = {"mAP": mean(aps)}, [j for j in range(c) if positive[:, j].any()]
    for rule, candidates in (("", known), (f"_top{k}", top)):
        given = candidates & (scores > threshold)
        right = given & positive
        cp = mean([divide(right[:, j].sum(), given[:, j].sum()) for j in occurs])
        cr = mean([divide(right[:, j].sum(), positive[:, j].sum()) for j in occurs])
        op, orec = divide(right.sum(), given.sum()), divide(right.sum(), positive.sum())
        six = dict(CP=cp, CR=cr, CF1=f1(cp, cr), OP=op, OR=orec, OF1=f1(op, orec))
        found |= {f"{key}{rule}": value for key, value in six.items()}
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
def test_torchmetrics_if_definitions_coincide(data, threshold):
    """If every class is present, absent and predicted somewhere, torchmetrics' macro means are ours."""
    from torchmetrics.functional import classification as theirs

    scores, targets = (np.repeat(x, 2, axis=1) for x in data)  # it needs at least two classes
    c = scores.shape[1]
    scores = np.concatenate([scores, np.full((2, c), 0.9, scores.dtype)]).astype(np.float64)
    targets = np.concatenate([targets, np.ones((1, c), np.int8), np.zeros((1, c), np.int8)])
    arrays = torch.from_numpy(scores), torch.from_numpy(targets).long()
    ours, more = multilabel_metrics(scores, targets, threshold), dict(num_labels=c, ignore_index=-1)
    expected = {"mAP": theirs.multilabel_average_precision(*arrays, average="macro", **more)}
    for ours_, name in (("P", "precision"), ("R", "recall"), ("F1", "f1_score")):
        function = getattr(theirs, f"multilabel_{name}")
        of_class = "CF1_mean" if ours_ == "F1" else f"C{ours_}"
        for key, average in ((of_class, "macro"), (f"O{ours_}", "micro")):
            expected[key] = function(*arrays, threshold=threshold, average=average, **more)
    # torchmetrics divides in float32
    assert {key: ours[key] for key in expected} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, abs=1e-6
    )


@CHECKED
@given(evaluations(), st.integers(0, 2**32 - 1))
def test_order_and_division_of_images_do_not_matter(data, seed):
    scores, targets = data
    parts, whole = [MultiLabelMetrics() for _ in range(3)], MultiLabelMetrics()
    for position, i in enumerate(np.random.default_rng(seed).permutation(len(scores))):
        batch = scores[i : i + 1].copy(), targets[i : i + 1]
        parts[position % 3].update(*batch)
        batch[0][:] = 0.5  # the caller's buffer is reused
    for part in pickle.loads(pickle.dumps(parts)):  # as between processes
        whole.merge(part)
    assert whole.compute() == multilabel_metrics(scores, targets) and len(whole) == len(scores)


@CHECKED
@given(evaluations())
def test_torch_and_float16_inputs(data):
    half, targets = data[0].astype(np.float16), data[1]
    expected = multilabel_metrics(half.astype(np.float32), targets)
    for scores in (torch.from_numpy(half), torch.from_numpy(half).requires_grad_(), half):
        assert multilabel_metrics(scores, torch.from_numpy(targets)) == expected


@pytest.mark.parametrize(
    "scores, targets, says",
    [
        (np.zeros((2, 3, 1)), np.zeros((2, 3)), "not of shape (2, 3, 1)"),
        (np.zeros((2, 3)), np.zeros((3, 2)), "targets have the shape (3, 2) and scores (2, 3)"),
        (np.zeros((2, 0)), np.zeros((2, 0)), "not of shape (2, 0)"),
        (np.zeros((0, 3)), np.zeros((0, 3)), "no images"),
        (np.full((2, 3), 0.5), np.zeros((2, 3)), "no label of 2 images is present"),
        (np.full((2, 3), 0.5), np.full((2, 3), -1), "nothing to evaluate"),
        (np.full((1, 2), 0.5), np.ma.masked_array([[1, 0]], [[0, 1]]), "targets has masked entries"),
        (np.array([["a"]]), np.zeros((1, 1)), "scores must be numbers"),
        (np.array([[0.5]]), np.array([["a"]]), "targets must be numbers"),
        (np.array([[0.5, np.nan]]), np.zeros((1, 2)), "scores[0, 1] is nan"),
        (np.array([[np.inf]]), np.zeros((1, 1)), "scores[0, 0] is inf"),
        (np.array([[0.5]]), np.array([[255]], np.uint8), "targets[0, 0] is 255"),
        (np.array([[0.5]]), np.array([[np.nan]]), "targets[0, 0] is nan"),
    ],
)
def test_bad_input_gets_one_line(scores, targets, says):
    with pytest.raises(ValueError) as error:
        multilabel_metrics(scores, targets)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda a, b: a.merge(b), "has 2 classes"),
        (lambda a, b: a.update([[0.5, 0.5]], [[1, 0]]), "has 2 classes"),
        (lambda a, b: a.merge(MultiLabelMetrics(k=5)), "k 5"),
        (lambda a, b: MultiLabelMetrics().compute(), "no batch"),
    ],
)
def test_batches_that_do_not_fit_are_rejected(call, says):
    a, b = MultiLabelMetrics(), MultiLabelMetrics()
    a.update([[0.5]], [[1]])
    b.update([[0.5, 0.5]], [[1, 0]])
    with pytest.raises(ValueError, match=says):
        call(a, b)

"""The bootstrap against evaluations of the drawn images, and score files as strangers write them."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import evaluations

from cadm_paper.metrics import PerClass, count_classes, multilabel_metrics, summarise
from cadm_paper.results.statistics import (
    ScoreFileError,
    bootstrap,
    bootstrap_classes,
    class_table,
    compare_scores,
    draws,
    evaluate_files,
    evaluation,
    match,
    metric_lines,
    plan_classes,
    precision_recall,
    read_score_file,
    replicate_class,
)

CHECKED = settings(max_examples=40, deadline=None)


@CHECKED
@given(evaluations(), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 0.9]), st.integers(1, 10))
def test_a_replicate_is_the_evaluation_of_the_drawn_images(data, seed, threshold, k):
    scores, targets = data
    found = bootstrap(scores, targets, 3, seed, threshold, k)
    drawn = torch.cat(list(draws(len(scores), 3, seed)), 1).int().numpy()
    for i in range(3):
        copies = np.repeat(np.arange(len(scores)), drawn[:, i])
        direct = multilabel_metrics(scores[copies], targets[copies], threshold, k)
        assert all(abs(values[i] - direct[name]) < 1e-12 for name, values in found.items())
        assert set(direct) - set(found) == {name for name in direct if name.endswith("_labelled")}


@CHECKED
@given(evaluations())
def test_once_each_is_the_evaluation_itself(data):
    once = torch.ones(len(data[0]), 1)
    per_class = zip(*(replicate_class(plan, once) for plan in plan_classes(*data)))
    replicate, direct = PerClass(*(np.stack(field, 1)[0] for field in per_class)), count_classes(*data)
    for ours, plain in zip(replicate, direct):
        np.testing.assert_allclose(ours, plain, rtol=1e-12, equal_nan=True)


@CHECKED
@given(evaluations(), st.integers(0, 100))
def test_the_order_of_classes_and_the_other_method_do_not_change_the_draws(data, seed):
    scores, targets = data
    order = np.random.default_rng(seed).permutation(scores.shape[1])
    ours = bootstrap_classes(scores, targets, 4, seed)
    turned = bootstrap_classes(scores[:, order], targets[:, order], 4, seed)
    for name in ("positives", "ap", "predicted", "correct"):
        assert np.array_equal(getattr(ours, name)[:, order], getattr(turned, name), equal_nan=True)
    other = np.random.default_rng(seed).random(scores.shape)
    assert np.array_equal(ours.positives, bootstrap_classes(other, targets, 4, seed).positives)


def test_difference_of_a_method_with_itself_and_swapped():
    rng = np.random.default_rng(0)
    a, b, y = rng.random((60, 5)), rng.random((60, 5)), (rng.random((60, 5)) < 0.3).astype(int)
    assert not compare_scores(a, a, y, 50).filter(like="difference").to_numpy().any()
    ab, ba = compare_scores(a, b, y, 50), compare_scores(b, a, y, 50)
    np.testing.assert_allclose(ab.difference_value, -ba.difference_value)
    np.testing.assert_allclose(ab.difference_low, -ba.difference_high, atol=1e-15)


@CHECKED
@given(evaluations())
def test_class_table_adds_up(data):
    table, numbers = class_table(*data), multilabel_metrics(*data)
    occurs = table.positives > 0
    mean = lambda column: float(column[occurs].mean()) if occurs.any() else 0.0
    for name, column in (
        ("mAP", table.AP),
        ("CP", table.precision),
        ("CR", table.recall),
        ("CF1_mean", table.F1),
        ("CP_top3", table.precision_top3),
    ):
        assert abs(numbers[name] - mean(column)) < 1e-12
    assert table.AP.isna().equals(~occurs) and (table.images == (data[1] >= 0).sum(0)).all()


@CHECKED
@given(evaluations())
def test_area_under_the_curve_is_ap(data):
    scores, targets = data
    ap = count_classes(scores, targets).ap
    for c in range(scores.shape[1]):
        if np.isnan(ap[c]):
            with pytest.raises(ValueError, match="without a positive"):
                precision_recall(scores[:, c], targets[:, c])
        else:
            curve = precision_recall(scores[:, c], targets[:, c])
            assert abs((np.diff(curve.recall, prepend=0) * curve.precision).sum() - ap[c]) < 1e-12
            assert curve.recall[-1] == 1 and (np.diff(curve.threshold) < 0).all()


@pytest.fixture
def files(tmp_path):
    """Two score files of one data set, the second in another order, with an ignored label, an unlabelled image and a class that never occurs."""
    rng = np.random.default_rng(1)
    y = (rng.random((50, 4)) < [0.5, 0.3, 0.2, 0]).astype(np.int8)
    y[0], y[1, 0] = 0, -1
    ids, classes, turned = (
        np.array([f"{i:03d}" for i in range(50)]),
        np.array(["cat", "dog", "cow", "yeti"]),
        rng.permutation(50),
    )
    a, b = rng.random((50, 4)).astype(np.float32), rng.random((50, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", scores=a, scores_fcls=b, targets=y, image_ids=ids, classes=classes)
    np.savez(tmp_path / "b.npz", scores=b[turned], targets=y[turned], image_ids=ids[turned], classes=classes)
    return tmp_path, a, b, y


def test_evaluate_files_writes_what_it_returns(files, capsys):
    folder, a, b, y = files
    found = evaluate_files(
        folder / "a.npz",
        folder / "b.npz",
        json=folder / "e.json",
        csv=folder / "e.csv",
        per_class=folder / "c.csv",
        replicates=30,
    )
    assert found["metrics"] == multilabel_metrics(a, y) and found["against"]["metrics"] == multilabel_metrics(
        b, y
    )
    assert json.loads((folder / "e.json").read_text(), parse_constant=pytest.fail) == found
    with open(folder / "e.csv", newline="") as file:
        lines = {line["metric"]: line for line in csv.DictReader(file)}
    assert {name: float(line["difference_value"]) for name, line in lines.items()} == found["difference"]
    assert lines["mAP_labelled"]["low"] == "" and float(lines["mAP"]["low"]) == found["intervals"]["mAP"][0]
    with open(folder / "c.csv", newline="") as file:
        assert [(line["class"], line["AP"] == "") for line in csv.DictReader(file)] == [
            ("cat", False),
            ("dog", False),
            ("cow", False),
            ("yeti", True),
        ]
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].split() == "mAP CP CR CF1 OP OR OF1 | CP CR CF1 OP OR OF1".split()
    assert rows[2].replace("|", "").split() == ["a.npz"] + [
        f"{100 * v:.1f}" for v in list(found["metrics"].values())[:13]
    ]
    assert (
        rows[-2].startswith("50 images (")
        and "4 classes (1 without a positive)" in rows[-2]
        and "1 ignored" in rows[-2]
    )
    assert rows[-1] == "from, to: 95 % intervals, 30 bootstrap replicates over images"


def test_one_file_alone_is_evaluated(files, capsys):
    folder, a, _, y = files
    assert evaluate_files(folder / "a.npz", replicates=20)["metrics"] == multilabel_metrics(a, y)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a.npz", "from", "to"] == [row[0] for row in rows[2:5]] and not any(
        row[0] == "difference" for row in rows
    )


def test_swapped_files_give_the_opposite_difference(files):
    folder = files[0]
    ab, ba = (evaluation(folder / f"{x}.npz", folder / f"{y}.npz", replicates=30) for x, y in ("ab", "ba"))
    for name, (low, high) in ab["difference_intervals"].items():
        assert ba["difference_intervals"][name] == pytest.approx([-high, -low], abs=1e-15)
    assert ab["intervals"] == ba["against"]["intervals"]


def test_other_arrays_rules_and_run_folders(files):
    folder, a, b, y = files
    kept = (y == 1).any(1)
    assert evaluation(folder / "a.npz", array="scores_fcls", replicates=0)["metrics"] == multilabel_metrics(
        b, y
    )
    assert evaluation(folder / "a.npz", threshold=0.7, k=2, replicates=0)["metrics"] == multilabel_metrics(
        a, y, 0.7, 2
    )
    dropped = evaluation(folder / "a.npz", unlabelled="drop", replicates=0)
    assert (
        dropped["metrics"] == multilabel_metrics(a[kept], y[kept])
        and dropped["counts"]["images"] == kept.sum()
    )
    assert dropped["metrics"]["OF1"] == evaluation(folder / "a.npz", replicates=0)["metrics"]["OF1_labelled"]
    (folder / "run").mkdir()
    (folder / "a.npz").rename(folder / "run" / "scores.npz")
    assert evaluation(folder / "run", replicates=0)["metrics"] == multilabel_metrics(a, y)
    assert metric_lines(evaluation(folder / "run", replicates=0)).low.isna().all()


GOOD = {"scores": np.full((3, 2), 0.5), "targets": np.array([[1, 0], [0, 1], [0, -1]])}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"scores": None}, "has no array 'scores': it has targets"),
        ({"targets": None}, "has no array 'targets'"),
        ({"scores": np.full((3, 2), 2.0)}, "scores[0, 0] is 2.0"),
        ({"scores": np.full((3, 2), np.nan)}, "scores[0, 0] is nan"),
        ({"scores": np.full((2, 3), 0.5)}, "targets have the shape (3, 2) and scores (2, 3)"),
        ({"targets": np.full((3, 2), 7)}, "targets[0, 0] is 7"),
        ({"scores": np.zeros((0, 2)), "targets": np.zeros((0, 2))}, "no images"),
        ({"classes": np.array(["a"])}, "classes has 1 entries"),
        ({"classes": np.array(["a", "a"])}, "(1 different ones)"),
        ({"image_ids": np.array(["x", "y"])}, "image_ids has 2 entries"),
        ({"image_ids": np.array([{}, {}, {}], dtype=object)}, "Python objects"),
    ],
)
def test_a_bad_score_file_gets_one_line_with_its_name(tmp_path, change, says):
    np.savez(
        tmp_path / "x.npz", **{name: value for name, value in (GOOD | change).items() if value is not None}
    )
    with pytest.raises(ScoreFileError) as error:
        read_score_file(tmp_path / "x.npz")
    assert says in str(error.value) and "x.npz" in str(error.value) and "\n" not in str(error.value)


def test_damaged_files_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", **GOOD)
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "one.npy", GOOD["scores"])
    for name, content in (
        ("empty.npz", b""),
        ("half.npz", whole[: len(whole) // 2]),
        ("text.npz", b"scores"),
        ("one.npz", (tmp_path / "one.npy").read_bytes()),
        ("bent.npz", whole[:60] + bytes(40) + whole[100:]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ScoreFileError, match=name):
            read_score_file(tmp_path / name)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"targets": np.array([[1, 0], [0, 0], [0, -1]])}, "different labels (first at image 1, class 1)"),
        ({"scores": np.full((2, 2), 0.5), "targets": GOOD["targets"][:2]}, "different labels: both must be"),
        ({"scores": np.full((3, 1), 0.5), "targets": GOOD["targets"][:, :1]}, "different classes (2 and 1"),
        ({"classes": np.array(["b", "a"])}, "different classes"),
        ({"image_ids": np.array(["x", "y", "w"])}, "'w' is in one of them only (2 such)"),
    ],
)
def test_files_that_do_not_belong_together_are_not_compared(tmp_path, change, says):
    names = {"classes": np.array(["a", "b"]), "image_ids": np.array(["x", "y", "z"])}
    np.savez(tmp_path / "p.npz", **GOOD, **names)
    odd = {key: names[key] for key in change if key in names}
    np.savez(tmp_path / "q.npz", **(GOOD | odd | change))
    with pytest.raises(ScoreFileError) as error:
        match(read_score_file(tmp_path / "p.npz"), read_score_file(tmp_path / "q.npz"))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_importing_needs_neither_pandas_nor_matplotlib():
    code = "import sys, cadm_paper.results.statistics; print([m for m in ('pandas', 'matplotlib', 'seaborn', 'sklearn') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_summaries_have_no_order_of_replicates():
    rng = np.random.default_rng(3)
    counts = bootstrap_classes(rng.random((30, 3)), (rng.random((30, 3)) < 0.3).astype(int), 8)
    together, apart = summarise(counts), summarise(PerClass(*(field[5] for field in counts)))
    assert all(together[name][5] == apart[name] for name in together)

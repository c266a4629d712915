"""Bootstrap replicates against direct evaluations, and score files of other programs."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import evaluations

from cadm_paper.metrics import multilabel_metrics
from cadm_paper.results.evaluation import ScoreFileError, compare_scores, evaluate_files, per_class_metrics
from cadm_paper.results.statistics import bootstrap, draws

CHECKED = settings(max_examples=40, deadline=None)


@CHECKED
@given(evaluations(), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 0.9]), st.integers(1, 10))
def test_a_replicate_is_the_evaluation_of_the_drawn_images(data, seed, threshold, k):
    scores, targets = data
    found = bootstrap(scores, targets, 3, seed, threshold, k)
    drawn = np.hstack(list(draws(len(scores), 3, seed))).astype(int)
    for i in range(3):
        copies = np.repeat(np.arange(len(scores)), drawn[:, i])
        if not (targets[copies] == 1).any():
            assert all(np.isnan(values[i]) for values in found.values())  # undefined, not 0
            continue
        direct = multilabel_metrics(scores[copies], targets[copies], threshold, k)
        assert all(abs(values[i] - direct[name]) < 1e-12 for name, values in found.items())
        assert set(direct) - set(found) == {name for name in direct if name.endswith("_labelled")}


@CHECKED
@given(evaluations())
def test_means_over_classes_equal_the_metrics(data):
    table, numbers = per_class_metrics(*data), multilabel_metrics(*data)
    means = table[table.positives > 0].mean().fillna(0)
    for name, column in dict(
        mAP="AP", CP="precision", CR="recall", CF1_mean="F1", CP_top3="precision_top3"
    ).items():
        assert abs(numbers[name] - means[column]) < 1e-12
    assert table.AP.isna().equals(table.positives == 0) and (table.images == (data[1] >= 0).sum(0)).all()


def test_a_method_does_not_differ_from_itself_and_swapping_changes_the_sign():
    rng = np.random.default_rng(0)
    a, b, y = rng.random((60, 5)), rng.random((60, 5)), (rng.random((60, 5)) < 0.3).astype(int)
    assert not compare_scores(a, a, y, 50).filter(like="difference").dropna().to_numpy().any()
    ab, ba = compare_scores(a, b, y, 50), compare_scores(b, a, y, 50)
    np.testing.assert_allclose(ab.difference_value, -ba.difference_value)
    np.testing.assert_allclose(ab.difference_low, -ba.difference_high, atol=1e-15)


@pytest.fixture
def files(tmp_path):
    """Two score files in different orders, with an ignored label, an unlabelled image and an absent class."""
    rng = np.random.default_rng(1)
    y = (rng.random((50, 4)) < [0.5, 0.3, 0.2, 0]).astype(np.int8)
    y[0], y[1, 0], turned = 0, -1, rng.permutation(50)
    names = dict(
        image_ids=np.array([f"{i:03d}" for i in range(50)]), classes=np.array(["cat", "dog", "cow", "yeti"])
    )
    a, b = rng.random((50, 4)).astype(np.float32), rng.random((50, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", scores=a, scores_fcls=b, targets=y, **names)
    names["image_ids"] = names["image_ids"][turned]
    np.savez(tmp_path / "b.npz", scores=b[turned], targets=y[turned], **names)
    return tmp_path, a, b, y


def test_evaluate_files_writes_what_it_returns(files, capsys):
    folder, a, b, y = files
    out = dict(json=folder / "e.json", csv=folder / "e.csv", per_class=folder / "c.csv")
    found = evaluate_files(folder / "a.npz", folder / "b.npz", **out, replicates=30)
    assert found["metrics"] == multilabel_metrics(a, y)
    assert found["against"]["metrics"] == multilabel_metrics(b, y)
    assert json.loads(out["json"].read_text(), parse_constant=pytest.fail) == found
    read = lambda name: pd.read_csv(out[name], index_col=0, float_precision="round_trip")
    lines, classes = read("csv"), read("per_class")
    assert dict(lines.difference_value) == pytest.approx(found["difference"], abs=1e-15)
    assert np.isnan(lines.low["mAP_labelled"]) and lines.low["mAP"] == found["intervals"]["mAP"][0]
    assert list(classes.index[classes.AP.isna()]) == ["yeti"]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    heads = ["mAP", "a.npz", "from", "to", "b.npz", "from", "to", "difference", "from", "to", "50"]
    assert [row[0] for row in rows[1:12]] == heads
    assert rows[2][1:] == [f"{100 * v:.1f}" for v in list(found["metrics"].values())[:13]]


@pytest.mark.parametrize("out", [dict(json="a.npz"), dict(csv="b.npz"), dict(csv="e", per_class="./e")])
def test_no_file_is_overwritten(files, monkeypatch, out):
    monkeypatch.chdir(files[0])
    before = {path.name: path.read_bytes() for path in files[0].iterdir()}
    with pytest.raises(ValueError, match="is named twice"):
        evaluate_files("a.npz", "b.npz", **out, replicates=0)
    assert {path.name: path.read_bytes() for path in files[0].iterdir()} == before


def test_run_folders_other_arrays_and_rules(files, capsys):
    folder, a, b, y = files
    (folder / "run").mkdir()
    (folder / "a.npz").rename(folder / "run" / "scores.npz")
    of = lambda **options: evaluate_files(folder / "run", replicates=0, **options)
    assert of(array="scores_fcls")["metrics"] == multilabel_metrics(b, y)
    assert of(threshold=0.7, k=2)["metrics"] == multilabel_metrics(a, y, 0.7, 2) and of()["intervals"] == {}
    assert of()["file"] == "run" and "\nrun " in capsys.readouterr().out


@pytest.mark.parametrize("ids", [None, np.arange(50)[::-1].astype("S")])
def test_the_order_of_a_file_without_ids_is_kept(files, ids):
    """Images are sorted only if both files have ids, text or bytes."""
    folder, a, b, y = files
    np.savez(folder / "x.npz", scores=a, targets=y, image_ids=np.arange(50)[::-1].astype(str))
    np.savez(folder / "y.npz", scores=b, targets=y, **({} if ids is None else {"image_ids": ids}))
    found = evaluate_files(folder / "x.npz", folder / "y.npz", replicates=0)
    assert found["against"]["metrics"] == multilabel_metrics(b, y)


GOOD = {"scores": np.full((3, 2), 0.5), "targets": np.array([[1, 0], [0, 1], [0, -1]])}
NAMES = {"classes": np.array(["a", "b"]), "image_ids": np.array(["x", "y", "z"])}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"scores": None}, "no array 'scores': it has "),
        ({"targets": None}, "no array 'targets'"),
        ({"scores": np.full((3, 2), 2.0)}, "scores[0, 0] is 2.0"),
        ({"targets": np.array([[0, 0], [0, -1], [0, 0]])}, "no label of 3 images is present (1)"),
        ({"classes": np.array(["a"])}, "classes has 1 entries"),
        ({"classes": np.array(["a", "a"])}, "(1 distinct)"),
        ({"image_ids": np.array(["x", "y"])}, "image_ids has 2 entries"),
        ({"image_ids": np.array([{}, {}, {}], dtype=object)}, "Python objects"),
        ({"targets": np.array([[1, 0], [0, 0], [0, -1]])}, "different labels (first at image 1, class 1)"),
        ({"scores": GOOD["scores"][:, :1], "targets": GOOD["targets"][:, :1], "classes": None}, "(3, 1)"),
        ({"classes": np.array(["b", "a"])}, "different classes"),
        ({"image_ids": np.array(["x", "y", "w"])}, "'w' is in only one of them (2 such images)"),
    ],
)
def test_invalid_or_unequal_files_give_one_line(tmp_path, change, says):
    np.savez(tmp_path / "p.npz", **GOOD, **NAMES)
    np.savez(tmp_path / "q.npz", **{name: x for name, x in (GOOD | NAMES | change).items() if x is not None})
    with pytest.raises(ScoreFileError) as error:
        evaluate_files(tmp_path / "p.npz", tmp_path / "q.npz", replicates=0)
    assert says in str(error.value) and "q.npz" in str(error.value) and "\n" not in str(error.value)

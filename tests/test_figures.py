"""Figures from run records: ranks and curves against their definitions, unusual records, reproducible bytes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cadm_paper.app.explorer import explore, explorer_data
from cadm_paper.data.split import cooccurrence
from cadm_paper.engine.config import TrainConfig
from cadm_paper.engine.record import RecordError
from cadm_paper.engine.synthetic import synthetic_run
from cadm_paper.engine.variants import ATTENTION, Variant
from cadm_paper.figures import curve_at, drawn_images, figure2, figure4, map_ranks, overlays
from cadm_paper.methods import METHODS
from cadm_paper.methods.base import build_network, method_arguments
from cadm_paper.metrics import average_precision

SEEDS = st.integers(0, 2**32 - 1)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(-9, 9), st.booleans(), SEEDS)
@settings(max_examples=50, deadline=None)
def test_ranks_are_scale_invariant_permutations(images, classes, side, scale, positive, seed):
    maps = np.random.default_rng(seed).normal(size=(images, classes, side, side))
    ranks = map_ranks(maps, positive)
    assert (np.sort(ranks, 1) == np.arange(1, classes + 1)).all()
    sums = (np.maximum(maps, 0) if positive else maps).sum((2, 3))
    assert (np.diff(np.take_along_axis(sums, np.argsort(ranks, 1), 1), axis=1) <= 0).all()
    assert (map_ranks(maps * 2.0**scale, positive) == ranks).all()


@pytest.mark.parametrize("method", METHODS)
def test_maps_that_sum_to_one_are_declared(method):
    torch.manual_seed(0)
    args = method_arguments(method, {})
    model = build_network(method, 5, "narrow_resnet", None, args, image_size=64).eval()
    maps = model(torch.rand(2, 3, 64, 64)).maps
    same = maps is not None and bool((maps.sum((2, 3)) - 1).abs().max() < 1e-3)
    assert (Variant(method).map_value == ATTENTION) == same


def test_attention_is_ranked_by_confidence(tmp_path):
    """The sums of attention maps differ by rounding alone, here against the order of the scores."""
    run = synthetic_run(tmp_path / "a", method="query2label", images=20, drawn=2, classes=6)
    maps = run.maps()
    rounding = 1 - 1e-3 * np.argsort(np.argsort(maps["scores"], 1), 1)
    maps["maps"] = np.broadcast_to((rounding / 100)[..., None, None], maps["maps"].shape).astype(np.float16)
    run.maps = lambda: dict(maps)
    by_score = (np.argsort(np.argsort(-maps["scores"], 1), 1) + 1).tolist()
    data = explorer_data([run])
    assert [image["runs"][0]["ranks"] for image in data["images"]] == by_score
    assert data["runs"][0]["ranked"] == "confidence"
    page = explore(run).html  # of one stream: one confidence for each label, and nothing is averaged
    assert {len(s) for image in data["images"] for s in image["runs"][0]["scores"]} == {1}
    assert "averages the two streams" not in page
    picture = figure2(run, [0])
    names = [t.get_text().removeprefix("● ") for t in picture.figure.axes[0].texts[::2]]
    assert names == [f"synth-{c}" for c in np.argsort(by_score[0])]
    assert "sorted by confidence" in picture.caption and "R-precision" not in picture.caption
    assert "Class-aware" not in picture.caption and ATTENTION in picture.data("svg").decode()
    with pytest.raises(RecordError, match="each sums to 1"):
        figure4(run, run)


@given(st.integers(1, 30), st.integers(1, 6), SEEDS)
@settings(max_examples=30, deadline=None)
def test_cooccurrence_against_counting(images, classes, seed):
    targets = np.random.default_rng(seed).integers(-1, 2, (images, classes))
    found = cooccurrence(targets, range(classes)).to_numpy()
    for i, j in np.ndindex(classes, classes):
        given_i = targets[targets[:, i] == 1]
        share = np.mean(given_i[:, j] == 1) if len(given_i) else np.nan
        assert found[i, j] == pytest.approx(share, nan_ok=True)


@given(st.integers(1, 60), st.integers(1, 6), SEEDS)
@settings(max_examples=60, deadline=None)
def test_the_area_under_the_precision_recall_curve_is_the_average_precision(images, levels, seed):
    """With ties and ignored labels; the point is recall and precision of the scores above 0.5."""
    rng = np.random.default_rng(seed)
    scores, targets = rng.integers(0, levels, images) / levels, rng.integers(-1, 2, images)
    targets[0] = 1
    middles = (np.arange((targets == 1).sum()) + 0.5) / (targets == 1).sum()
    precision, point = curve_at(middles, scores, targets)
    assert precision.mean() == pytest.approx(float(average_precision(scores[:, None], targets[:, None])[0]))
    chosen = targets[(scores > 0.5) & (targets != -1)] == 1
    assert point == pytest.approx((chosen.sum() / len(middles), chosen.mean() if len(chosen) else 0))


def test_figures_without_their_photographs(tmp_path):
    small = dict(images=20, drawn=2, classes=6, thumbnails=False)
    runs = [synthetic_run(tmp_path / str(lam), lam=lam, **small) for lam in (0, 0.5)]
    for picture in (figure2(runs[1]), figure4(*runs), overlays(runs[1], 1)):
        files = picture.save(tmp_path)
        for words in ("not in the data folder", "SYNTHETIC", *(r.name for r in picture.records)):
            assert words in files["svg"].read_text()
        assert files["png"].stat().st_size < 200_000 and files["pdf"].read_bytes()[:4] == b"%PDF"


def test_figures_with_one_label_and_with_ignored_labels(tmp_path):
    run = synthetic_run(tmp_path / "a", images=20, drawn=2)
    maps = run.maps()
    maps["targets"][:], run.maps = 0, lambda: maps
    maps["targets"][0, 3], maps["targets"][0, 4], maps["targets"][1, :3] = 1, -1, 1
    both = figure4(run, run, images=2)
    assert len(both.figure.axes) == 13 and "all 4 present labels" in both.caption  # 2 x 6 and the colour bar
    assert "? synth-4" in figure2(run, [0]).data("svg").decode()


def test_the_maps_of_figure4_have_the_aspect_of_their_image(tmp_path):
    run = synthetic_run(tmp_path / "a", images=20, drawn=1)
    maps = run.maps()
    run.maps, maps["thumbnails"] = (lambda: maps), np.zeros((1, 30, 60, 3), np.uint8)
    picture, *shown = figure4(run, run, images=1).figure.axes[:5]
    high, wide = maps["maps"].shape[-2:]
    assert len([ax for ax in shown if ax.images]) >= 2
    assert all(ax.get_aspect() * high / wide == 0.5 for ax in shown if ax.images)


def test_photographs_come_from_the_data_folder(tmp_path):
    """Photographs have their own aspect, or the centre crop of the run; a missing file gives None."""
    own = tmp_path / "data"
    own.mkdir()
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255
    Image.fromarray(pixels).save(own / "a.png")
    for split in ("train", "test"):
        (own / f"{split}.csv").write_text("path,labels\na.png,cat\nb.png,dog\n")
    record = SimpleNamespace(dataset={"name": "own", "test": {"split": "test"}}, config=TrainConfig())
    maps = {"image_ids": np.array(["a.png", "b.png"])}
    shown, missing = drawn_images(record, maps, own)
    assert shown.shape == (40, 80, 3) and missing is None
    record.config = TrainConfig(resize="crop")
    middle, _ = drawn_images(record, maps, own)
    assert middle.shape == (40, 40, 3) and (middle == 255).all()
    assert drawn_images(record, maps, tmp_path / "nowhere") == [None, None]

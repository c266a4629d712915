"""The embedded benchmark from outside: the official readers, other processes, kills, and properties over many scenes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cadm_paper.data import load_split
from cadm_paper.data.scenes import (
    CUT,
    FORMS,
    MARKER,
    STARTED,
    TEST,
    TRAIN,
    ScenesError,
    box,
    build_scenes,
    digit_indices,
    draw_labels,
    ensure_scenes,
    paint,
    paired_scenes,
    plan_scene,
    plan_split,
    sample,
    scenes_info,
)

SMALL = dict(train=40, test=20)


@pytest.fixture(scope="module", params=sorted(FORMS))
def built(request, tmp_path_factory):
    return request.param, build_scenes(
        tmp_path_factory.mktemp("scenes") / request.param, request.param, **SMALL
    )


def python(code: str, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_official_readers_give_back_what_was_drawn(built):
    """Labels, class names, boxes and pixels come through COCO's and NUS-WIDE's layouts and JPEG."""
    name, root = built
    for split, n in ((TRAIN, 40), (TEST, 20)):
        labels, _, plans = plan_split(FORMS[name], n, 0, split)
        found = load_split(f"scenes-{name}", root, ("train", "test")[split])
        assert found.classes == FORMS[name].classes and len(found) == n
        order = np.argsort([p.name for p in found.paths]) if name == "coco" else np.arange(n)
        np.testing.assert_array_equal(found.labels[order], labels)
        for i in (0, n - 1):
            photo = np.asarray(Image.open(found.paths[order[i]])).astype(int)
            assert (
                photo.shape == (80, 80, 3) and abs(photo - paint(plans[i])).mean() < 6
            )  # JPEG of a noisy picture
        if name == "coco":
            for i in range(n):
                boxes = found.boxes[found.image_ids[order[i]]]
                assert {b[0] for b in boxes} == set(np.flatnonzero(labels[i]))
                assert all(
                    0 <= x and 0 <= y and w > 0 and h > 0 and x + w <= 80 and y + h <= 80
                    for _, x, y, w, h in boxes
                )


def test_same_in_another_process(built):
    """Another process with another hash seed and other thread settings finds the same labels and pixels."""
    name, root = built
    code = f"from cadm_paper.data.scenes import *; print(fingerprint(*(lambda y, of, p: (y, map(paint, p)))(*plan_split(FORMS[{name!r}], 40, 0, 0))))"
    out, error = python(code, PYTHONHASHSEED="7", OMP_NUM_THREADS="2").communicate()
    assert out.strip() == scenes_info(root)["train"]["fingerprint"], error


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    split=st.sampled_from([TRAIN, TEST]),
    seed=st.integers(0, 2**31),
    index=st.integers(0, 2**31),
    bits=st.integers(0, 2**30 - 1),
    size=st.sampled_from([64, 80, 96]),
)
def test_any_scene_shows_its_labels_and_uses_its_side_of_the_material(form, split, seed, index, bits, size):
    f = FORMS[form]
    labels = np.array([bits >> c & 1 for c in range(len(f.classes))]) * (
        np.arange(len(f.classes)) % 3 == seed % 3
    )
    plan = plan_scene(f, labels, (seed, f.key, split, index), split, size)
    assert {g.category for g in plan.objects} - {-1} == set(np.flatnonzero(labels))
    own = {d: set(digit_indices(split)[d].tolist()) for d in range(10)}
    column, row, side = plan.crop
    assert (
        (0 <= column and column + side <= CUT) if split == TRAIN else (CUT <= column and column + side <= 640)
    )
    assert 0 <= row and row + side <= 427
    for g in plan.objects:
        assert (
            any(g.digit in s for s in own.values())
            and 0 <= g.x <= size - g.side
            and 0 <= g.y <= size - g.side
        )
        if g.category >= 0:
            assert g.digit in own[g.category % 10] and g.style == f.styles[g.category // 10]
            (x, y, w, h), area = box(g)
            assert (
                g.x <= x
                and g.y <= y
                and x + w <= g.x + g.side
                and y + h <= g.y + g.side
                and 0 < area <= w * h
            )


@settings(max_examples=25, deadline=None)
@given(form=st.sampled_from(sorted(FORMS)), index=st.integers(0, 300), which=st.integers(0, 10))
def test_leaving_an_object_out_changes_its_square_only(form, index, which):
    f = FORMS[form]
    labels, _ = draw_labels(f, 301, 0, TEST)
    plan = plan_scene(f, labels[index], (0, f.key, TEST, index), TEST)
    which %= len(plan.objects)
    g = plan.objects[which]
    changed = (
        paint(plan) != paint(replace(plan, objects=plan.objects[:which] + plan.objects[which + 1 :]))
    ).any(2)
    changed[g.y : g.y + g.side, g.x : g.x + g.side] = False
    assert not changed.any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_sampling_is_bilinear_to_half_a_grey_level(seed):
    """Whole-number interpolation against the same formula in floating point."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (9, 12, 3))
    u, v = rng.integers(-600, 4000, (2, 50))
    x, y = np.clip(u / 256, 0, 11), np.clip(v / 256, 0, 8)
    i, j = np.minimum(y.astype(int), 7), np.minimum(x.astype(int), 10)
    fx, fy = (x - j)[:, None], (y - i)[:, None]
    exact = (image[i, j] * (1 - fx) + image[i, j + 1] * fx) * (1 - fy) + (
        image[i + 1, j] * (1 - fx) + image[i + 1, j + 1] * fx
    ) * fy
    assert abs(sample(image, u, v) - exact).max() <= 0.5 + 1e-9


def dependence(labels: np.ndarray) -> float:
    """Mean over pairs of labels of n times the squared correlation: 1 where labels are independent."""
    r = np.corrcoef(labels.T)
    return float(np.mean([len(labels) * r[i, j] ** 2 for i, j in combinations(range(labels.shape[1]), 2)]))


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("seed", [0, 1])
def test_context_is_in_the_co_occurrence_and_nowhere_else(form, seed):
    """Without context the table is as dependent as chance makes it, with the same frequencies; with it, many times more."""
    with_context, _ = draw_labels(FORMS[form], 2000, seed, TRAIN)
    without, _ = draw_labels(FORMS[form], 2000, seed, TRAIN, context=False)
    np.testing.assert_array_equal(with_context.sum(0), without.sum(0))
    keep = with_context.any(1) | without.any(
        1
    )  # images without a label are left out: they are not drawn by context
    assert 0.5 < dependence(without[keep]) < 2.5 and dependence(with_context[keep]) > 10


def test_seeds_splits_and_forms_differ():
    drawn = [
        paint(plan_split(FORMS[f], 1, seed, split)[2][0]).tobytes()
        for f in FORMS
        for seed in (0, 1)
        for split in (TRAIN, TEST)
    ]
    assert len(set(drawn)) == len(drawn)


def test_pairs_differ_in_one_label():
    pairs = paired_scenes("nus", 8, removed=1)
    assert (
        (pairs.removed == 1).all()
        and (pairs.labels[:, 1] == 1).all()
        and (pairs.labels_without[:, 1] == 0).all()
    )
    assert (np.delete(pairs.labels, 1, 1) == np.delete(pairs.labels_without, 1, 1)).all()
    assert all((a != b).any() for a, b in zip(pairs.images, pairs.images_without))
    labels, _ = draw_labels(FORMS["nus"], 1000, 0, TEST)  # they are the benchmark's own test scenes
    first = int(np.flatnonzero((labels[:, 1] == 1) & (labels.sum(1) > 1))[0])
    np.testing.assert_array_equal(
        pairs.images[0], paint(plan_scene(FORMS["nus"], labels[first], (0, 2, TEST, first), TEST))
    )
    with pytest.raises(ScenesError, match="and another label"):
        paired_scenes("nus", 500, removed=29)


def test_a_killed_build_is_not_one_and_is_finished_later(tmp_path):
    code = f"from cadm_paper.data.scenes import *; build_scenes({str(tmp_path / 'a')!r}, 'nus', train=400, test=20)"
    process = python(code)
    deadline = time.monotonic() + 120
    while (
        not len(list((tmp_path / "a").glob("Flickr/*/*.jpg"))) > 20
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "a" / MARKER).exists() and (tmp_path / "a" / STARTED).exists()
    build_scenes(tmp_path / "a", "nus", **SMALL)  # other parameters: nothing of the first may be left
    build_scenes(tmp_path / "b", "nus", **SMALL)
    files = lambda root: {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and p.name != ".lock"
    }
    assert files(tmp_path / "a") == files(tmp_path / "b") and len(files(tmp_path / "a")) > 100


def test_two_builders_make_one(tmp_path):
    code = f"from cadm_paper.data.scenes import *; print(build_scenes({str(tmp_path / 'a')!r}, 'coco', train=30, test=10))"
    both = [python(code), python(code)]
    assert [p.communicate()[1] for p in both] == ["", ""] and [p.returncode for p in both] == [0, 0]
    assert (
        len(list((tmp_path / "a" / "train2014").iterdir())) == 30
        and scenes_info(tmp_path / "a")["test"]["images"] == 10
    )


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(form="voc"), "choose one of coco, nus"),
        (dict(train=0), "at least one image"),
        (dict(size=20), "64 to 512"),
        (dict(seed=-1), "seed=-1"),
    ],
)
def test_parameters_that_make_no_benchmark(tmp_path, given, message):
    with pytest.raises(ScenesError, match=message):
        build_scenes(tmp_path / "a", **{**SMALL, **given})
    assert not (tmp_path / "a").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2014.json").write_text("mine")
    for make in (lambda: build_scenes(tmp_path, **SMALL), lambda: ensure_scenes("scenes-coco", tmp_path)):
        with pytest.raises(ScenesError, match="is not empty"):
            make()
    assert (tmp_path / "annotations" / "instances_train2014.json").read_text() == "mine"


def test_scenes_of_another_version_are_refused(built, tmp_path):
    """What an older painter left under the same parameters would give other numbers under the same name."""
    name, root = built
    info = json.loads((root / MARKER).read_text())
    for older in ({k: v for k, v in info.items() if k != "recipe"}, {**info, "recipe": "0" * 64}):
        (tmp_path / MARKER).write_text(json.dumps(older))
        for make in (
            lambda: ensure_scenes(f"scenes-{name}", tmp_path),
            lambda: build_scenes(tmp_path, name, **SMALL),
        ):
            with pytest.raises(ScenesError, match="another version of the benchmark"):
                make()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"schema": "cadm-scenes/9"}',
        '{"schema": "cadm-scenes/1"}',
        '{"schema": "cadm-scenes/1", "parameters": {"form": "x"}}',
    ],
)
def test_a_damaged_marker_is_named(tmp_path, content):
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(ScenesError, match=MARKER):
        ensure_scenes("scenes-coco", tmp_path)

"""The embedded benchmark: official readers, several processes, kills, and many scenes."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cadm_paper.data import DataError, load_split
from cadm_paper.data.scenes import (
    FORMS,
    MARKER,
    REGIONS,
    TEST,
    TRAIN,
    box,
    build_scenes,
    digit_indices,
    draw_labels,
    paint,
    plan_scene,
    plan_split,
    scenes_info,
)

SMALL = dict(train=40, test=20)


@pytest.fixture(scope="module", params=sorted(FORMS))
def built(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / request.param
    return request.param, build_scenes(folder, request.param, **SMALL)


def build_elsewhere(root, form, **how) -> subprocess.Popen:
    """A build in another process with another hash seed."""
    code = f"from cadm_paper.data import build_scenes; build_scenes({str(root)!r}, {form!r}, **{how})"
    env = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)


def files(root):
    found = (p for p in root.rglob("*.*") if p.is_file() and p.name != ".lock" and p.suffix != ".npz")
    return {p.relative_to(root): p.read_bytes() for p in found}


def test_official_readers_return_labels_and_pixels(built):
    """Labels, class names, boxes and pixels survive COCO's and NUS-WIDE's layouts and JPEG."""
    name, root = built
    for split, n in ((TRAIN, 40), (TEST, 20)):
        labels, _, plans = plan_split(FORMS[name], n, 0, split)
        found = load_split(f"scenes-{name}", root, ("train", "test")[split])
        assert found.classes == FORMS[name].classes and len(found) == n
        order = np.argsort([p.name for p in found.paths]) if name == "coco" else np.arange(n)
        np.testing.assert_array_equal(found.labels[order], labels)
        for i in range(n):
            image = np.asarray(Image.open(found.paths[order[i]])).astype(int).transpose(2, 0, 1)
            assert image.shape == (3, 80, 80) and abs(image - paint(plans[i])).mean() < 6  # JPEG of noise
            if name == "coco":
                shown = {int(b[0]) for b in found.boxes[found.image_ids[order[i]]]}
                assert shown == set(np.flatnonzero(labels[i]))


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    split=st.sampled_from([TRAIN, TEST]),
    seed=st.integers(0, 2**31),
    index=st.integers(0, 2**31),
    bits=st.integers(0, 2**30 - 1),
    size=st.sampled_from([64, 80, 96]),
)
def test_any_scene_shows_its_labels_with_material_of_its_split(form, split, seed, index, bits, size):
    f = FORMS[form]
    some = np.arange(len(f.classes)) % 3 == seed % 3
    labels = np.array([bits >> c & 1 for c in range(len(f.classes))]) * some
    plan = plan_scene(f, labels, (seed, f.key, split, index), split, size)
    assert {g.category for g in plan.objects} - {-1} == set(np.flatnonzero(labels))
    (first, end), (column, row, side) = REGIONS[split], plan.crop
    assert first <= column and column + side <= end and 0 <= row and row + side <= 427
    for g in plan.objects:
        assert any(g.digit in s for s in digit_indices(split))
        assert 0 <= min(g.x, g.y) and max(g.x, g.y) <= size - g.side
        if g.category >= 0:
            assert g.digit in digit_indices(split)[g.category % 10] and g.style == f.styles[g.category // 10]
            (x, y, w, h), area = box(g)
            assert g.x <= x and g.y <= y and x + w <= g.x + g.side and y + h <= g.y + g.side
            assert 0 < area <= w * h


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("seed", [0, 1])
def test_labels_co_occur_only_with_context(form, seed):
    """Without context labels are independent."""
    drawn = [draw_labels(FORMS[form], 2000, seed, TRAIN, context)[0] for context in (True, False)]
    keep = drawn[0].any(1) | drawn[1].any(1)  # images without a label are not drawn by context
    pairs = np.triu_indices(len(FORMS[form].classes), 1)
    # mean over pairs of labels of n times the squared correlation: 1 where labels are independent
    dependence = [keep.sum() * (np.corrcoef(labels[keep].T)[pairs] ** 2).mean() for labels in drawn]
    assert dependence[0] > 10 and 0.5 < dependence[1] < 2.5


@pytest.mark.slow
def test_a_killed_build_is_replaced_by_two_processes_at_once(built, tmp_path):
    """The first build has other parameters, hash seeds and threads; nothing of it may remain."""
    name, root = built
    process, deadline = build_elsewhere(tmp_path, name, train=400), time.monotonic() + 120
    while len(list(tmp_path.rglob("*.jpg"))) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert (tmp_path / MARKER).exists() and scenes_info(tmp_path) is None
    both = [build_elsewhere(tmp_path, name, **SMALL) for _ in range(2)]
    assert [p.communicate()[1] for p in both] == ["", ""] and files(tmp_path) == files(root)


def test_a_damaged_or_foreign_marker_is_rejected(built, tmp_path):
    name, root = built
    info = scenes_info(root)
    others = [
        {**info, "recipe": "0" * 64},
        {**info, "schema": "cadm-scenes/9"},
        {**info, "parameters": {}},
        [],
        "{",
    ]
    for other in others:  # another version paints other scenes for the same parameters
        (tmp_path / MARKER).write_text(other if other == "{" else json.dumps(other))
        with pytest.raises(DataError, match=f"{MARKER}: damaged, or of another version"):
            build_scenes(tmp_path, name, **SMALL)

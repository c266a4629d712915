"""What the data notebooks (04_data to data/package) cannot show in a cell: the real files, many inputs, other processes, bad input of every kind."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadm_paper.data import DATASETS, DataError, MissingPhotographs, Split, load_split

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CADM_SHARED_DATA", ROOT.parent / "shared" / "data"))
VOC, TINY, LABELS80 = SHARED / "VOCdevkit-224", SHARED / "coco-tiny", SHARED / "coco2014_labels80.npz"


def needs(path):
    return pytest.mark.skipif(
        not path.exists(), reason=f"{path.name} is not in the folder of real data (CADM_SHARED_DATA)"
    )


# ---- the real files ---------------------------------------------------------------------------------------------


@needs(VOC)
def test_voc_names_all_missing_photographs(tmp_path):
    with pytest.raises(MissingPhotographs) as caught:
        load_split("voc2007", VOC, "trainval", cache=tmp_path)
    listed = {
        line.split()[0] for line in (VOC / "VOC2007/ImageSets/Main/dog_trainval.txt").read_text().splitlines()
    }
    lost = sorted(listed - {p.stem for p in (VOC / "VOC2007/JPEGImages").iterdir()})
    assert list(caught.value.missing) == lost == ["005042", "007284", "009623"]
    assert all(name in str(caught.value) for name in lost)


@needs(VOC)
@pytest.mark.parametrize("split", ["train", "val", "trainval", "test"])
def test_voc_reads_to_the_labels_that_the_files_say(split, tmp_path):
    got = load_split("voc2007", VOC, split, missing="drop", cache=tmp_path)
    assert len(got) + len(got.missing) == len(
        (VOC / f"VOC2007/ImageSets/Main/{split}.txt").read_text().split()
    )
    for c, name in enumerate(got.classes):
        lines = (VOC / f"VOC2007/ImageSets/Main/{name}_{split}.txt").read_text().splitlines()
        official = {line.split()[0]: int(line.split()[1]) for line in lines}
        assert got.labels[:, c].tolist() == [{1: 1, -1: 0, 0: -1}[official[i]] for i in got.image_ids]
    assert all(p.is_file() for p in got.paths)
    again = load_split("voc2007", VOC, split, missing="drop", cache=tmp_path)  # from the index
    assert (
        again.fingerprint == got.fingerprint
        and (again.labels == got.labels).all()
        and again.missing == got.missing
    )


@needs(TINY)
@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_reads_to_the_labels_that_the_json_says(split, tmp_path):
    content = json.loads((TINY / f"annotations/instances_{split}2017.json").read_text())
    got = load_split("coco2014", TINY, split, cache=tmp_path)
    categories = sorted(content["categories"], key=lambda c: c["id"])
    assert got.classes == tuple(c["name"] for c in categories) and len(got.classes) == 80
    assert got.image_ids == tuple(str(i) for i in sorted(i["id"] for i in content["images"]))
    for crowd in (True, False):
        seen = {
            (str(a["image_id"]), a["category_id"])
            for a in content["annotations"]
            if crowd or not a["iscrowd"]
        }
        expected = [[(i, c["id"]) in seen for c in categories] for i in got.image_ids]
        one = load_split("coco2014", TINY, split, crowd=crowd, cache=tmp_path)
        assert ((one.labels == 1) == expected).all()
        assert sum(map(len, one.boxes.values())) == sum(
            crowd or not a["iscrowd"] for a in content["annotations"]
        )
    dropped = load_split("coco2014", TINY, split, unlabelled="drop", cache=tmp_path)
    assert len(got) - len(dropped) == {"train": 1, "val": 2}[split] == (~got.labelled).sum()


@needs(LABELS80)
def test_official_counts_of_coco_are_those_of_the_real_labels():
    with np.load(LABELS80) as z:
        names, labels = z["names"], z["labels"]
    counts = DATASETS["coco2014"].counts
    for split in ("train2014", "val2014"):
        rows = np.char.startswith(names, f"COCO_{split}")
        assert labels[rows].any(1).sum() == rows.sum() == counts[split][1]


@needs(LABELS80)
def test_labels_per_image_of_coco_are_2_9_and_not_3_5():
    """What data/summary says against the paper's "about 3.5" (Sec. 3.3.1)."""
    with np.load(LABELS80) as z:
        names, labels = z["names"], z["labels"]
    for split, (images, _) in DATASETS["coco2014"].counts.items():
        total = int(labels[np.char.startswith(names, f"COCO_{split}")].sum())
        for n in DATASETS["coco2014"].counts[split]:
            assert 2.85 < total / n < 2.95


# ---- every form, random content: written by us, read back, compared with what was drawn -------------------------

word = (
    st.text(st.characters(categories=("L", "N"), include_characters=" -_.&'"), min_size=1, max_size=8)
    .map(str.strip)
    .filter(lambda s: s and set(s) - {".", " "})
)
quick = settings(deadline=None, max_examples=25)


@st.composite
def drawn(draw, codes=(0, 1)):
    """Names of classes and photographs and a matrix of codes."""
    classes = draw(st.lists(word, min_size=1, max_size=5, unique_by=str.lower))
    images = [f"{draw(word)} {i}.jpg" for i in range(draw(st.integers(1, 7)))]
    y = draw(
        st.lists(
            st.lists(st.sampled_from(codes), min_size=len(classes), max_size=len(classes)),
            min_size=len(images),
            max_size=len(images),
        )
    )
    return classes, images, np.array(y, np.int8)


def place(root, names):
    for n in names:
        (root / n).parent.mkdir(parents=True, exist_ok=True)
        (root / n).write_bytes(n.encode())


def put(path, lines, end="\n", mark=b"", last=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mark + (end.join(lines) + (end if last else "")).encode())


def write_nus(root, classes, images, y, form="AllLabels", split=None, **how):
    """NUS-WIDE's form; `split` says which rows are the training images."""
    rows = dict(Train=np.flatnonzero(split), Test=np.flatnonzero(~split)) if split is not None else {}
    listed = [f"folder\\{n}" for n in images]
    put(root / f"ConceptsList/Concepts{len(classes)}.txt", classes, **how)
    put(root / "ImageList/Imagelist.txt", listed, **how)
    for kind, r in rows.items():
        put(root / f"ImageList/{kind}Imagelist.txt", [listed[i] for i in r], **how)
    for c, name in enumerate(classes):
        if form == "AllLabels":
            put(root / f"Groundtruth/AllLabels/Labels_{name}.txt", map(str, y[:, c]), **how)
        for kind, r in rows.items() if form != "AllLabels" else ():
            put(root / f"Groundtruth/TrainTestLabels/Labels_{name}_{kind}.txt", map(str, y[r, c]), **how)
    place(root / "Flickr" / "folder", images)


@quick
@given(
    data=drawn(),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_nus_wide_in_both_forms_with_every_kind_of_line_end(data, end, mark, last, seed, tmp_path_factory):
    classes, images, y = data
    split = np.random.default_rng(seed).permutation(np.arange(len(images)) % 2 == 0)
    for form in ("AllLabels", "TrainTestLabels"):
        if form == "TrainTestLabels" and split.all():
            continue  # an empty test list is no list
        root = tmp_path_factory.mktemp("nus")
        write_nus(root, classes, images, y, form, split, end=end, mark=mark, last=last)
        got = load_split("scenes-nus", root, "train", cache=False)
        assert got.classes == tuple(classes) and (got.labels == y[split]).all()
        assert [p.name for p in got.paths] == [n for n, s in zip(images, split) if s] and all(
            p.is_file() for p in got.paths
        )


@quick
@given(data=drawn(codes=(0, 1, 2)), seed=st.integers(0, 99))
def test_coco_whatever_the_order_of_its_entries(data, seed, tmp_path_factory):
    classes, images, y = data
    g, root = np.random.default_rng(seed), tmp_path_factory.mktemp("coco")
    category, image = (
        np.sort(g.permutation(90)[: len(classes)]).tolist(),
        np.sort(g.permutation(1000)[: len(images)]).tolist(),
    )
    things = [
        dict(image_id=image[i], category_id=category[c], iscrowd=int(y[i, c] == 2), bbox=[0, 0, 1, 1])
        for i, c in zip(*np.nonzero(y))
        for _ in range(1 + (i + c) % 2)
    ]
    content = dict(
        annotations=[things[k] | dict(id=int(k)) for k in g.permutation(len(things))],
        images=[dict(id=image[k], file_name=images[k]) for k in g.permutation(len(images))],
        categories=[dict(id=category[k], name=classes[k]) for k in g.permutation(len(classes))],
    )
    (root / "annotations").mkdir()
    (root / "annotations/instances_val2014.json").write_text(json.dumps(content))
    place(root / "val2014", images)
    for crowd in (True, False):
        got = load_split("scenes-coco", root, "test", crowd=crowd, cache=False)
        assert got.classes == tuple(classes) and (got.labels == ((y > 0) if crowd else (y == 1))).all()
        assert [p.name for p in got.paths] == images
        assert [len(got.boxes[i]) for i in got.image_ids] == [
            sum((1 + (i + c) % 2) for c in np.flatnonzero(y[i]) if crowd or y[i, c] == 1)
            for i in range(len(y))
        ]


@quick
@given(data=drawn(codes=(-1, 0, 1)))
def test_own_tables_in_three_forms(data, tmp_path_factory):
    import csv

    classes, images, y = data
    classes = [c.replace(";", "") for c in classes]
    if set(classes) & {"path", "labels", "ignored", "id"}:
        return
    names = lambda row, code: [c for c, v in zip(classes, row) if v == code]
    read = []
    for form in ("labels", "wide", "jsonl"):
        root = tmp_path_factory.mktemp("own")
        put(root / "classes.txt", classes)
        place(root / "train", images)
        with open(
            root / ("train.jsonl" if form == "jsonl" else "train.csv"), "w", newline="", encoding="utf-8-sig"
        ) as file:
            if form == "jsonl":
                file.writelines(
                    json.dumps(dict(path=n, labels=names(r, 1), ignored=names(r, -1)), ensure_ascii=False)
                    + "\r\n"
                    for n, r in zip(images, y)
                )
            elif form == "wide":
                csv.writer(file).writerows(
                    [("path", *classes), *((n, *r) for n, r in zip(images, y.tolist()))]
                )
            else:
                csv.writer(file).writerows(
                    [
                        ("path", "labels", "ignored"),
                        *((n, "; ".join(names(r, 1)), ";".join(names(r, -1))) for n, r in zip(images, y)),
                    ]
                )
        read.append(load_split("own", root, "train", cache=False))
        assert (
            read[-1].classes == tuple(classes)
            and (read[-1].labels == y).all()
            and all(p.is_file() for p in read[-1].paths)
        )
    assert len({r.fingerprint for r in read}) == 1


@quick
@given(
    name=st.text(max_size=20)
    | st.lists(st.sampled_from(["..", ".", "a", "C:", "", " "]), max_size=5).map("/".join)
)
def test_no_name_leaves_the_root(name):
    from cadm_paper.data.split import safe_name

    try:
        path = os.path.normpath(os.path.join("/folder/of/data", safe_name(name, "here")))
    except DataError:
        return
    assert path.startswith("/folder/of/data")


# ---- the split ---------------------------------------------------------------------------------------------------


@quick
@given(data=drawn(codes=(-1, 0, 1)), seed=st.integers(0, 99))
def test_taking_rows_agrees_with_numpy(data, seed):
    classes, images, y = data
    split = Split("own", "train", Path("/x"), classes, images, [Path("/x", n) for n in images], y)
    rows = np.random.default_rng(seed).permutation(len(images))[: 1 + seed % len(images)]
    taken = split.take(rows)
    assert (
        taken.image_ids == tuple(images[i] for i in rows)
        and (taken.labels == y[rows]).all()
        and [p.name for p in taken.paths] == [images[i] for i in rows]
    )
    assert split.take(np.argsort(rows)[:0]).summary()["images"] == 0
    same = split.take(rows).fingerprint
    assert (
        same
        == Split(
            "own",
            "other",
            Path("/y"),
            classes,
            taken.image_ids,
            [Path("/y")] * len(rows),
            y[rows].astype(float),
        ).fingerprint
    )


def test_fingerprint_is_the_same_in_another_process():
    code = "from cadm_paper.data import Split; print(Split('own', 'a', '/x', ['é', 'b'], ['1', '2'], ['/x/1', '/x/2'], [[1, 0], [-1, 1]]).fingerprint)"
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert answers == {
        Split(
            "own",
            "b",
            Path("/"),
            ("é", "b"),
            ("1", "2"),
            (Path("/1"), Path("/2")),
            np.array([[1, 0], [-1, 1]]),
        ).fingerprint
        + "\n"
    }


# ---- the index ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nus(tmp_path):
    """A small NUS-WIDE: nine images, three concepts, both forms of lists."""
    y = np.random.default_rng(1).integers(0, 2, (9, 3))
    write_nus(
        tmp_path / "nus",
        ["sky", "sea side", "été"],
        [f"{i}.jpg" for i in range(9)],
        y,
        "TrainTestLabels",
        np.arange(9) < 6,
    )
    return tmp_path / "nus"


def test_the_index_is_used_and_never_stale(nus, monkeypatch):
    from cadm_paper.data import nuswide

    read = load_split("nuswide", nus, "train")
    monkeypatch.setattr(nuswide, "nus_labels", lambda *a: pytest.fail("read again"))
    assert load_split("nuswide", nus, "train").fingerprint == read.fingerprint
    monkeypatch.undo()
    path = nus / "Groundtruth/TrainTestLabels/Labels_sky_Train.txt"
    times, text = path.stat(), path.read_text()
    path.write_text("".join("10"[int(c)] if c in "01" else c for c in text))  # as large as before ...
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # ... and as old
    changed = load_split("nuswide", nus, "train")
    assert (changed.labels[:, 0] == 1 - read.labels[:, 0]).all() and (
        changed.labels[:, 1:] == read.labels[:, 1:]
    ).all()
    path.write_text(text)
    assert load_split("nuswide", nus, "train").fingerprint == read.fingerprint


def test_a_copied_folder_keeps_its_index_and_a_changed_list_is_noticed(nus, tmp_path, monkeypatch):
    from cadm_paper.data import nuswide

    load_split("nuswide", nus, "train")
    shutil.copytree(nus, tmp_path / "copy")  # other inodes, other times
    monkeypatch.setattr(nuswide, "nus_labels", lambda *a: pytest.fail("read again"))
    load_split("nuswide", tmp_path / "copy", "train")
    monkeypatch.undo()
    (nus / "ImageList/TrainImagelist.txt").unlink()
    with pytest.raises(DataError, match="TrainImagelist.txt: the image list is not there"):
        load_split("nuswide", nus, "train")


@pytest.mark.parametrize("damage", ["empty", "half", "pickled", "text", "other arrays"])
def test_a_damaged_index_is_read_anew(nus, damage):
    read = load_split("nuswide", nus, "train")
    [kept] = (nus / ".cadm-index").glob("*.npz")
    raw = kept.read_bytes()

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    if damage == "pickled":
        np.savez(
            kept,
            meta=np.array([Bomb()], dtype=object),
            image_ids=np.zeros(0, np.uint8),
            names=np.zeros(0, np.uint8),
        )
    elif damage == "other arrays":
        np.savez(kept, a=np.zeros(3))
    else:
        kept.write_bytes({"empty": b"", "half": raw[: len(raw) // 2], "text": b"PK no archive"}[damage])
    assert load_split("nuswide", nus, "train").fingerprint == read.fingerprint
    assert load_split("nuswide", nus, "train", cache=False).fingerprint == read.fingerprint
    with np.load(kept, allow_pickle=False) as z:
        assert z["codes"].shape == (6, 3)  # mended


def test_a_folder_marked_read_only_is_left_alone(nus):
    before = sorted(p.name for p in nus.iterdir())
    nus.chmod(0o555)
    try:
        load_split("nuswide", nus, "train")
    finally:
        nus.chmod(0o755)
    assert sorted(p.name for p in nus.iterdir()) == before


def test_two_processes_at_once(nus):
    code = "import sys; from cadm_paper.data import load_split; print({load_split('nuswide', sys.argv[1], 'train').fingerprint for _ in range(5)})"
    running = [
        subprocess.Popen([sys.executable, "-c", code, nus], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert {p.communicate()[0] for p in running} == {
        str({load_split("nuswide", nus, "train", cache=False).fingerprint}) + "\n"
    }
    assert not list((nus / ".cadm-index").glob(".*"))  # nothing half-written


# ---- photographs that are not there ------------------------------------------------------------------------------


def test_placeholders_count_as_missing_and_are_listed(nus):
    for i in range(5):
        (nus / f"Flickr/folder/{i}.jpg").write_bytes(b"this photo is no longer available")
    (nus / "Flickr/folder/5.jpg").unlink()
    (nus / "Flickr/folder/7.jpg").write_bytes(b"")
    with pytest.raises(MissingPhotographs, match="6 of the 6 photographs.*5 of them are placeholders"):
        load_split("nuswide", nus, "train")
    test = load_split("nuswide", nus, "test", missing="drop")
    assert (
        test.missing == test.placeholders == ("folder/7.jpg",)
        and len(test) == 2
        and test.summary()["placeholders"] == 1
    )
    listed = (nus / ".cadm-index/nuswide-train-missing.csv").read_text().splitlines()
    assert (
        len(listed) == 7
        and listed[-1] == "folder/5.jpg,Flickr/folder/5.jpg,absent"
        and listed[1].startswith("folder/0.jpg,Flickr/folder/0.jpg,placeholder ")
    )
    assert load_split("scenes-nus", nus, "test").missing == ()  # made by us: no dead links


def test_hundreds_of_missing_photographs_all_stand_in_the_error(tmp_path):
    put(tmp_path / "train.csv", ["path,labels", *(f"{i}.jpg,x" for i in range(300))])
    place(tmp_path, ["7.jpg"])
    with pytest.raises(MissingPhotographs, match="299 of the 300.*and 199 more") as caught:
        load_split("own", tmp_path, "train", cache=False)
    assert set(caught.value.missing) == {f"{i}.jpg" for i in range(300)} - {"7.jpg"}


# ---- bad input: one clear error that names file and line or field ------------------------------------------------


def nus_mistakes():
    labels, images, concepts = (
        "Groundtruth/TrainTestLabels/Labels_sky_Train.txt",
        "ImageList/TrainImagelist.txt",
        "ConceptsList/Concepts3.txt",
    )
    return [
        (labels, b"0\n1\n", "Labels_sky_Train.txt: 2 labels, but 6 names in TrainImagelist.txt"),
        (labels, b"0\n1\n0\n1\n0\n1\n0\n", "7 labels, but 6 names"),
        (labels, b"0\n1\n0\nx\n0\n1\n", "Labels_sky_Train.txt, line 4: 'x'"),
        (labels, b"0\n1\n\n1\n0\n1\n", "Labels_sky_Train.txt, line 3: ''"),
        (labels, b"0 1\n1\n0\n1\n0\n", "Labels_sky_Train.txt, line 1: '0 1'"),
        (labels, b"", "Labels_sky_Train.txt"),
        (labels, "0\n1\n0\n1\n0\n１\n".encode(), "Labels_sky_Train.txt, line 6"),
        (labels, "0\n1\n0\n1\n0\n1\n".encode("utf-16"), "Labels_sky_Train.txt, line 1"),
        (labels, None, "Labels_sky_Train.txt not there"),
        (images, b"a\\1.jpg\n..\\..\\2.jpg\n", "TrainImagelist.txt, line 2: "),
        (images, b"/etc/passwd\n", "TrainImagelist.txt, line 1: "),
        (images, b"a\\1.jpg\na\\1.jpg\n", "TrainImagelist.txt, line 2: a/1.jpg stands there twice"),
        (images, b"a\\\xe9.jpg\n", "TrainImagelist.txt, line 1: not UTF-8"),
        (images, None, "TrainImagelist.txt: the image list is not there"),
        (concepts, b"sky\nsky\n", "Concepts3.txt: 'sky' stands there twice"),
        (concepts, "sky\nsea side\nété\nmoon\n".encode(), "Labels_moon_Train.txt not there"),
        (concepts, b"sky\nsea side\n", "Labels_été_Train.txt belong to no concept"),
        (concepts, None, "no Concepts81.txt here"),
        ("ConceptsList/Concepts4.txt", b"sky\n", "Concepts3.txt, Concepts4.txt: keep the one"),
    ]


@pytest.mark.parametrize(
    "file, content, says", nus_mistakes(), ids=lambda v: None if isinstance(v, bytes) else str(v)[-40:]
)
def test_nus_wide_mistakes(nus, file, content, says):
    (nus / file).unlink(missing_ok=True)
    if content is not None:
        (nus / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_split("nuswide", nus, "train", cache=False)
    assert says in str(caught.value)


GOOD = dict(
    images=[dict(id=1, file_name="a.jpg"), dict(id=2, file_name="b.jpg")],
    categories=[dict(id=1, name="cat"), dict(id=2, name="dog")],
    annotations=[
        dict(id=1, image_id=1, category_id=1, iscrowd=0, bbox=[0, 0, 5, 5]),
        dict(id=2, image_id=2, category_id=2, iscrowd=0, bbox=[0, 0, 5, 5]),
    ],
)


def coco_mistakes():
    """Change one thing in a good file; what the error has to say."""
    for part in GOOD:
        yield lambda c, part=part: c.pop(part), f"no list {part!r}"
        yield lambda c, part=part: c.update({part: {}}), f"no list {part!r}"
        yield lambda c, part=part: c[part][1].update(id=1), f"id 1 stands twice in {part!r}"
        yield lambda c, part=part: c[part].append("x"), f"{part}[2]"
        for key in GOOD[part][0]:
            if key not in ("iscrowd", "bbox"):
                yield lambda c, part=part, key=key: c[part][1].pop(key), f"{part}[1]: {key!r} is to be"
                yield (
                    lambda c, part=part, key=key: c[part][1].update({key: None}),
                    f"{part}[1]: {key!r} is to be",
                )
                yield (
                    lambda c, part=part, key=key: c[part][1].update({key: True}),
                    f"{part}[1]: {key!r} is to be",
                )
    yield lambda c: c["annotations"][1].update(image_id=7), "annotations[1]: image_id 7 is in no list"
    yield lambda c: c["annotations"][1].update(category_id=7), "annotations[1]: category_id 7 is in no list"
    for box in ([0, 0, 5], [0, 0, 5, "5"], [0, 0, 5, True], "abcd", 7, [0, 0, 5, None]):
        yield lambda c, box=box: c["annotations"][1].update(bbox=box), "annotations[1]: 'bbox' is to be"
    yield lambda c: c["annotations"][1].update(bbox=[0, 0, float("nan"), 5]), "holds NaN"
    yield lambda c: c["annotations"][1].update(bbox=[0, 0, float("inf"), 5]), "holds Infinity"
    yield lambda c: c["annotations"][1].update(iscrowd=2), "annotations[1]: 'iscrowd' is 0 or 1"
    for name in ("../a.jpg", "/etc/passwd", "C:\\a.jpg", ""):
        yield (
            lambda c, name=name: c["images"][1].update(file_name=name),
            "instances_train2014.json, image 2: ",
        )
    yield lambda c: c["categories"][1].update(name="cat"), "class 'cat' is named twice"


@pytest.mark.parametrize("change, says", list(coco_mistakes()))
def test_coco_mistakes(tmp_path, change, says):
    content = copy.deepcopy(GOOD)
    change(content)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2014.json").write_text(json.dumps(content))
    place(tmp_path / "train2014", ["a.jpg", "b.jpg"])
    with pytest.raises(DataError) as caught:
        load_split("coco2014", tmp_path, "train", cache=False)
    assert says in str(caught.value) and (
        "instances_train2014.json" in str(caught.value) or "coco2014, train2014" in str(caught.value)
    )


@quick
@given(cut=st.floats(0, 0.999))
def test_a_json_file_cut_anywhere_is_an_error_that_names_the_place(cut, tmp_path_factory):
    root = tmp_path_factory.mktemp("cut")
    text = json.dumps(GOOD, indent=1)
    (root / "annotations").mkdir()
    (root / "annotations/instances_val2014.json").write_text(text[: int(cut * len(text))])
    with pytest.raises(
        DataError, match=r"instances_val2014.json, line \d+, column \d+: not JSON, or cut short"
    ):
        load_split("coco2014", root, "val", cache=False)


def voc_mistakes():
    return [
        ("cow", "000001 1\n", "cow_train.txt, line 2: lists other images than aeroplane_train.txt"),
        ("cow", "000001 1\n000003 1\n", "cow_train.txt, line 2: lists other"),
        ("cow", "000001 1\n000002 2\n", "cow_train.txt, line 2: '000002 2'"),
        ("cow", "000001\n000002 1\n", "cow_train.txt, line 1: '000001'"),
        ("cow", "000001 1\n../000002 1\n", "cow_train.txt, line 2: "),
        ("cow", "000001 1\n000001 1\n", "image 000001 stands there twice"),
        ("cow", None, "cow_train.txt not there"),
    ]


@pytest.mark.parametrize("name, text, says", voc_mistakes())
def test_voc_mistakes(tmp_path, name, text, says):
    from cadm_paper.data.voc import VOC_CLASSES

    main = tmp_path / "VOC2007/ImageSets/Main"
    for c in VOC_CLASSES:
        put(main / f"{c}_train.txt", ["000001 -1", "000002  0"])
    place(tmp_path / "VOC2007/JPEGImages", ["000001.jpg", "000002.jpg"])
    assert load_split("voc2007", tmp_path, "train").labels.tolist() == [[0] * 20, [-1] * 20]
    assert (
        load_split("voc2007", tmp_path, "train", difficult="present").labels[1].all()
        and load_split("voc2007", tmp_path, "train", difficult="absent").labels.sum() == 0
    )
    (main / f"{name}_train.txt").unlink()
    if text is not None:
        (main / f"{name}_train.txt").write_text(text)
    with pytest.raises(DataError) as caught:
        load_split("voc2007", tmp_path, "train")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda r: load_split("coco", r), "unknown data set 'coco': one of coco2014"),
        (lambda r: load_split("coco2014", r / "none"), "no such folder"),
        (lambda r: load_split("own", r, "train"), "no table for the split 'train'"),
        (lambda r: load_split("voc2012", r, "train"), "no VOC2012/ImageSets/Main here"),
        (lambda r: load_split("own", r, missing="ignore"), "missing = 'ignore': one of error, drop"),
        (lambda r: load_split("own", r, unlabelled=True), "unlabelled = True"),
        (lambda r: load_split("scenes-coco", r / "scenes"), "`build_scenes(root, 'coco')` makes it"),
    ],
)
def test_mistakes_of_the_caller(tmp_path, call, says):
    with pytest.raises(DataError) as caught:
        call(tmp_path)
    assert says in str(caught.value)


def test_check_finds_what_was_broken_and_nothing_else(nus):
    from cadm_paper.data import data_check

    assert data_check("scenes-nus", nus).ok
    (nus / "Flickr/folder/3.jpg").unlink()
    put(nus / "Groundtruth/TrainTestLabels/Labels_sky_Test.txt", ["1"])
    problems = data_check("scenes-nus", nus).problems
    assert (
        len(problems) == 2
        and "1 photographs are missing: folder/3.jpg" in problems[0]
        and "Labels_sky_Test.txt: 1 labels, but 3 names" in problems[1]
    )
    assert "161,789" in str(data_check("nuswide", nus))  # not the whole NUS-WIDE, and it says so


@needs(VOC)
def test_check_of_the_real_voc_folder_names_the_missing_photographs():
    from cadm_paper.data import data_check

    report = data_check("voc2007", VOC)
    assert report.problems == ["trainval: 3 photographs are missing: 005042, 007284, 009623"]
    assert any("5,011 images listed" in f and "as published" in f for f in report.found) and any(
        "4,952 images listed" in f for f in report.found
    )

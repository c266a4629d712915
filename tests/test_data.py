"""Readers and checks beyond the notebooks: real files, random content, invalid input."""

import contextlib
import csv
import json
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadm_paper.data import DATASETS, DataError, MissingPhotographs, Split, load_split
from cadm_paper.data.check import data_check, data_show
from cadm_paper.data.split import safe_name
from cadm_paper.data.voc import VOC_CLASSES
from cadm_paper.engine.config import TrainConfig
from cadm_paper.engine.splits import prepare_data

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CADM_SHARED_DATA", ROOT.parent / "shared" / "data"))
VOC, TINY, LABELS80 = SHARED / "VOCdevkit-224", SHARED / "coco-tiny", SHARED / "coco2014_labels80.npz"
needs = lambda path: pytest.mark.skipif(not path.exists(), reason=f"no {path.name} in CADM_SHARED_DATA")

# ---- the real files


@needs(VOC)
@pytest.mark.parametrize(
    "split", ["trainval", "test", *(pytest.param(s, marks=pytest.mark.slow) for s in ("train", "val"))]
)
def test_voc_labels_equal_the_files_and_missing_photographs_are_named(split, tmp_path):
    got = load_split("voc2007", VOC, split, missing="drop", cache=tmp_path)
    lists = VOC / "VOC2007/ImageSets/Main"
    for c, name in enumerate(got.classes):
        official = dict(line.split() for line in (lists / f"{name}_{split}.txt").open())
        assert got.labels[:, c].tolist() == [{"1": 1, "-1": 0, "0": -1}[official[i]] for i in got.image_ids]
    there = {p.stem for p in (VOC / "VOC2007/JPEGImages").iterdir()}
    assert [i for i in official if i in there] == list(got.image_ids) == [p.stem for p in got.paths]
    assert sorted(official.keys() - there) == sorted(got.missing)
    again = load_split("voc2007", VOC, split, missing="drop", cache=tmp_path)  # from the index
    assert again.fingerprint == got.fingerprint and again.boxes == got.boxes
    if got.missing:
        with pytest.raises(MissingPhotographs, match=", ".join(got.missing[:3])):
            load_split("voc2007", VOC, split, cache=tmp_path)


@needs(TINY)
@pytest.mark.parametrize("split, empty", [("train", 1), ("val", 2)])
def test_coco_agrees_with_pycocotools(split, empty, tmp_path):
    COCO = pytest.importorskip("pycocotools.coco").COCO
    api = COCO(TINY / f"annotations/instances_{split}2017.json")
    categories, images = sorted(api.getCatIds()), sorted(api.getImgIds())
    for crowd in (True, False):
        got = load_split("coco2014", TINY, split, crowd=crowd, cache=tmp_path)
        things = {i: api.loadAnns(api.getAnnIds(i, iscrowd=None if crowd else False)) for i in images}
        assert got.image_ids == tuple(map(str, images))
        assert got.classes == tuple(c["name"] for c in api.loadCats(categories)) and len(categories) == 80
        for i, row in zip(images, got.labels):
            assert [categories[c] for c in np.flatnonzero(row)] == sorted(
                {a["category_id"] for a in things[i]}
            )
            assert [c for c, *_ in got.boxes[str(i)]] == [
                categories.index(a["category_id"]) for a in things[i]
            ]
            assert np.allclose([b[1:] for b in got.boxes[str(i)]], [a["bbox"] for a in things[i]])
    dropped = load_split("coco2014", TINY, split, unlabelled="drop", cache=tmp_path)
    assert len(images) - len(dropped) == empty


@needs(LABELS80)
def test_official_counts_of_coco_match_the_real_labels():
    """There are 2.9 labels per image, not the paper's "about 3.5" (Sec. 3.3.1)."""
    with np.load(LABELS80) as z:
        names, labels = z["names"], z["labels"]
    for split, (images, labelled) in DATASETS["coco2014"].counts.items():
        found = labels[np.char.startswith(names, f"COCO_{split}")]
        assert found.any(1).sum() == len(found) == labelled
        assert all(2.85 < found.sum() / n < 2.95 for n in (images, labelled))


# ---- every form with random content: written, read back and compared

word = (
    st.text(st.characters(categories=("L", "N"), include_characters=" -_.&'"), min_size=1, max_size=8)
    .map(str.strip)
    .filter(lambda s: s and set(s) - {".", " "})
)
quick = settings(deadline=None, max_examples=25)


@st.composite
def drawn(draw, codes=(0, 1)):
    """Class names, photograph names and a matrix of codes."""
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


def write_nus(root, classes, images, y, split, **how):
    """Write NUS-WIDE's form; `split` marks the training images."""
    put(root / f"ConceptsList/Concepts{len(classes)}.txt", classes, **how)
    for kind, rows in (("Train", np.flatnonzero(split)), ("Test", np.flatnonzero(~split))):
        put(root / f"ImageList/{kind}Imagelist.txt", [f"folder\\{images[i]}" for i in rows], **how)
        for c, name in enumerate(classes):
            put(root / f"Groundtruth/TrainTestLabels/Labels_{name}_{kind}.txt", map(str, y[rows, c]), **how)
    place(root / "Flickr" / "folder", images)


@quick
@given(
    data=drawn(),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_nus_wide_with_all_line_ends(data, end, mark, last, seed, tmp_path_factory):
    classes, images, y = data
    split = np.random.default_rng(seed).permutation(len(images)) % 2 == 0
    root = tmp_path_factory.mktemp("nus")
    write_nus(root, classes, images, y, split, end=end, mark=mark, last=last)
    got = load_split("scenes-nus", root, "train", cache=False)
    assert got.classes == tuple(classes) and (got.labels == y[split]).all()
    assert [p.name for p in got.paths] == [n for n, s in zip(images, split) if s]


@quick
@given(data=drawn(codes=(-1, 0, 1)))
def test_own_tables_in_both_forms(data, tmp_path_factory):
    classes, images, y = data
    classes = [unicodedata.normalize("NFC", c.replace(";", "")) for c in classes]
    if {*classes} & {"path", "labels", "id"} or len({*classes}) < len(classes):
        return
    names = lambda row, code: "; ".join(c for c, v in zip(classes, row) if v == code)
    labels = [("path", "labels", "ignored"), *((n, names(r, 1), names(r, -1)) for n, r in zip(images, y))]
    for table in (labels, [("path", *classes), *((n, *r) for n, r in zip(images, y.tolist()))]):
        root = tmp_path_factory.mktemp("own")
        put(root / "classes.txt", classes)
        place(root / "train", images)
        with open(root / "train.csv", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows(table)
        got = load_split("own", root, "train", cache=False)
        assert got.classes == tuple(classes) and (got.labels == y).all()


@quick
@given(
    name=st.text(max_size=20)
    | st.lists(st.sampled_from(["..", ".", "a", "C:", "", " "]), max_size=5).map("/".join)
)
def test_names_stay_below_the_root(name):
    try:
        path = os.path.normpath(os.path.join("/folder/of/data", safe_name(name, "here")))
    except DataError:
        return
    assert path.startswith("/folder/of/data")


# ---- the split


def test_the_fingerprint_never_changes():
    split = Split("own", "a", Path("/"), ["é", "b"], ["1", "2"], ["/1", "/2"], [[1, 0], [-1, 1]])
    assert split.fingerprint == "6f52bd5226f0ad0e793f679222c0ef7312f7f77e29772c957768e19abe93ee9d"


# ---- the index


@pytest.fixture
def nus(tmp_path):
    """A small NUS-WIDE: nine images, three concepts."""
    y = np.random.default_rng(1).integers(0, 2, (9, 3))
    names = [f"{i}.jpg" for i in range(9)]
    write_nus(tmp_path / "nus", ["sky", "sea side", "été"], names, y, np.arange(9) < 6)
    return tmp_path / "nus"


@pytest.mark.parametrize("damage", [b"PK no archive", dict(a=np.zeros(3)), dict(text=np.array([{}]))])
def test_a_damaged_index_is_replaced(nus, damage):
    read = load_split("nuswide", nus, "train")
    [kept] = (nus / ".cadm-index").glob("*.npz")
    kept.write_bytes(damage) if isinstance(damage, bytes) else np.savez(kept, **damage)
    assert load_split("nuswide", nus, "train").fingerprint == read.fingerprint
    assert np.load(kept)["codes"].shape == (6, 3)


# ---- missing photographs


def test_placeholders_count_as_missing_and_are_listed(nus):
    load_split("nuswide", nus, "train")  # its index stays valid
    contents = dict.fromkeys(range(5), b"this photo is no longer available") | {7: b""}
    for i, content in contents.items():
        (nus / f"Flickr/folder/{i}.jpg").write_bytes(content)
    (nus / "Flickr/folder/5.jpg").unlink()
    says = "6 of the 6 photographs.*5 of them are not photographs: folder/0.jpg is placeholder"
    with pytest.raises(MissingPhotographs, match=says):
        load_split("nuswide", nus, "train")
    test = load_split("nuswide", nus, "test", missing="drop")
    assert test.missing == test.placeholders == ("folder/7.jpg",) and len(test) == 2
    listed = (nus / ".cadm-index/nuswide-train-missing.csv").read_text().splitlines()
    assert len(listed) == 7 and listed[-1] == "folder/5.jpg,Flickr/folder/5.jpg,absent"
    assert "5 of them are not photographs" in str(data_check("nuswide", nus))
    generated = load_split("scenes-nus", nus, "train", missing="drop")  # its equal files are not dead links
    assert generated.missing == ("folder/5.jpg",) and generated.placeholders == ()


# ---- invalid input: one error that names file and line or field


def refused(says, name, root, split, **switches):
    with pytest.raises(DataError) as caught:
        load_split(name, root, split, cache=False, **switches)
    assert says in str(caught.value)


LABELS, IMAGES = "Groundtruth/TrainTestLabels/Labels_sky_Train.txt", "ImageList/TrainImagelist.txt"
CONCEPTS = "ConceptsList/Concepts3.txt"
NUS_MISTAKES = [
    (LABELS, b"0\n1\n", "Labels_sky_Train.txt: 2 labels, but 6 names in TrainImagelist.txt"),
    (LABELS, b"0\n1\n0\n1\n0\n1\n0\n", "7 labels, but 6 names"),
    (LABELS, b"0\n1\n0\nx\n0\n1\n", "Labels_sky_Train.txt, line 4: 'x'"),
    (LABELS, b"0\n1\n\n1\n0\n1\n", "Labels_sky_Train.txt, line 3: ''"),
    (LABELS, b"0 1\n1\n0\n1\n0\n", "Labels_sky_Train.txt, line 1: '0 1'"),
    (LABELS, b"", "Labels_sky_Train.txt"),
    (LABELS, "0\n1\n0\n1\n0\n１\n".encode(), "Labels_sky_Train.txt, line 6"),
    (LABELS, "0\n1\n0\n1\n0\n1\n".encode("utf-16"), "Labels_sky_Train.txt, line 1"),
    (LABELS, None, "Labels_sky_Train.txt missing"),
    (IMAGES, b"a\\1.jpg\n..\\..\\2.jpg\n", "TrainImagelist.txt, line 2: "),
    (IMAGES, b"/etc/passwd\n", "TrainImagelist.txt, line 1: "),
    (IMAGES, b"a\\1.jpg\na\\1.jpg\n", "TrainImagelist.txt: 'a/1.jpg' occurs twice"),
    (IMAGES, b"a\\\xe9.jpg\n", "TrainImagelist.txt, line 1: not UTF-8"),
    (IMAGES, None, "TrainImagelist.txt: the image list is missing"),
    (CONCEPTS, b"sky\nsky\n", "Concepts3.txt: 'sky' occurs twice"),
    (CONCEPTS, "sky\nsea side\nété\nmoon\n".encode(), "Labels_moon_Train.txt missing"),
    (CONCEPTS, b"sky\nsea side\n", "Labels_été_Train.txt for no concept"),
    (CONCEPTS, None, "no Concepts81.txt"),
    ("ConceptsList/Concepts4.txt", b"sky\n", "Concepts3.txt, Concepts4.txt; "),
]


@pytest.mark.parametrize("file, content, says", NUS_MISTAKES, ids=[says[-40:] for *_, says in NUS_MISTAKES])
def test_invalid_nus_wide_files(nus, file, content, says):
    (nus / file).unlink(missing_ok=True)
    if content is not None:
        (nus / file).write_bytes(content)
    refused(says, "nuswide", nus, "train")


GOOD = dict(
    images=[dict(id=1, file_name="a.jpg"), dict(id=2, file_name="b.jpg")],
    categories=[dict(id=1, name="cat"), dict(id=2, name="dog")],
    annotations=[dict(id=i, image_id=i, category_id=i, iscrowd=0, bbox=[0, 0, 5, 5]) for i in (1, 2)],
)
COCO_MISTAKES = [  # part, change of its second entry (None: part removed), what the error says
    *((part, None, part) for part in GOOD),
    *((part, dict(id=1), f"ids of {part}: 1 occurs twice") for part in GOOD),
    *((p, {k: v}, f"{p}[1].{k}: ") for p in GOOD for k in GOOD[p][0] for v in (1.5, None, []) if k != "bbox"),
    *(
        ("annotations", {key: 7}, "annotation 2: its image or category is not listed")
        for key in ("image_id", "category_id")
    ),
    *(
        ("annotations", dict(bbox=[0, 0, *end]), "annotations[1].bbox")
        for end in ([5], [5, "5"], [5, True], [5, None], [float("nan"), 5], [float("inf"), 5])
    ),
    ("annotations", dict(iscrowd=2), "annotations[1].iscrowd: "),
    *(("images", dict(file_name=n), "image 2: ") for n in ("../a.jpg", "/etc/passwd", "C:\\a.jpg", "")),
    ("categories", dict(name="cat"), "train2014.json, names of categories: 'cat' occurs twice"),
    *(("categories", dict(name=n), "train2014.json, category 2: ") for n in ("", " ", "a\0b")),
    ("images", dict(file_name="./a.jpg"), "file_name of images: 'train2014/a.jpg' occurs twice"),
    *(("annotations", dict(bbox=[0, 0, *end]), "annotation 2: the box") for end in ([-1, 5], [5, 1e39])),
]


@pytest.mark.parametrize("part, change, says", COCO_MISTAKES)
def test_invalid_coco_files(tmp_path, part, change, says):
    content = json.loads(json.dumps(GOOD))
    if change is None:
        del content[part]
    else:
        content[part][1].update(change)
    put(tmp_path / "annotations/instances_train2014.json", [json.dumps(content)])
    place(tmp_path / "train2014", ["a.jpg", "b.jpg"])
    refused(says, "coco2014", tmp_path, "train")


@pytest.mark.parametrize(
    "text, says",
    [
        ("000001 1\n", "cow_train.txt: lists other images than aeroplane_train.txt"),
        ("000001 1\n000003 1\n", "cow_train.txt: lists other"),
        ("000001 1\n000002 2\n", "cow_train.txt, line 2: '000002 2'"),
        ("000001\n000002 1\n", "cow_train.txt, line 1: '000001'"),
        ("000001 1\n../000002 1\n", "cow_train.txt, line 2: "),
        ("000001 1\n000001 1\n", "cow_train.txt: '000001' occurs twice"),
        (None, "cow_train.txt missing"),
    ],
)
def test_invalid_voc_files(tmp_path, text, says):
    main = tmp_path / "VOC2007/ImageSets/Main"
    for c in VOC_CLASSES:
        put(main / f"{c}_train.txt", ["000001 -1", "000002  0"])
    (main / "cow_train.txt").unlink()
    if text is not None:
        (main / "cow_train.txt").write_text(text)
    refused(says, "voc2007", tmp_path, "train")


@pytest.mark.parametrize(
    "name, folder, switches, says",
    [
        ("coco", ".", {}, "unknown data set 'coco'; did you mean 'coco2014'?"),
        ("coco2014", "none", {}, "no such folder"),
        ("own", ".", {}, "no table for the split 'train'"),
        ("voc2012", ".", {}, "no VOC2012/ImageSets/Main here"),
        ("own", ".", dict(missing="ignore"), "missing = 'ignore'; known are: drop, error"),
        ("own", ".", dict(unlabelled=True), "unlabelled = True"),
        ("scenes-coco", "scenes", {}, "`cadm data build scenes-coco` generates it"),
    ],
)
def test_invalid_arguments(tmp_path, name, folder, switches, says):
    refused(says, name, tmp_path / folder, "train", **switches)


# ---- tables with probable mistakes

OWN_DOUBTS = {
    "path,labels,ignore\na.jpg,cat,dog\n": "train.csv, line 1: unknown column 'ignore'; did you mean 'ignored'",
    "path,labels,Ignored\na.jpg,cat,dog\n": "train.csv, line 1: unknown column 'Ignored'",
    "path,cat,dog,ignored\na.jpg,1,0,dog\n": "train.csv, line 2, column ignored: 'dog' is not 1, 0 or -1",
    "path,Labels\na.jpg,cat\n": "train.csv, line 2, column Labels: 'cat' is not 1, 0 or -1; names belong in labels",
    "path,caf\u00e9,cafe\u0301\na.jpg,1,0\n": "train.csv, line 1: the columns must be path and labels, or path and one",
    "path,labels\na.jpg,cat|dog\n": "train.csv, line 2: label 'cat|dog' may be several labels",
    'path,labels\na.jpg,"cat, dog"\n': "train.csv, line 2: label 'cat, dog' may be several labels",
    "path,labels\na.jpg,\"['cat']\"\n": "train.csv, line 2: label \"['cat']\" may be several labels",
    "path,labels\na.jpg,cat;dog\nb.jpg,cat dog\n": "train.csv, line 3: label 'cat dog' may be several",
    "path,labels\na.jpg,cat\nb.jpg,nan\n": "train.csv, line 3: label 'nan' stands for a missing value",
    "path,labels,id\na.jpg,cat,1\0\n": "train.csv, line 2: '1\\x00' is empty or has control characters",
    "path,labels\na.jpg,cat\n./a.jpg,dog\n": "train.csv, path: 'a.jpg' occurs twice",
    "path,labels\nd.jpg,cat\ntrain/d.jpg,dog\n": "two entries are one photograph",
    "path,labels\nA.JPG,cat\n": "'A.JPG' is there as 'a.jpg': one name must change",
    "path,labels\nempty.jpg,cat\n": "empty.jpg is an empty file",
    "path,labels\ndangling.jpg,cat\n": "dangling.jpg is a dangling link",
    "path,labels\ntrain,cat\n": "train is a folder",
    "path,labels\n,cat\n": "train.csv, line 2: '' is not the name of a file",
}


@pytest.fixture
def folder(tmp_path):
    """Four photographs, an empty file and a dangling link."""
    place(tmp_path, ["a.jpg", "b.jpg", "c.jpg", "train/d.jpg"])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "dangling.jpg").symlink_to("/nowhere")
    return tmp_path


@pytest.mark.parametrize("table", OWN_DOUBTS)
def test_doubtful_tables_are_rejected(folder, table):
    (folder / "train.csv").write_text(table)
    refused(OWN_DOUBTS[table], "own", folder, "train")


def test_labels_are_normalised_and_classes_txt_decides(folder):
    (folder / "train.csv").write_text("path,labels\na.jpg,caf\u00e9 \nb.jpg,cafe\u0301;\u200bsea\n")
    (folder / "notes.csv").write_text("who,when\nx,3\n")  # not a table
    got = load_split("own", folder, "train", cache=False)
    assert got.classes == ("caf\u00e9", "sea") and got.labels.tolist() == [[1, 0], [1, 1]]
    (folder / "train.csv").write_text("path,labels\na.jpg,cat dog\nb.jpg,nan;cat;dog\n")
    (folder / "classes.txt").write_text("cat dog\nnan\ncat\ndog\n")
    assert load_split("own", folder, "train", cache=False).labels.tolist() == [[1, 0, 0, 0], [0, 1, 1, 1]]


def test_unusable_files_are_dropped_and_reported(folder):
    names = ["a.jpg", "empty.jpg", "dangling.jpg", "train", "none.jpg"]
    (folder / "train.csv").write_text("path,labels\n" + "".join(f"{n},cat\n" for n in names))
    got = load_split("own", folder, "train", missing="drop", cache=False)
    assert got.image_ids == ("a.jpg",) and got.missing == tuple(names[1:])
    says = "4 of the 5 photographs of own, train are not in .*none.jpg.* 3 of them are not photographs: empty.jpg"
    assert re.search(says, str(data_check("own", folder)))


CHECKS = [  # tables of training and test, report, and the error of training ("": none)
    ("a.jpg,cat", "b.jpg,cat", "complete", ""),
    ("d.jpg,cat", "e.jpg,cat", *["none of the 1 photographs of own, test"] * 2),
    ("1.jpg,cat", "1.jpg,cat", "complete", ""),  # train/1.jpg and test/1.jpg
    (
        "1.jpg,cat",
        "train/1.jpg,cat",
        "1 images are in both train and test: train/1.jpg",
        "1 images are in both",
    ),
    ("a.jpg,cat", "linked.jpg,cat", "1 images are in both train and test: a.jpg", ""),
    ("a.jpg,cat\nb.jpg,dog", "c.jpg,dog", "odd      test: no image shows cat", ""),
    ("a.jpg,cat", "b.jpg,Cat", "classes 'Cat' and 'cat' differ in spelling only", ""),
    ("a.jpg,traffic light", "b.jpg,traffic_light", "differ in spelling only", ""),
    ("a.jpg,cat", "", "test: no image has a label", "no image of test has a label .0 images"),
    ("a.jpg,cat", "b.jpg,\nc.jpg,", "test: no image has a label", "no image of test has a label .2 images"),
    ("a.jpg,cat", None, "no table for the split 'test'", "no table for the split 'test'"),
]


@pytest.mark.parametrize("train, test, says, error", CHECKS)
def test_check_and_training_report_unusable_tables(folder, train, test, says, error):
    place(folder, ["train/1.jpg", "test/1.jpg"])
    (folder / "linked.jpg").symlink_to(folder / "a.jpg")
    for name, rows in (("train", train), ("test", test)):
        if rows is not None:
            (folder / f"{name}.csv").write_text(f"path,labels\n{rows}\n".replace("\n\n", "\n"))
    report = data_check("own", folder)
    assert says in str(report) and report.ok is says.startswith(("complete", "odd"))
    with pytest.raises(ValueError, match=error) if error else contextlib.nullcontext():
        prepare_data(TrainConfig(dataset="own", data_dir=str(folder)))


def test_splits_of_coco_may_share_ids_but_not_differ_in_classes(tmp_path):
    other = json.loads(json.dumps(GOOD).replace('cat"', 'cow"'))
    for split, content in (("train2014", GOOD), ("val2014", other)):
        put(tmp_path / f"annotations/instances_{split}.json", [json.dumps(content)])
        place(tmp_path / split, ["a.jpg", "b.jpg"])
    report = str(data_check("coco2014", tmp_path))
    assert "train2014 and val2014 have different classes" in report and "in both" not in report
    with pytest.raises(ValueError, match="train2014 and val2014 have different classes"):
        prepare_data(TrainConfig(dataset="coco2014", data_dir=str(tmp_path)))


@pytest.mark.parametrize("rows", ["", "a.jpg,\nb.jpg,\n"])
def test_a_split_without_labels_cannot_be_shown(folder, rows):
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text(f"path,labels\n{rows}")
    with pytest.raises(DataError, match="own, train in .*: no image with a label"):
        data_show("own", folder, out=folder / "figures")

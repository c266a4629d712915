"""What the data notebooks (04_data to 04z_package) cannot show in a cell: the real files, many inputs, other processes, bad input of every kind."""
import json, os, shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cadm_paper.data import DATASETS, DataError, MissingPhotographs, Split, load_split

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CADM_SHARED_DATA", ROOT.parent / "shared" / "data"))
VOC, TINY, LABELS80 = SHARED / "VOCdevkit-224", SHARED / "coco-tiny", SHARED / "coco2014_labels80.npz"


def needs(path):
    return pytest.mark.skipif(not path.exists(), reason=f"{path.name} is not in the folder of real data (CADM_SHARED_DATA)")


# ---- the real files ---------------------------------------------------------------------------------------------

@needs(VOC)
def test_voc_names_all_missing_photographs(tmp_path):
    with pytest.raises(MissingPhotographs) as caught:
        load_split("voc2007", VOC, "trainval", cache=tmp_path)
    listed = {line.split()[0] for line in (VOC / "VOC2007/ImageSets/Main/dog_trainval.txt").read_text().splitlines()}
    lost = sorted(listed - {p.stem for p in (VOC / "VOC2007/JPEGImages").iterdir()})
    assert list(caught.value.missing) == lost == ["005042", "007284", "009623"]
    assert all(name in str(caught.value) for name in lost)


@needs(VOC)
@pytest.mark.parametrize("split", ["train", "val", "trainval", "test"])
def test_voc_reads_to_the_labels_that_the_files_say(split, tmp_path):
    got = load_split("voc2007", VOC, split, missing="drop", cache=tmp_path)
    assert len(got) + len(got.missing) == len((VOC / f"VOC2007/ImageSets/Main/{split}.txt").read_text().split())
    for c, name in enumerate(got.classes):
        lines = (VOC / f"VOC2007/ImageSets/Main/{name}_{split}.txt").read_text().splitlines()
        official = {line.split()[0]: int(line.split()[1]) for line in lines}
        assert got.labels[:, c].tolist() == [{1: 1, -1: 0, 0: -1}[official[i]] for i in got.image_ids]
    assert all(p.is_file() for p in got.paths)
    again = load_split("voc2007", VOC, split, missing="drop", cache=tmp_path)   # from the index
    assert again.fingerprint == got.fingerprint and (again.labels == got.labels).all() and again.missing == got.missing


@needs(TINY)
@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_reads_to_the_labels_that_the_json_says(split, tmp_path):
    content = json.loads((TINY / f"annotations/instances_{split}2017.json").read_text())
    got = load_split("coco2014", TINY, split, cache=tmp_path)
    categories = sorted(content["categories"], key=lambda c: c["id"])
    assert got.classes == tuple(c["name"] for c in categories) and len(got.classes) == 80
    assert got.image_ids == tuple(str(i) for i in sorted(i["id"] for i in content["images"]))
    for crowd in (True, False):
        seen = {(str(a["image_id"]), a["category_id"]) for a in content["annotations"] if crowd or not a["iscrowd"]}
        expected = [[(i, c["id"]) in seen for c in categories] for i in got.image_ids]
        one = load_split("coco2014", TINY, split, crowd=crowd, cache=tmp_path)
        assert ((one.labels == 1) == expected).all()
        assert sum(map(len, one.boxes.values())) == sum(crowd or not a["iscrowd"] for a in content["annotations"])
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

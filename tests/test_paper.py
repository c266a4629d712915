"""The transcribed tables against the paper's text, and the register of decisions against the code."""

import inspect
import os
import re
from pathlib import Path

import numpy as np
import pytest

from cadm_paper import loss, model
from cadm_paper.data import load_split, loading
from cadm_paper.engine.config import TrainConfig
from cadm_paper.figures import figure2
from cadm_paper.metrics import multilabel_metrics
from cadm_paper.paper import DECISIONS, FACTS, TABLE1, TABLE2

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CADM_SHARED_DATA", ROOT.parent / "shared" / "data"))
TEXT = SHARED.parent / "paper" / "cadm-icme2019.txt"


def tables_in_text():
    """Table rows in the paper's text: (name, thirteen cells), in order."""
    lines = []
    for line in TEXT.read_text(encoding="utf-8").splitlines():
        name, *cells = re.split(r"\s*\t\s*", line.strip())
        if len(cells) == 13 and re.fullmatch(r"[\d.]+|[-_]", cells[-1]):
            name = re.sub(r"\(?\$\(?\\lambda = ([\d.]+)\)?\$\)?", r"(λ = \1)", name)
            lines.append((name, [None if cell in "-_" else float(cell) for cell in cells]))
    return lines


@pytest.mark.skipif(not TEXT.is_file(), reason="the paper's text is not here")
def test_every_cell_matches_the_text():
    assert [(r.label, list(r.values.values())) for r in (*TABLE1, *TABLE2)] == tables_in_text()


@pytest.mark.parametrize("table", [TABLE1, TABLE2])
def test_rows_with_a_variant(table):
    assert [r.variant for r in table if r.variant] == [("baseline",), ("cadm", 0.0), ("cadm", 0.5)]


@pytest.mark.skipif(not (SHARED / "coco2014_labels80.npz").is_file(), reason="COCO's labels are not here")
def test_counts_of_coco():
    per_image = np.load(SHARED / "coco2014_labels80.npz")["labels"].sum(1, dtype=int)
    train, val = FACTS["coco2014", "train"], FACTS["coco2014", "test"]
    assert len(per_image) == train.labelled + val.labelled and per_image.min() > 0
    first, rest = np.split(per_image, [train.labelled])
    assert (first.sum(), rest.sum()) == (train.labels, val.labels)
    assert np.minimum(rest, 3).sum() == val.labels_up_to_three


SIGNATURES = {
    "config": TrainConfig,
    "model": model.CADM,
    "loss": loss.CADMLoss,
    "classification_loss": loss.classification_loss,
    "loader": loading.Loader,
    "prepare": loading.prepare,
    "load_split": load_split,
    "metrics": multilabel_metrics,
    "figures": figure2,
}


@pytest.mark.parametrize("place", SIGNATURES)
def test_every_switch_exists_with_its_registered_default(place):
    parameters = inspect.signature(SIGNATURES[place]).parameters
    here = {d.switch: d.default for d in DECISIONS.values() if place in d.where}
    assert here and here == {name: parameters[name].default for name in here}


def test_every_interpretation_is_computed():
    """The result of the metrics has the default and the alternatives."""
    named = {key for d in DECISIONS.values() if "result" in d.where for key in (d.switch, *d.choices)}
    assert named and named <= multilabel_metrics([[0.9, 0.1]], [[1, 0]]).keys()

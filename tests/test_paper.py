"""What the notebook 00_paper cannot show in a cell: the transcription against the paper's own text, and the register against the code."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cadm_paper.paper import (
    CLAIMS,
    COLUMNS,
    FACTS,
    PLACES,
    REGISTER,
    TABLE1,
    TABLE2,
    VERDICTS,
    above_threshold,
    exactly_three,
    f1,
    f1_verdict,
    needed,
    printed_rows,
    row,
)

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CADM_SHARED_DATA", ROOT.parent / "shared" / "data"))
TEXT = SHARED.parent / "paper" / "cadm-icme2019.txt"


# ---- the transcription -----------------------------------------------------------------------------------------


def tables_in_text():
    """The lines of the paper's text that are table rows: (name, thirteen cells), in order."""
    lines = []
    for line in TEXT.read_text(encoding="utf-8").splitlines():
        name, *cells = re.split(r"\s*\t\s*", line.strip())
        if len(cells) == 13 and re.fullmatch(r"[\d.]+|[-_]", cells[-1]):
            lines.append(
                (
                    re.sub(
                        r"\$\(\\lambda = ([\d.]+)\)\$|\(\$\\lambda = ([\d.]+)\$\)",
                        lambda m: f"(λ = {m[1] or m[2]})",
                        name,
                    ),
                    [None if cell in "-_" else float(cell) for cell in cells],
                )
            )
    return lines


@pytest.mark.skipif(not TEXT.is_file(), reason="the paper's text is not here")
def test_every_cell_is_the_texts():
    ours = [(r.label, list(r.values.values())) for r in (*TABLE1, *TABLE2)]
    assert ours == tables_in_text()


@pytest.mark.parametrize("table", [TABLE1, TABLE2])
def test_rows_for_a_renderer(table):
    frame = printed_rows(table)
    assert list(frame.columns) == ["row", "reference", "method", "lam", *COLUMNS] and frame.row.is_unique
    for r, (_, line) in zip(table, frame.iterrows()):
        for column in COLUMNS:  # a dash stays a dash, a number keeps its one decimal
            assert (
                (line[column] != line[column])
                if r.values[column] is None
                else line[column] == r.values[column] == round(line[column], 1)
            )


def test_the_companions_rows_are_named():
    from cadm_paper.model import METHODS

    for table in (TABLE1, TABLE2):
        assert [(r.method, r.lam) for r in table if r.method] == [
            ("baseline", None),
            ("cadm", 0.0),
            ("cadm", 0.5),
        ]
        assert {r.method for r in table} - {None} <= set(METHODS)


# ---- the arithmetic of the audit -------------------------------------------------------------------------------

printed = lambda x: round(x, 1)
fractions = st.floats(0.02, 0.98)


@given(st.lists(st.tuples(fractions, fractions), min_size=1, max_size=30))
def test_an_honest_row_is_never_accused(classes):
    """CP, CR and their harmonic mean, each rounded to one decimal, always add up; a mean of per-class F1 is never higher."""
    p, r = (100 * sum(x) / len(classes) for x in zip(*classes))
    assert f1_verdict(printed(p), printed(r), printed(f1(p, r))) == "adds up"
    mean_f1 = sum(100 * f1(*c) for c in classes) / len(classes)
    assert f1_verdict(printed(p), printed(r), printed(mean_f1)) != "higher"
    assert mean_f1 >= p + r - 100 - 1e-9


@given(fractions, fractions)
def test_what_a_row_would_need(p, r):
    p, r = 100 * p, 100 * r
    f = f1(p, r)
    assume(2 * printed(r) - printed(f) > 1)  # below that any precision will do
    low, high = needed(printed(f), printed(r))
    assert low - 1e-9 <= p <= high + 1e-9


@st.composite
def rankings(draw):
    """Scores and labels of a few images: at least one label and one prediction in each way of counting."""
    n, c = draw(st.integers(1, 12)), draw(st.integers(4, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    scores, labels = (
        rng.permutation(n * c).reshape(n, c) / (n * c),
        rng.random((n, c)) < draw(st.floats(0.1, 0.6)),
    )
    labels[0, 0], scores[0, 0] = True, 0.999
    return scores, labels


def counted(chosen, labels):
    """CP, CR, OP, OR in percent, printed; a class without labels or predictions counts 0."""
    hit = chosen & labels
    safe = lambda a, b: np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b > 0)
    numbers = (
        safe(hit.sum(0), chosen.sum(0)).mean(),
        safe(hit.sum(0), labels.sum(0)).mean(),
        hit.sum() / chosen.sum(),
        hit.sum() / labels.sum(),
    )
    return [printed(100 * x) for x in numbers]


@settings(deadline=None)
@given(rankings())
def test_a_protocol_that_was_used_is_never_excluded(data):
    scores, labels = data
    best = scores.argsort(1).argsort(1) >= scores.shape[1] - 3
    every, forced, passed = (
        counted(chosen, labels) for chosen in (scores > 0.5, best, best & (scores > 0.5))
    )
    assume(min(every[3], forced[3], passed[3]) > 5)
    as_row = lambda top: row("x", None, "- {} {} - {} {} - {} {} - {} {} -".format(*every, *top))
    assert exactly_three(as_row(forced), (labels.sum() / len(labels),))
    assert above_threshold(as_row(passed))


@pytest.mark.skipif(not (SHARED / "coco2014_labels80.npz").is_file(), reason="COCO's labels are not here")
def test_counts_of_coco():
    labels = np.load(SHARED / "coco2014_labels80.npz")["labels"]
    train, val = FACTS["coco2014", "train"], FACTS["coco2014", "test"]
    assert len(labels) == train.labelled + val.labelled
    per_image = labels.sum(1, dtype=int)
    assert per_image.min() > 0  # labelled images only
    assert (per_image[: train.labelled].sum(), per_image[train.labelled :].sum()) == (
        train.labels,
        val.labels,
    )
    assert np.minimum(per_image[train.labelled :], 3).sum() == val.labels_up_to_three


def test_claims_are_complete():
    assert len({(c.where, c.says) for c in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.verdict in VERDICTS and all(
            getattr(claim, field) for field in ("where", "says", "found", "true_if")
        )
        assert all(
            len(quote.split()) <= 9 for quote in re.findall(r'"([^"]*)"', " ".join(vars(claim).values()))
        )  # a quotation is a few words


# ---- the register against the code -----------------------------------------------------------------------------


def parameters(function):
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def places(place):
    """Switches and their defaults as they really are in a place of the register."""
    from cadm_paper import data, figures, loss, metrics, model
    from cadm_paper.data import loading
    from cadm_paper.engine import config

    if place == "config":
        return {name: field.default for name, field in config.TrainConfig.model_fields.items()}
    if place == "model":
        return parameters(model.CADM.__init__) | parameters(model.CADMHead.__init__)
    if place == "result":
        return {name: name for name in metrics.multilabel_metrics([[0.9, 0.1]], [[1, 0]])}
    return parameters(
        {
            "loss": loss.CADMLoss.__init__,
            "classification_loss": loss.classification_loss,
            "loader": loading.Loader.__init__,
            "prepare": loading.prepare,
            "load_split": data.load_split,
            "metrics": metrics.multilabel_metrics,
            "figures": figures.figure2,
        }[place]
    )


@pytest.mark.parametrize("place", PLACES)
def test_every_switch_exists_with_the_registers_default(place):
    real = places(place)
    wrong = []
    for d in REGISTER:
        if place in d.where:
            if d.switch not in real:
                wrong.append(f"{d.switch}: not there")
            elif place == "result":  # a variant stands beside the default, and both are computed
                wrong += [f"{key}: not computed" for key in d.readings if key not in real]
            elif type(real[d.switch]) is not type(d.default) or real[d.switch] != d.default:
                wrong.append(f"{d.switch}: {real[d.switch]!r} there, {d.default!r} in the register")
    assert not wrong, f"{place}: {'; '.join(wrong)}"
    assert any(place in d.where for d in REGISTER)


def test_readings_are_the_codes_choices():
    """A switch with named values has exactly these in the register."""
    from cadm_paper.engine.config import TrainConfig
    from cadm_paper.loss import LOSS_SWITCHES
    from cadm_paper.model import SWITCHES

    choices = {
        name: set(get_args(field.annotation))
        for name, field in TrainConfig.model_fields.items()
        if get_origin(field.annotation) is Literal
    }
    choices |= {name: set(values) for name, values in (*SWITCHES.items(), *LOSS_SWITCHES.items())}
    found = {d.switch: set(d.readings) for d in REGISTER if d.switch in choices}
    assert len(found) > 15 and found == {name: choices[name] for name in found}


def test_no_switch_of_model_or_loss_is_missing():
    """Every switch of the model and of the losses that is a reading of the paper stands in the register."""
    from cadm_paper.loss import LOSS_SWITCHES
    from cadm_paper.model import SWITCHES

    beyond = {
        "streams",
        "center",
    }  # stated by the paper (Eq. 3, 12); the other values are other methods and a control
    listed = {d.switch for d in REGISTER}
    assert set(SWITCHES) | set(LOSS_SWITCHES) <= listed | beyond


def test_the_notebooks_scales_are_the_losses():
    from cadm_paper.loss import effective_lambda

    for cls, lce, expected in (
        ("sum", "sum", 0.5),
        ("mean", "mean", 0.5),
        ("mean", "sum", 40.0),
        ("sum", "mean", 0.00625),
    ):
        assert effective_lambda(0.5, reduction_cls=cls, reduction_lce=lce, num_classes=80) == pytest.approx(
            expected
        )


def test_paper_imports_no_other_module():
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, cadm_paper.paper; print([m for m in sys.modules if m.startswith('cadm_paper.') or m in ('torch', 'pandas')])",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert found.stdout.strip() == "['cadm_paper.paper']"

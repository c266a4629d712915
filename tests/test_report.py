"""Tables, figures and report from run records: any numbers, any names, damaged records, the notebooks from elsewhere, the page alone."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadm_paper.app.explorer import build_explorers
from cadm_paper.app.report import ROWS, build_report, standing, table
from cadm_paper.engine.config import TrainConfig, config_digest
from cadm_paper.engine.record import RunRecord, load_runs
from cadm_paper.engine.synthetic import synthetic_runs
from cadm_paper.figures import row_key
from cadm_paper.paper import COLUMNS, TABLE1, TABLE2

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "nbs" / "experiments"


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "runs"
    synthetic_runs(folder, ["scenes-coco"], images=60, drawn=4)
    return folder


def record(values: dict, seed: int = 0, dataset: str = "scenes-coco", **config) -> RunRecord:
    """A record in memory, without files."""
    config = TrainConfig(dataset=dataset, seed=seed, **config)
    return RunRecord(
        Path(dataset) / f"seed{seed}",
        f"seed{seed}",
        config,
        values,
        [],
        {"name": dataset, "classes": []},
        {},
        {},
        {},
        config_digest(config),
    )


fractions = st.floats(0, 1)
rows_of_numbers = st.lists(st.fixed_dictionaries({c: fractions for c in COLUMNS}), min_size=1, max_size=4)


class Cells(HTMLParser):
    """Rows of cell texts of a table."""

    def __init__(self):
        super().__init__()
        self.rows, self.inside = [], False

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def html_rows(text: str) -> list[list[str]]:
    cells = Cells()
    cells.feed(text)
    return cells.rows


@given(rows_of_numbers)
@settings(max_examples=25, deadline=None)
def test_every_form_of_a_table_says_the_same(numbers):
    shown = table("table1", [record(v, seed) for seed, v in enumerate(numbers)])
    mean = {c: 100 * np.mean([v[c] for v in numbers]) for c in COLUMNS}
    line = next(l for l in shown.data()["measured"][0]["lines"] if l["lam"] == 0.5 and l["method"] == "cadm")
    in_csv = next(
        r for r in csv.DictReader(io.StringIO(shown.csv())) if r["part"] == "measured" and r["lam"] == "0.5"
    )
    in_html = next(r for r in html_rows(shown.html()) if r[0].startswith("CADM (λ = 0.5)"))
    in_md = next(l for l in shown.markdown().splitlines() if l.startswith("| CADM (λ = 0.5)")).split(" | ")
    assert line["n"] == len(numbers) == int(in_csv["n"])
    for place, c in enumerate(COLUMNS):
        assert abs(line["percent"][c] - mean[c]) < 1e-9 and abs(float(in_csv[c]) - mean[c]) < 1e-3
        assert abs(float(in_html[1 + place].split("±")[0]) - mean[c]) < 0.0501
        assert abs(float(in_md[1 + place].split(" ± ")[0].strip(" |")) - mean[c]) < 0.0501
        if len(numbers) > 1:
            assert abs(line["sd"][c] - 100 * np.std([v[c] for v in numbers], ddof=1)) < 1e-9


@pytest.mark.parametrize("name, printed", [("table1", TABLE1), ("table2", TABLE2)])
def test_printed_rows_are_the_papers_and_absent_rows_are_named(name, printed):
    shown = table(name, [])
    lines = list(csv.DictReader(io.StringIO(shown.csv())))
    assert [[float(l[c]) if l[c] else None for c in COLUMNS] for l in lines if l["part"] == "printed"] == [
        list(r.values.values()) for r in printed
    ]
    assert [l["state"] for l in lines if l["part"] == "measured"] == ["missing"] * len(ROWS)
    assert shown.html().count("not run") == shown.markdown().count("not run") == len(ROWS)


NUMBERS = {c: 0.5 for c in COLUMNS}


def test_runs_of_other_recipes_are_not_averaged_and_say_so():
    runs = [
        record(NUMBERS, 0),
        record(NUMBERS, 1),
        record(NUMBERS, 2, epochs=3),
        record(NUMBERS, 0, image_size=96),
    ]
    shown = table("table1", runs)
    assert [(b.image_size, sorted(len(l.runs) for l in b.lines if l.runs)) for b in shown.blocks] == [
        (80, [1, 2]),
        (96, [1]),
    ]
    assert [l.note for l in shown.blocks[0].lines if len(l.runs) == 1] == ["seed 2; epochs 3"]


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30)


@given(names)
@settings(max_examples=25, deadline=None)
def test_any_name_stays_text(name):
    runs = [record(NUMBERS)]
    runs[0].dataset["name"] = name
    shown = table("table1", runs, datasets=[name])
    rows = html_rows(shown.html())
    assert len({len(r) for r in rows if len(r) > 7}) <= 2 and any(
        name.strip() in r[0] for r in rows if len(r) == 1
    )
    assert "<script" not in shown.html() or "<script" not in name


def test_a_changed_record_is_not_drawn_and_the_report_goes_on(runs_dir, tmp_path):
    folder = Path(shutil.copytree(runs_dir, tmp_path / "runs"))
    changed = next(r for r in load_runs(folder) if row_key(r) == ("cadm", 0.5))
    (changed.folder / "maps.npz").write_bytes(b"not what it was")
    (changed.folder / "scores.npz").unlink()
    lost = next(r for r in load_runs(folder) if row_key(r) == ("baseline", None))
    (lost.folder / "run.json").write_text("{ half")
    page = build_report(folder, tmp_path / "out").path.read_text()
    assert (
        page.count("is not drawn") == 4 and "differs from the checksum" in page and str(tmp_path) not in page
    )
    assert (
        build_explorers(load_runs(folder), tmp_path / "out") == {}
    )  # the maps cannot be trusted: no explorer
    assert "its run.json cannot be read" in page and [u.name for u in standing(folder).unfinished] == [
        lost.name
    ]


def test_stale_rows_of_the_workflow_are_marked(runs_dir, tmp_path):
    folder = Path(shutil.copytree(runs_dir, tmp_path / "runs"))
    one = next(r for r in load_runs(folder) if row_key(r) == ("baseline", None))
    status = {
        "schema": "cadm-status/1",
        "runs": [
            {"run": f"scenes-coco/{one.name}", "state": "stale", "reason": "changed since: loss"},
            {"run": "scenes-nus/cadm-lam0.5-seed0-12345678", "state": "failed", "reason": "ValueError: <b>"},
        ],
    }
    (folder / "status.json").write_text(json.dumps(status))
    known, runs = standing(folder), load_runs(folder)
    states = {l.key: l.state for l in table("table1", runs, known=known).blocks[0].lines}
    assert states == {key: "stale" if key == ("baseline", None) else "measured" for key in ROWS}
    nus = {l.key: (l.state, l.note) for l in table("table2", runs, known=known).blocks[0].lines}
    assert nus["cadm", 0.5] == ("failed", "failed: ValueError: <b>") and nus["cadm", 0.0][0] == "missing"
    assert "ValueError: &lt;b&gt;" in table("table2", runs, known=known).html()


def test_the_report_stands_alone_and_does_not_know_where_it_is(runs_dir, tmp_path):
    shutil.copytree(runs_dir, tmp_path / "other place" / "x")
    program = (
        "import sys; from cadm_paper.engine.record import load_runs; from cadm_paper.app.report import build_report; from cadm_paper.app.explorer import build_explorers\n"
        "build_report(*sys.argv[1:], build_explorers(load_runs(sys.argv[1]), sys.argv[2]))"
    )
    ours = build_report(
        runs_dir, tmp_path / "one", build_explorers(load_runs(runs_dir), tmp_path / "one")
    ).path
    subprocess.run(
        [sys.executable, "-c", program, "x", "y"],
        cwd=tmp_path / "other place",
        check=True,
        env={**os.environ, "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7"},
    )
    page, theirs = ours.read_text(encoding="utf-8"), tmp_path / "other place" / "y"
    assert page == (theirs / "index.html").read_text(encoding="utf-8")
    assert (ours.parent / "explorer.html").read_bytes() == (theirs / "explorer.html").read_bytes()
    addresses = re.findall(r"""(?:src|href|action|data)=["']([^"']*)""", page)
    ids = set(re.findall(r'id="([^"]*)"', page))
    beside = {
        a for a in addresses if not a.startswith(("data:", "#"))
    }  # the one page that stands beside it, and nothing else
    assert beside == {"explorer.html"} == {p.name for p in ours.parent.iterdir()} - {"index.html"}
    assert addresses and all(
        a in beside or a.startswith("data:") or a.removeprefix("#") in ids for a in addresses
    )
    assert (
        not re.search(r"<script|<iframe|@import|https?://", page)
        and str(ROOT) not in page
        and str(tmp_path) not in page
    )


def papermill(notebook: str, cwd: Path, **parameters) -> subprocess.CompletedProcess:
    """Execute an experiment's notebook as a user does; parameters as text."""
    given = [w for k, v in parameters.items() for w in ("-p", k, str(v))]
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "CADM_OUTPUTS")}
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--no-progress-bar",
        "-k",
        "python3",
        str(EXPERIMENTS / f"{notebook}.ipynb"),
        str(cwd / "out.ipynb"),
        *given,
    ]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "notebook, files",
    [
        ("table1", ["table1.csv", "table1.html", "table1.json", "table1.md"]),
        ("fig4", [f"figure4-scenes-coco.{form}" for form in ("pdf", "png", "svg")]),
    ],
)
def test_notebooks_run_from_any_folder(notebook, files, runs_dir, tmp_path):
    pytest.importorskip("papermill")
    done = papermill(notebook, tmp_path, runs_dir=os.path.relpath(runs_dir, tmp_path), out_dir="made here")
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.name for p in (tmp_path / "made here").iterdir()) == files


@pytest.mark.parametrize("given, said", [({}, "cadm reproduce"), ({"imags": 3}, "did you mean 'images'")])
def test_notebooks_stop_without_records_and_on_unknown_names(given, said, tmp_path):
    pytest.importorskip("papermill")
    done = papermill("fig2", tmp_path, **given)
    assert done.returncode != 0 and said in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"]

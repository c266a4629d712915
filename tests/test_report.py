"""Tables and report from run records: any numbers and names, damaged records, notebooks in other folders, the
page itself.
"""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from cells import run_cells
from hypothesis import given, settings
from hypothesis import strategies as st

from cadm_paper.app.explorer import build_explorers
from cadm_paper.app.report import build_report
from cadm_paper.engine.config import TrainConfig, config_digest
from cadm_paper.engine.record import RunRecord, load_runs
from cadm_paper.engine.synthetic import synthetic_run, synthetic_runs
from cadm_paper.engine.variants import MAIN, Variant
from cadm_paper.paper import COLUMNS
from cadm_paper.results.claims import read_verdicts
from cadm_paper.tables import run_status, table

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "runs"
    synthetic_runs(folder, ["scenes-coco"], images=40, classes=6, drawn=2)
    return folder


@pytest.fixture(scope="module")
def report(runs_dir, tmp_path_factory) -> Path:
    """The folder of a report with its explorer."""
    out = tmp_path_factory.mktemp("report")
    build_report(runs_dir, out, build_explorers(load_runs(runs_dir), out))
    return out


@pytest.fixture
def runs_copy(runs_dir, tmp_path):
    """A copy of the runs to damage, and the folder of each variant's run."""
    folder = Path(shutil.copytree(runs_dir, tmp_path / "runs"))
    return folder, {Variant.of(r): r.folder for r in load_runs(folder)}


def record(values: dict, seed: int = 0, **config) -> RunRecord:
    """A record in memory, without files."""
    config, where = (
        TrainConfig(dataset="scenes-coco", seed=seed, **config),
        Path("scenes-coco") / f"seed{seed}",
    )
    data = {"name": config.dataset, "classes": []}
    return RunRecord(where, where.name, config, values, [], data, {}, {}, {}, config_digest(config), {})


def html_rows(text: str) -> list[list[str]]:
    """The texts of the cells by row; the fragment must be well-formed."""
    return [["".join(cell.itertext()) for cell in row] for row in ElementTree.fromstring(text).iter("tr")]


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30)
NUMBERS = st.lists(st.fixed_dictionaries({c: st.floats(0, 1) for c in COLUMNS}), min_size=1, max_size=4)


@given(NUMBERS, NAMES)
@settings(max_examples=25, deadline=None)
def test_all_formats_of_a_table_agree_and_escape_names(numbers, name):
    runs = [replace(record(v, seed), dataset={"name": name}) for seed, v in enumerate(numbers)]
    shown = table("table1", runs, datasets=[name])
    assert any(name in row[0] for row in html_rows(shown.html()) if len(row) == 1)
    line = next(row for row in shown.rows() if row["part"] == "measured" and row["lam"] == 0.5)
    in_csv = next(row for row in csv.DictReader(io.StringIO(shown.csv())) if row["row"] == line["row"])
    in_html = next(row for row in html_rows(shown.html()) if row[0].startswith(line["row"]))
    in_md = next(l for l in shown.markdown().splitlines() if l.startswith(f"| {line['row']}")).split(" | ")
    assert line["n"] == len(numbers) == int(in_csv["n"])
    for place, c in enumerate(COLUMNS, 1):
        each = [100 * v[c] for v in numbers]
        texts = (in_html[place].split("±")[0], in_md[place].split(" ± ")[0].strip(" |"))
        assert all(abs(float(text) - np.mean(each)) < 0.0501 for text in texts)
        assert abs(line["percent"][c] - np.mean(each)) < 1e-9 and abs(float(in_csv[c]) - np.mean(each)) < 1e-3
        assert len(numbers) == 1 or abs(line["sd"][c] - np.std(each, ddof=1)) < 1e-9


def test_measured_numbers_link_their_records_and_differences_are_unrounded():
    values = {0.0: 0.76949, 0.5: 0.77951}  # 76.9 and 78.0
    runs = [record(dict.fromkeys(COLUMNS, v), s, lam=lam) for s in (0, 1) for lam, v in values.items()]
    shown = table("table1", runs)
    assert "mAP +1.0" in shown.files()["html"]
    found = ElementTree.fromstring(shown.html())
    lines = [row.iter("a") for row in found.iter("tr") if row.get("class") == "measured"]
    for line, lam in zip(lines, values, strict=True):
        (place,) = {a.get("href") for a in line}
        (listed,) = (body for body in found.iter("tbody") if f"#{body.get('id')}" == place)
        digests = [code.get("title") for code in listed.iter("code")]
        assert digests == [r.digest for r in runs if r.config.lam == lam]


def test_runs_of_other_recipes_are_separate_rows():
    same = {c: 0.5 for c in COLUMNS}
    others = [record(same, 2, epochs=3), record(same, 0, image_size=96), record(same, 0, hinge="outside")]
    shown = table("table1", [record(same, 0), record(same, 1), *others])
    lines = [[(line.label, line.note) for line in block.lines if line.runs] for block in shown.blocks]
    cadm = "CADM (λ = 0.5)"
    usual, longer = (cadm, "n = 2, seeds 0, 1"), (cadm, "seed 2; epochs 3")
    assert lines == [[usual, longer, (f"{cadm}, hinge outside", "seed 0")], [(cadm, "seed 0")]]


@pytest.mark.filterwarnings("ignore:left out")
def test_a_modified_record_is_not_plotted_and_the_report_is_complete(runs_copy, tmp_path):
    folder, home = runs_copy
    (home[MAIN[4]] / "maps.npz").write_bytes(b"not what it was")
    (home[MAIN[4]] / "scores.npz").unlink()
    (home[MAIN[2]] / "run.json").write_text("{ half")
    page = build_report(folder, tmp_path / "out").read_text()
    assert (
        page.count("is not drawn") == 3 and "differs from the checksum" in page and str(tmp_path) not in page
    )
    assert "its run.json cannot be read" in page
    assert build_explorers(load_runs(folder), tmp_path / "out") == {}  # the maps cannot be trusted


def test_rows_without_a_current_record_have_a_reason(runs_copy):
    folder, home = runs_copy
    stale, other = (json.loads((home[v] / "run.json").read_text()) for v in (MAIN[2], MAIN[3]))
    other["environment"]["code"]["commit"] = "9e05b3d31c"
    for variant, content in ((MAIN[2], stale | {"digest": "of another meaning"}), (MAIN[3], other)):
        (home[variant] / "run.json").write_text(json.dumps(content))
    failed = folder / "scenes-nus" / "cadm-lam0.5-seed0-12345678" / "failed.txt"
    failed.parent.mkdir(parents=True)
    failed.write_text("ValueError: <b>")
    coco, nus = (table(name, load_runs(folder), status=run_status(folder)) for name in ("table1", "table2"))
    measured = ("measured", "seed 0")
    *lines, others = coco.blocks[0].lines
    assert others.note.startswith("no record: CNN-RNN; ")
    assert [(line.state, line.note) for line in lines] == [
        measured,
        measured,
        ("stale", "seed 0; stale: made with another configuration"),
        ("measured", "seed 0; made by commit 9e05b3d, clean"),
        measured,
    ]
    assert [line.state for line in nus.blocks[0].lines] == ["missing"] * 4 + ["failed", "missing"]
    assert "failed: ValueError: &lt;b&gt;" in nus.html()


def test_committed_records_are_marked_and_warnings_are_beside_their_table(report):
    page = (report / "index.html").read_text(encoding="utf-8")
    before, tables = page.split('<h2 id="tables">')
    mine, committed = before.split('<h2 id="measured">')[1].split('<div class="card">')[1:]
    assert "one seed" in mine and "records of a committed study" not in mine
    assert "over 1 or 8 seeds" in committed and "records of a committed study" in committed
    assert before.count('<p class="warn">') == 1 and "rows differ in code" in tables


@pytest.mark.slow
def test_the_report_does_not_depend_on_folder_time_zone_or_hash_seed(report, runs_dir, tmp_path):
    place = tmp_path / "other place"
    shutil.copytree(runs_dir, place / "x")
    program = (
        "from cadm_paper.engine.record import load_runs\n"
        "from cadm_paper.app.report import build_report\n"
        "from cadm_paper.app.explorer import build_explorers\n"
        "build_report('x', 'y', build_explorers(load_runs('x'), 'y'))"
    )
    env = {**os.environ, "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program], cwd=place, check=True, env=env)
    assert {p.name for p in report.iterdir()} == {"index.html", "explorer.html"}
    assert all(file.read_bytes() == (place / "y" / file.name).read_bytes() for file in report.iterdir())


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv("CADM_OUTPUTS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "notebook, files",
    [
        ("table1", ["table1.csv", "table1.html", "table1.json", "table1.md"]),
        ("fig4", [f"figure4-scenes-coco.{form}" for form in ("pdf", "png", "svg")]),
    ],
)
def test_notebooks_run_from_any_folder(notebook, files, runs_dir, elsewhere):
    run_cells(notebook, runs_dir=os.path.relpath(runs_dir), out_dir="some folder")
    assert sorted(p.name for p in (elsewhere / "some folder").iterdir()) == files


@pytest.mark.parametrize(
    "given, message", [({}, "cadm reproduce"), ({"imags": "3"}, "did you mean 'images'")]
)
def test_notebooks_stop_without_records_and_on_unknown_names(given, message, elsewhere):
    with pytest.raises(ValueError, match=message):
        run_cells("fig2", **given)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("page", ["study_digitscenes", "study_maps", "study_photographs", "study_recipe"])
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_study_pages_say_what_is_not_run(tmp_path, page):
    """`cadm reproduce --config studies` executes a page that also has a part for other data."""
    run_cells(page, runs_dir=str(tmp_path))
    claims = read_verdicts(str(tmp_path))["claims"]
    assert all(claim["verdict"] == "not run" for claim in claims)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_the_page_on_photographs_reads_the_runs_of_its_batch(tmp_path):
    """`cadm reproduce --config voc2007`: two learning rates of one variant, and no measured maps."""
    small = dict(images=30, classes=6, drawn=2)
    synthetic_runs(tmp_path, ["voc2007", "coco40k"], seeds=(1, 2), **small)
    for seed in (1, 2):
        folder = tmp_path / "voc2007" / f"own-rate-{seed}"
        synthetic_run(folder, dataset="voc2007", method="baseline_gap", lr=0.0009, seed=seed, **small)
    page = run_cells("study_photographs", runs_dir=str(tmp_path))
    assert {len(seeds) for seeds in page["four"].values()} == {2} and len(page["lines"]) == 4  # COCO-40k
    claims = {claim["id"]: claim for claim in read_verdicts(str(tmp_path))["claims"]}
    assert claims["maps-voc2007"]["n"] == 2 and "with its own" in claims["maps-voc2007"]["measured"]

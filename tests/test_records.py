"""Forged, damaged and foreign records: submitted, listed and shown beside others."""

import copy
import functools
import json
import operator
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import expit

from cadm_paper.app.batch import WorkflowError
from cadm_paper.app.report import build_report
from cadm_paper.app.runs import runs_list, runs_submit, summary
from cadm_paper.engine.audit import of_streams, problems
from cadm_paper.engine.checkpoint import load_checkpoint
from cadm_paper.engine.config import TrainConfig, config_digest
from cadm_paper.engine.record import RecordError, RunRecord, load_runs, save_arrays, source
from cadm_paper.engine.synthetic import synthetic_run, synthetic_runs
from cadm_paper.engine.variants import run_name
from cadm_paper.files import sha256_file, write_json
from cadm_paper.tables import run_status, table

ROOT = Path(__file__).resolve().parents[1]


def content_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    """A consistent record without the mark of a synthetic one."""
    folder = tmp_path_factory.mktemp("honest")
    synthetic_run(folder, images=40, classes=6, drawn=3, epochs=10)
    content = content_of(folder)
    del content["synthetic"]
    write_json(folder / "run.json", content)
    return folder


@pytest.fixture
def given(honest, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CADM_DATA", str(tmp_path / "data"))  # not the scenes of the checkout
    return Path(shutil.copytree(honest, tmp_path / "given"))


def submit(folder: Path, by: str = "a reader") -> Path:
    """Submit a record; return its new folder."""
    outputs = folder.parent / "outputs"
    runs_submit(folder, by, outputs)
    return next(outputs.rglob("run.json")).parent


def refuse(folder: Path, says: str) -> None:
    """The submission is rejected with this message and leaves no file."""
    with pytest.raises(ValueError, match=says):
        submit(folder)
    left = [p for p in (folder.parent / "outputs").rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert [p.name for p in left if p.name != ".lock"] == []


def relabel(content: dict, **fields) -> None:
    """Change the configuration with its name and digest, so that only other parts contradict it."""
    config = TrainConfig(**content["config"] | fields)
    content["config"] |= fields
    content |= {"name": run_name(config), "digest": config_digest(config)}


FORGED = {
    "a metric": (lambda c: c["metrics"].update(mAP=0.9), r"metrics.mAP = 0.9"),
    "a stream's metric": (lambda c: c["metrics"].update(mAP_fcls=0.1), "metrics.mAP_fcls"),
    "the best epoch": (lambda c: c["metrics"].update(epoch_best=1), "metrics.epoch_best"),
    "a metric's type": (lambda c: c["metrics"].update(mAP="0.9"), "metrics.mAP = '0.9'"),
    "a truth value": (lambda c: c["metrics"].update(mAP=True), "metrics.mAP = True"),
    "no metric": (lambda c: c["metrics"].pop("CF1"), "CF1 is missing"),
    "an unknown metric": (lambda c: c["metrics"].update(mAP_new=0.5), "metrics.mAP_new: unknown"),
    "a class": (lambda c: c["per_class_ap"].__setitem__(2, 0.123), "per_class_ap.synth-2"),
    "a row": (lambda c: c["config"].update(lam=0.25), "run.digest"),
    "a row with its digest": (lambda c: relabel(c, lam=0.25), "history, epoch 1.loss"),
    "a row without the loss": (lambda c: relabel(c, lam=0.0), "history, epoch 1.loss_lce"),
    "a method": (lambda c: relabel(c, method="baseline", lam=0.0), "not those of baseline for its streams"),
    "a name": (lambda c: c.update(name="../../other"), "name = '../../other'"),
    "the digest": (lambda c: c.update(digest="0" * 64), "run.digest"),
    "a data set": (lambda c: relabel(c, dataset="scenes-nus"), "run.dataset"),
    "fewer epochs": (lambda c: c["history"].pop(), "epochs are expected"),
    "epochs in another order": (lambda c: c["history"].reverse(), "history, epoch 1.epoch"),
    "a learning rate": (lambda c: c["history"][3].update(lr=0.5), "epoch 4.lr"),
    "a loss": (lambda c: c["history"][3].update(loss=0.5), "epoch 4.loss"),
    "an epoch's mAP": (lambda c: c["history"][3].update(mAP=1.5), "history.3.mAP = 1.5"),
    "an epoch's missing mAP": (lambda c: c["history"][9].update(mAP=None), "epoch 10: mAPs are expected"),
    "the last epoch": (lambda c: c["history"][-1].update(mAP=0.4), "last epoch.mAP"),
    "a word in the history": (lambda c: c["history"][3].update(loss="low"), "history.3.loss = 'low'"),
    "a time below zero": (lambda c: c["timing"].update(cpu_s=-1.0), "timing.cpu_s"),
    "no machine": (lambda c: c.update(machine={}), "machine.device: Field required"),
    "images": (lambda c: c["dataset"]["test"].update(images=41), "scores.npz"),
    "labels": (lambda c: c["dataset"]["test"]["positives"].update({"synth-0": 3}), "positives"),
    "a count's type": (
        lambda c: c["dataset"]["train"].update(ignored="none"),
        "dataset.train.ignored = 'none'",
    ),
    "the fingerprint": (lambda c: c["dataset"]["test"].update(fingerprint="0" * 64), "test.fingerprint"),
    "classes": (lambda c: c["dataset"]["classes"].reverse(), "scores.npz: classes differ"),
    "a file": (
        lambda c: c["files"].update({"evidence.npz": "0" * 64}),
        "'evidence.npz' is not a file of a run",
    ),
    "a file elsewhere": (lambda c: c["files"].update({"../../secret": "0" * 64}), "is not a file of a run"),
    "too many files": (
        lambda c: c["files"].update(dict.fromkeys(map(str, range(200)), "0" * 64)),
        "files = ",
    ),
    "a checksum": (
        lambda c: c["files"].update({"maps.npz": "0" * 64}),
        "maps.npz: differs from the checksum in run.json",
    ),
    "an unknown part": (lambda c: c.update(note="<b>"), "note: unknown"),
    "the code's type": (lambda c: c["environment"].update(code=[]), "environment.code"),
    "a synthetic one": (lambda c: c.update(synthetic=True), "synthetic: unknown"),
    "photographs": (
        lambda c: (relabel(c, dataset="coco2014"), c["dataset"].update(name="coco2014")),
        "photographs stay under their owners' terms",
    ),
    "another schema": (lambda c: c.update(schema="cadm-run/9"), "schema 'cadm-run/2' expected"),
}


@pytest.mark.parametrize("change, says", FORGED.values(), ids=FORGED)
def test_a_forged_record_is_rejected(given, change, says):
    content = content_of(given)
    change(content)
    write_json(given / "run.json", content)
    refuse(given, says)


def rewrite(folder: Path, file: str, **arrays) -> None:
    """Change arrays of a file and update its checksum."""
    found, content = dict(np.load(folder / file)), content_of(folder)
    save_arrays(folder / file, **{k: v for k, v in (found | arrays).items() if v is not None})
    content["files"][file] = sha256_file(folder / file)
    write_json(folder / "run.json", content)


HALF = np.full((40, 6), 0.5, np.float32)
ARRAYS = [
    ("scores.npz", dict(scores=HALF), "metrics"),
    ("scores.npz", dict(scores_fcls=HALF), "metrics.mAP_fcls"),
    ("scores.npz", dict(scores=HALF * np.nan), "not finite or out of range"),
    ("scores.npz", dict(scores=HALF + 1), "not finite or out of range"),
    ("scores.npz", dict(scores_scls=None), "'scores_scls' is missing"),
    ("scores.npz", dict(scores=HALF[:, :3]), "does not match the record"),
    ("scores.npz", dict(targets=np.ones((40, 6), np.int8)), "dataset.test"),
    ("scores.npz", dict(image_ids=np.array(["a"] * 40)), "image ids"),
    ("scores.npz", dict(secret=HALF), "scores.npz: secret: unknown"),
    ("scores.npz", dict(classes=np.array([{}] * 6, object)), "no arrays"),
    ("maps.npz", dict(indices=np.arange(3)), "not the images that the fixed seed draws"),
    ("maps.npz", dict(scores=HALF[:3]), "scores differ from scores.npz"),
    ("maps.npz", dict(maps=np.zeros((3, 6, 10, 10), np.float16)), "the maps do not give the scores"),
    ("maps.npz", dict(secret=HALF), "maps.npz: secret: unknown"),
    ("maps.npz", dict(thumbnails=np.zeros((3, 8, 8), np.uint8)), "thumbnails is uint8"),
]


@pytest.mark.parametrize(
    "file, arrays, says", ARRAYS, ids=[f"{f} {next(iter(a))} {n}" for n, (f, a, _) in enumerate(ARRAYS)]
)
def test_forged_arrays_are_rejected(given, file, arrays, says):
    rewrite(given, file, **arrays)
    refuse(given, says)


@pytest.mark.parametrize("file", ["run.json", "scores.npz"])
@pytest.mark.parametrize("put", [os.mkfifo, lambda path: None], ids=["pipe", "nothing"])
def test_missing_files_and_pipes_are_rejected(given, file, put):
    (given / file).unlink()
    put(given / file)
    refuse(given, file)


def test_a_consistent_record_is_accepted_once_and_names_its_submitter(given, tmp_path):
    (given / "private.txt").write_text("of the sender")
    by = "<img src=x onerror=alert(1)>\n"
    there = submit(given, by)
    names = {p.name for p in there.rglob("*") if p.is_file()}
    assert names - {".lock"} == {"run.json", "scores.npz", "maps.npz"}
    record = RunRecord.load(there)
    assert record.submitted == by.strip() and f"submitted, by {by.strip()}" in source(record)
    with pytest.raises(WorkflowError, match="there is a run of this configuration"):
        runs_submit(given, "another", tmp_path / "outputs")
    page = build_report(tmp_path / "outputs" / "runs", tmp_path / "report").read_text()
    assert page.count("submitted, by &lt;img") >= 3 and "<img src=x" not in page  # table, bars, runs


def test_a_submission_does_not_touch_an_unfinished_run(given):
    target = given.parent / "outputs" / "runs" / "scenes-coco" / content_of(given)["name"]
    target.mkdir(parents=True)
    with pytest.raises(WorkflowError, match="there is a run of this configuration"):
        submit(given)
    assert not list(target.iterdir())


def test_labels_must_match_the_other_runs(given):
    synthetic_run(
        given.parent / "outputs" / "runs" / "scenes-coco" / "other", images=50, classes=6, drawn=2, seed=3
    )
    with pytest.raises(WorkflowError, match="dataset.test: not the images and labels of the other runs"):
        submit(given)


def test_runs_added_to_a_study_leave_its_arrays(tmp_path):
    small = dict(images=30, classes=6, drawn=2, epochs=10)

    def add(seed: int, *options: str) -> dict[int, list[str]]:
        """Add a run with this seed; return the files of each seed's arrays in the study."""
        synthetic_run(tmp_path / f"{seed}" / "run", seed=seed, **small)
        command = [sys.executable, ROOT / "tools" / "store_runs.py", tmp_path / f"{seed}", tmp_path / "study"]
        subprocess.run([*command, *options], check=True, capture_output=True)
        return {r.config.seed: [f for f in r.files if r.holds(f)] for r in load_runs(tmp_path / "study")}

    first = add(1, "--keep", "scores.npz", "maps.npz")
    assert sorted(first[1]) == ["maps.npz", "scores.npz"]
    assert add(2, "--keep") == {**first, 2: []}


def test_the_committed_records_pass_the_audit():
    found = load_runs(ROOT / "outputs" / "reference")
    assert (
        len(found) > 190 and {r.name: problems(r, kept=False) for r in found if problems(r, kept=False)} == {}
    )


def test_the_audit_accepts_streams_whose_scores_round_to_one():
    """In float32 a logit of 40 has the score 1, so the mean of both logits cannot be computed from scores."""
    record = SimpleNamespace(config=TrainConfig())
    score = lambda *logits: expit(np.array([logits], np.float32))
    found = {"scores_fcls": score(40.0, 1.0), "scores_scls": score(-20.0, 3.0), "scores": score(10.0, 2.0)}
    assert found["scores_fcls"][0, 0] == 1 and not [*of_streams(record, found)]
    assert [*of_streams(record, found | {"scores": score(10.0, 3.0)})]
    assert [*of_streams(record, found | {"scores": score(-4.0, 2.0)})]  # below the mean of 16 and -20


BAD = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "of wrong types": lambda text: text.replace('"history": [', '"history": ["x", '),
    "without classes": lambda text: text.replace('"classes": [', '"klasses": ['),
    "with NaN": lambda text: text.replace('"mAP": ', '"mAP": NaN, "x": ', 1),
    "of fewer classes": lambda text: json.dumps(json.loads(text) | {"per_class_ap": [0.5]}),
    "of another schema": lambda text: text.replace("cadm-run/2", "cadm-run/3"),
}


@pytest.mark.filterwarnings("ignore:left out")
def test_bad_records_do_not_affect_the_others(tmp_path, capsys):
    runs = tmp_path / "runs"
    synthetic_runs(runs, ["scenes-coco"], images=40, classes=6, drawn=2)
    rows = table("table1", load_runs(runs)).rows()
    template = next(runs.rglob("run.json")).read_text()
    for n, change in enumerate(BAD.values()):
        (runs / "scenes-coco" / f"bad {n}").mkdir()
        (runs / "scenes-coco" / f"bad {n}" / "run.json").write_text(change(template))
    (runs / "scenes-coco" / "bad folder" / "run.json").mkdir(parents=True)
    (runs / "scenes-coco" / "bad link").symlink_to(tmp_path)
    assert len(load_runs(runs)) == 5
    assert table("table1", load_runs(runs), status=run_status(runs)).rows() == rows
    page = build_report(runs, tmp_path / "report").read_text()
    assert page.count("cannot be read") == len(BAD) + 1 and "is not drawn" not in page
    runs_list(outputs=tmp_path)
    assert capsys.readouterr().out.count("unreadable") == len(BAD) + 1


STRANGE = [
    None,
    True,
    -1,
    1e308,
    float("inf"),
    "",
    "</script><b>",
    "\x00",
    "../..",
    [],
    {},
    [[]],
    {"a": None},
    10**30,
]


def places(part, path=()):
    """The path of each value in nested parts of a record, also of the parts themselves."""
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in items:
        yield *path, key
        yield from places(value, (*path, key))


def test_a_mutated_record_is_read_or_rejected_in_one_line(honest):
    """Each value in turn, and each part, is replaced by a random other one."""
    draw, content, kept = random.Random(7), content_of(honest), 0
    for *path, key in places(content):
        changed = copy.deepcopy(content)
        functools.reduce(operator.getitem, path, changed)[key] = draw.choice(STRANGE)
        try:
            record = RunRecord.from_dict(changed, honest)
        except RecordError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            continue
        kept += 1
        assert all(isinstance(problem, str) for problem in problems(record))
        assert table("table1", [record]).html() and summary(record)
    assert 0 < kept < 100


@pytest.mark.parametrize("content", [b"", b'{"schema": "cadm-run/2", "na', b"\xff\x00 noise"])
@pytest.mark.parametrize("name, read", [("run.json", RunRecord.load), ("last.safetensors", load_checkpoint)])
def test_half_written_files_are_named_and_the_message_says_what_to_do(tmp_path, name, read, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*[Rr]emove it"):
        read(tmp_path if name == "run.json" else tmp_path / name)

"""Prediction, export and the command line with realistic inputs."""

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import papermill
import pytest
import skimage.data
import torch
import yaml
from cells import run_cells
from PIL import Image

from cadm_paper.app import cli
from cadm_paper.app.batch import WorkflowError, reproduce
from cadm_paper.app.export import export_run, model_card
from cadm_paper.app.parameters import TableParameters
from cadm_paper.app.predict import PRETRAINED, Predictor, predict_files, save_overlays
from cadm_paper.app.runs import runs_list
from cadm_paper.data.loading import load_image, prepare
from cadm_paper.data.photograph import read_photograph
from cadm_paper.engine.config import ConfigError, TrainConfig
from cadm_paper.engine.record import RunRecord
from cadm_paper.engine.synthetic import synthetic_run
from cadm_paper.files import default_folder
from cadm_paper.model import CADM
from cadm_paper.paper import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "nbs" / "experiments" / "train.ipynb"


def cadm(*words):
    """Exit code and output of a command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(SystemExit) as end:
        cli.main([*map(str, words)])
    return end.value.code, out.getvalue()


def given_on_the_command_line(monkeypatch, *words):
    """The configuration that `cadm train` starts with these words, or its error message."""
    found = []
    monkeypatch.setattr("cadm_paper.train.train", lambda config, **how: found.append(config))
    _, message = cadm("train", *words)
    return found[0] if found else message


def given_to_papermill(**parameters):
    """The configuration of train.ipynb with these parameters."""
    return run_cells("train", until="config = TrainConfig(", **parameters)["config"]


@pytest.mark.parametrize("word", ["None", "none"])
def test_no_weights_are_never_replaced_by_those_of_the_preset(monkeypatch, word):
    given = given_on_the_command_line(monkeypatch, "--preset", "paper", "--weights", word)
    assert given.weights == given_to_papermill(preset="paper", weights=None).weights == "none"
    assert TrainConfig(weights=None).weights == "none" and TrainConfig(preset="paper").weights == "imagenet"


def test_empty_values_are_errors(monkeypatch):
    assert "data_dir = ''" in given_on_the_command_line(monkeypatch, "--data-dir=")
    for wrong, says in (({"weights": ""}, "weights"), ({"lr": None}, "lr = None")):
        with pytest.raises(ConfigError, match=says):
            given_to_papermill(**wrong)


def test_papermill_reads_every_line_of_the_parameters_cell(recwarn, caplog):
    assert set(papermill.inspect_notebook(str(TRAIN))) == {*TrainConfig.model_fields, "resume"}
    assert not recwarn.list and not caplog.records


# ---- prediction ------------------------------------------------------------------------------------------------


def image(path, seed=0, size=(40, 32)):
    """Save a small image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    return path


def model(folder, classes=("traffic light", "dog", "cat"), **how):
    """Save a small untrained model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        how = dict(image_size=32, classes=classes, quiet=True) | how
        return CADM(len(classes), "narrow_resnet", None, **how).save_pretrained(folder / "model")


def predicted(tmp_path, *words):
    """Exit code and output of `cadm predict` without maps."""
    return cadm("predict", *words, "--checkpoint", tmp_path / "model", "--maps", "None")


def test_answers_before_a_crash_are_kept(tmp_path, monkeypatch):
    model(tmp_path)
    for n in range(5):
        image(tmp_path / "p" / f"{n}.jpg", n)
    read = lambda path: read_photograph(path) if path.name < "3.jpg" else 1 / 0
    monkeypatch.setattr("cadm_paper.app.predict.read_photograph", read)
    files = dict(json_file=tmp_path / "o.json", csv_file=tmp_path / "o.csv")
    with pytest.raises(ZeroDivisionError):
        predict_files([tmp_path / "p"], tmp_path / "model", **files)
    names = [str(tmp_path / "p" / f"{n}.jpg") for n in range(3)]
    assert [entry["image"] for entry in json.loads((tmp_path / "o.json").read_text())] == names
    assert [row["image"] for row in csv.DictReader((tmp_path / "o.csv").open())] == names


def test_unusual_files_in_a_folder(tmp_path):
    """Names that are not UTF-8, other suffixes; damaged, empty and dangling files give a line each."""
    model(tmp_path)
    p = tmp_path / "p"
    for name in (b"caf\xe9.jpg", b"b.jfif", b"c.jpe", b"d.JPG"):
        image(p / os.fsdecode(name))
    for name in ("broken.jpg", "._d.JPG", "notes.txt"):
        (p / name).write_bytes(b"not an image")
    (p / "empty.png").touch()
    (p / "gone.jpg").symlink_to("nowhere")
    code, out = predicted(tmp_path, p, "--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv")
    answers = json.loads((tmp_path / "o.json").read_text())
    rows = list(csv.DictReader((tmp_path / "o.csv").open(encoding="utf-8")))
    names = ["b.jfif", "c.jpe", r"caf\xe9.jpg", "d.JPG"]
    assert sorted(Path(a["image"]).name for a in answers) == names
    assert [(a["image"], f"{a['scores']['dog']:.6f}") for a in answers] == [
        (row["image"], row["dog"]) for row in rows
    ]
    errors = [line for line in out.splitlines() if line.startswith("cadm: ")]
    assert code == 2 and len(errors) == 3 and "skipped: 1 ._*, 1 .txt" in out
    assert all(sum(name in line for line in errors) == 1 for name in ("broken.jpg", "empty.png", "gone.jpg"))


@pytest.mark.parametrize(
    "classes",
    [
        ("traffic light", "dog", "cat"),
        ("a;b", "a", "b"),
        ("image", "labels", "a;|b"),
        ("$5_$10", "$5", "x^$"),
    ],
)
def test_labels_with_special_characters(tmp_path, classes):
    """They stay distinct in the CSV file, and are plotted literally, not as formulas."""
    model(tmp_path, classes)
    where = dict(csv_file=tmp_path / "o.csv", maps=tmp_path / "maps")
    (answer,), _ = predict_files([image(tmp_path / "a.jpg")], tmp_path / "model", threshold=0, **where)
    heads, cells = csv.reader((tmp_path / "o.csv").open())
    assert heads == ["image", "labels", *classes] and set(answer["labels"]) == set(classes)
    assert any(set(cells[1].split(joint)) == set(classes) for joint in (";", "|", "\t"))
    assert Path(answer["maps"]).is_file()


FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.mark.parametrize(
    "words, says",
    [
        (["--threshold=5"], "threshold"),
        (["--threshold=nan"], "threshold"),
        (["--json", "o.txt", "--csv", "./o.txt"], "o.txt is named twice"),
        (["--csv", "a.jpg"], "a.jpg is named twice"),
        pytest.param(["--json", "/dev/full"], "No space left on device: '/dev/full'", marks=FULL),
        pytest.param(["--csv", "/dev/full"], "No space left on device: '/dev/full'", marks=FULL),
    ],
)
def test_errors_of_predict(tmp_path, monkeypatch, words, says):
    model(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = image(tmp_path / "a.jpg").read_bytes()
    code, out = predicted(tmp_path, tmp_path / "a.jpg", *words)
    assert code == 2 and "cadm: " in out and says in out
    assert (tmp_path / "a.jpg").read_bytes() == before and not (tmp_path / "o.txt").exists()


def test_each_image_has_its_own_overlay(tmp_path):
    model(tmp_path)
    for name in ("x-2.png", "x.jpg", "x.png", "a/x.jpg"):
        image(tmp_path / "p" / name)
    answers, _ = predict_files([tmp_path / "p"], tmp_path / "model", maps=tmp_path / "maps")
    assert len({answer["maps"] for answer in answers}) == 4 == len([*(tmp_path / "maps").iterdir()])


def test_the_figure_of_a_strip_is_small(tmp_path):
    """A scan or a screenshot may be hundreds of times as high as wide; the figure is not."""
    strip = np.zeros((448, 1, 3), np.uint8)
    found = {"image": "strip.png", "picture": strip, "scores": {"cat": 0.9}, "maps": np.ones((1, 2, 2))}
    found["map_value"] = "logit at a position"
    assert max(Image.open(save_overlays(found, tmp_path / "maps.png")).size) < 2500


def test_an_ascii_terminal(tmp_path, monkeypatch):
    model(tmp_path, ("Käse", "犬", "cat"))
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    where = ["--checkpoint", str(tmp_path / "model"), "--maps", "None", "--threshold", "0"]
    with pytest.raises(SystemExit):
        cli.main(["predict", str(image(tmp_path / "ä.jpg")), *where])
    terminal.flush()
    assert rb"K\xe4se" in terminal.buffer.getvalue() and rb"\u72ac" in terminal.buffer.getvalue()


def test_prediction_uses_the_preprocessing_of_the_training(tmp_path):
    """Size (also oblong), resize, normalisation and orientation come from the model."""
    folder = model(tmp_path, image_size=(32, 64), normalise="half", resize="crop", exif=True)
    photo, turned = tmp_path / "a.jpg", Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    noise = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photo, exif=turned)
    found = Predictor.load(folder)(photo)
    assert found["picture"].shape == (20, 40, 3)  # the centre of the rotated image, in the input's shape
    seen = prepare(load_image(photo, (32, 64), resize="crop", exif=True)[None], normalise="half")
    expected = CADM.from_pretrained(folder)(seen).scores[0].tolist()
    np.testing.assert_allclose(list(found["scores"].values()), expected, rtol=1e-5)
    for other in (dict(exif=False), dict(resize="squash"), dict(normalise="imagenet")):
        assert Predictor.load(folder, **other)(photo)["scores"] != found["scores"]


def test_an_exported_run_predicts_like_the_run(tmp_path):
    run, config = tmp_path / "run", dict(preset="mini", resize="crop", normalise="half", image_size=32)
    classes = synthetic_run(run, **config, lam=0.5).dataset["classes"]
    model(run / "checkpoint", classes, normalise="half", resize="crop")
    photo, out = image(tmp_path / "a.jpg", size=(90, 40)), export_run(run, tmp_path / "out")
    assert Predictor.load(run)(photo)["scores"] == Predictor.load(out)(photo)["scores"]
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert processor["do_center_crop"] and processor["image_mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "what, names", [("export", "README.md"), ("export", "model"), ("model", "config.json")]
)
def test_a_folder_that_only_looks_like_an_export_or_a_model_is_kept(tmp_path, what, names):
    """A README of the user, the model of the run itself, a configuration of another program."""
    synthetic_run(tmp_path / "run", preset="mini")
    out = model(tmp_path / "run" / "checkpoint")
    if names != "model":
        out = tmp_path / "mine"
        out.mkdir()
        (out / names).write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    save = {
        "export": lambda: export_run(tmp_path / "run", out),
        "model": lambda: Predictor.load().model.save_pretrained(out),
    }
    with pytest.raises(FileExistsError, match="is not an? (exported|saved) model: choose another name"):
        save[what]()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_names_are_escaped_in_the_model_card(tmp_path):
    record = synthetic_run(tmp_path / "run", preset="mini")
    record.dataset["classes"], record.dataset["name"] = ["<img src=x>", "a|b"], "<b>own</b>\n---"
    card = model_card(record, 'x")<i>')
    assert "<" not in card and r"a\|b" in card and card.count("\n---\n") == 1


def test_home_folders_are_expanded(tmp_path, monkeypatch):
    """`~` in options, papermill parameters and environment variables."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model(tmp_path)
    image(tmp_path / "p" / "a.jpg")
    where = dict(json_file="~/o/a.json", csv_file="~/o/a.csv", maps="~/maps")
    assert len(predict_files(["~/p"], "~/model", **where)[0]) == 1
    np.savez(tmp_path / "s.npz", scores=np.eye(3) / 2 + 0.25, targets=np.eye(3))
    cadm("evaluate", "~/s.npz", "--json=~/e.json", "--csv", "~/e.csv", "--replicates", "0")
    assert TrainConfig(data_dir="~/d").data_dir == str(tmp_path / "d")
    assert TableParameters(runs_dir="~/r").folder == tmp_path / "r"
    monkeypatch.setenv("CADM_OUTPUTS", "~/outputs")
    assert default_folder("outputs") == tmp_path / "outputs" and not (tmp_path / "~").exists()
    assert all((tmp_path / name).is_file() for name in ("o/a.json", "o/a.csv", "e.json", "e.csv"))


# the object's box: left, right, top and bottom as fractions of the image
@pytest.mark.parametrize(
    "name, label, box",
    [("chelsea.png", "cat", (0.0, 0.8, 0.0, 1.0)), ("astronaut.png", "person", (0.05, 0.85, 0.03, 1.0))],
)
def test_the_packaged_model_recognises_and_locates(tmp_path, monkeypatch, name, label, box):
    photo = Path(skimage.data.__file__).parent / name
    found = Predictor.load()(photo)
    assert max(found["scores"], key=found["scores"].get) == label
    map_ = dict(zip(found["scores"], found["maps"]))[label]
    row, column = (np.unravel_index(map_.argmax(), map_.shape) + np.array(0.5)) / map_.shape
    assert box[0] < column < box[1] and box[2] < row < box[3]
    monkeypatch.chdir(tmp_path)
    code, text = cadm("predict", photo)
    assert code == 0 and f"{name}: {label} " in text
    assert (tmp_path / "maps" / f"{photo.stem}-maps.png").is_file()


def test_the_packaged_model_matches_its_record_and_card():
    record = RunRecord.from_dict(json.loads((PRETRAINED / "record.json").read_text()), PRETRAINED)
    model, card = Predictor.load().model, (PRETRAINED / "README.md").read_text(encoding="utf-8")
    assert model.classes == record.dataset["classes"] and model.config["backbone"] == record.config.backbone
    assert not record.config.holdout and record.dataset["test"]["images"] == 10_000
    facts = yaml.safe_load(card.split("---\n")[1])
    (tested,) = facts["model-index"][0]["results"]
    assert facts["license"] == "apache-2.0" and "MIT" in card
    shown = {m["name"]: m["value"] for m in tested["metrics"]}
    assert shown == {name: round(100 * record.metrics[name], 2) for name in COLUMNS}
    assert sum(path.stat().st_size for path in PRETRAINED.iterdir()) < 10e6


def test_a_reader_that_stops_is_no_error():
    """As in `cadm runs list | head -1`."""
    command = [sys.executable, "-m", "cadm_paper", "runs", "list"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, env=buffered, **pipes) as program:
        program.stdout.close()
        assert program.stderr.read() == b""


def test_studies_are_lines_of_the_list_and_an_empty_report_is_one_error(tmp_path, monkeypatch, capsys):
    runs_list(outputs=ROOT / "outputs")
    studies = [line for line in capsys.readouterr().out.splitlines() if "reference/studies/" in line]
    assert len(studies) == len(list((ROOT / "outputs" / "reference" / "studies").glob("*/runs.jsonl")))
    runs_list(outputs=tmp_path / "typo")
    assert f"no runs in {tmp_path / 'typo' / 'runs'}" in capsys.readouterr().out
    monkeypatch.setenv("CADM_OUTPUTS", str(tmp_path))
    with pytest.raises(WorkflowError, match="cadm reproduce"):
        reproduce(report_only=True)

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
from torchvision.models import ResNet18_Weights

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
from cadm_paper.results.evaluation import evaluate_files

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


def test_a_finished_run_is_reported_as_not_trained(monkeypatch, tmp_path):
    record = synthetic_run(tmp_path / "there", images=30, drawn=2)
    monkeypatch.setattr("cadm_paper.train.train", lambda config, **how: record)
    for place, reported in (("there", True), ("new", False)):
        code, text = cadm("train", "--out-dir", tmp_path / place)
        assert code == 0 and ("nothing was trained" in text) == reported


def test_given_values_are_never_dropped(monkeypatch):
    """`None` for weights means no weights, not the preset's; for a number it is an error; so is ""."""
    assert TrainConfig(preset="paper").weights == "imagenet" and TrainConfig(weights=None).weights == "none"
    assert TrainConfig(weights=ResNet18_Weights.DEFAULT).weights == "IMAGENET1K_V1"
    for word in ("None", "none"):
        assert (
            given_on_the_command_line(monkeypatch, "--preset", "paper", "--weights", word).weights == "none"
        )
    assert given_to_papermill(preset="paper", weights=None).weights == "none"
    assert given_on_the_command_line(monkeypatch, "--data-dir", "None").data_dir is None
    assert given_to_papermill(seed=3) == TrainConfig(seed=3)
    for name in ("weights", "data_dir", "out_dir"):
        message = given_on_the_command_line(monkeypatch, f"--{name.replace('_', '-')}=")
        assert f"{name} = ''" in message
        with pytest.raises(ConfigError, match=name):
            given_to_papermill(**{name: ""})
    with pytest.raises(ConfigError, match="lr = None"):
        given_to_papermill(lr=None)


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


def test_every_answer_is_written_before_the_next_image_is_read(tmp_path, monkeypatch):
    """After a crash at the fourth image, both files hold three answers."""
    model(tmp_path)
    for n in range(5):
        image(tmp_path / "p" / f"{n}.jpg", n)

    def crash(path):
        if path.name == "3.jpg":
            raise MemoryError
        return read_photograph(path)

    monkeypatch.setattr("cadm_paper.app.predict.read_photograph", crash)
    files = dict(json_file=tmp_path / "o.json", csv_file=tmp_path / "o.csv")
    with pytest.raises(MemoryError):
        predict_files([tmp_path / "p"], tmp_path / "model", **files)
    names = [str(tmp_path / "p" / f"{n}.jpg") for n in range(3)]
    assert [entry["image"] for entry in json.loads((tmp_path / "o.json").read_text())] == names
    assert [row["image"] for row in csv.DictReader((tmp_path / "o.csv").open())] == names


def test_unusual_files_in_a_folder(tmp_path):
    """Names that are not UTF-8, other suffixes; damaged, empty and dangling files give a line each and are
    skipped.
    """
    model(tmp_path)
    p = tmp_path / "p"
    for name in (b"caf\xe9.jpg", b"b.jfif", b"c.jpe", b"d.JPG"):
        image(p / os.fsdecode(name))
    (p / "broken.jpg").write_bytes(b"not an image")
    (p / "empty.png").touch()
    (p / "gone.jpg").symlink_to("nowhere")
    (p / "._d.JPG").write_bytes(b"Mac")
    (p / "folder.jpg").mkdir()
    (p / "notes.txt").touch()
    files = ["--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv"]
    code, out = predicted(tmp_path, p, *files)
    answers = json.loads((tmp_path / "o.json").read_text())
    rows = list(csv.DictReader((tmp_path / "o.csv").open(encoding="utf-8")))
    names = ["b.jfif", "c.jpe", r"caf\xe9.jpg", "d.JPG"]
    assert (
        sorted(Path(a["image"]).name for a in answers) == names == sorted(Path(r["image"]).name for r in rows)
    )
    errors = [line for line in out.splitlines() if line.startswith("cadm: ")]
    assert code == 2 and len(errors) == 3
    assert all(sum(name in line for line in errors) == 1 for name in ("broken.jpg", "empty.png", "gone.jpg"))
    assert "skipped: 1 ._*, 1 .txt" in out
    scores = Predictor.load(tmp_path / "model")(p / "b.jfif")["scores"]  # all are the same image
    for answer, row in zip(answers, rows):
        assert answer["scores"] == scores and float(row["dog"]) == round(scores["dog"], 6)


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("option", ["--json", "--csv"])
def test_a_full_disk_is_reported(tmp_path, option):
    model(tmp_path)
    code, out = predicted(tmp_path, image(tmp_path / "a.jpg"), option, "/dev/full")
    assert code == 2 and "cadm: [Errno 28] No space left on device: '/dev/full'" in out


@pytest.mark.parametrize("threshold", ["5", "-1", "nan", "inf"])
def test_invalid_thresholds(tmp_path, threshold):
    model(tmp_path)
    code, out = predicted(tmp_path, image(tmp_path / "a.jpg"), f"--threshold={threshold}")
    assert code == 2 and "threshold" in out


def test_an_ascii_terminal(tmp_path, monkeypatch):
    model(tmp_path, ("Käse", "犬", "cat"))
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    words = ["predict", image(tmp_path / "ä.jpg"), "--checkpoint", tmp_path / "model", "--maps", "None"]
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, words), "--threshold", "0"])
    terminal.flush()
    shown = terminal.buffer.getvalue()
    assert not end.value.code and rb"K\xe4se" in shown and rb"\u72ac" in shown


def test_prediction_uses_the_preprocessing_of_the_training(tmp_path):
    """Size (also oblong), resize, normalisation and orientation come from the model; missing ones are an
    error.
    """
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
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "normalise"}))
    code, out = predicted(tmp_path, photo, "--resize", "crop", "--exif", "true")
    assert code == 2 and "config.json does not say normalise" in out
    assert predicted(tmp_path, photo, "--resize", "crop", "--exif", "true", "--normalise", "half")[0] == 0


def test_an_exported_run_predicts_like_the_run(tmp_path):
    """Also for a run of an earlier version, whose saved model lacks the pre-processing."""
    run, config = tmp_path / "run", dict(preset="mini", resize="crop", normalise="half", image_size=32)
    classes = synthetic_run(run, **config, lam=0.5).dataset["classes"]
    model(run / "checkpoint", classes, normalise="half")
    saved = run / "checkpoint" / "model" / "config.json"
    old = {k: v for k, v in json.loads(saved.read_text()).items() if k not in ("resize", "normalise", "exif")}
    saved.write_text(json.dumps(old))
    photo, out = image(tmp_path / "a.jpg", size=(90, 40)), export_run(run, tmp_path / "out")
    expected = Predictor.load(run, resize="crop", normalise="half")(photo)["scores"]
    assert Predictor.load(run)(photo)["scores"] == expected == Predictor.load(out)(photo)["scores"]
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert processor["do_center_crop"] and processor["image_mean"] == [0.5, 0.5, 0.5]


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
    evaluate_files("~/s.npz", json="~/e.json", csv="~/e.csv", per_class="~/c.csv", replicates=0)
    cadm("evaluate", "~/s.npz", "--json=~/cli.json", "--replicates", "0")
    assert (tmp_path / "cli.json").is_file()
    assert CADM(3, "narrow_resnet", "~/model", classes=["a", "b", "c"]).provenance["source"] == "model"
    assert TrainConfig(data_dir="~/d").data_dir == str(tmp_path / "d")
    assert TableParameters(runs_dir="~/r").folder == tmp_path / "r"
    monkeypatch.setenv("CADM_OUTPUTS", "~/outputs")
    assert default_folder("outputs") == tmp_path / "outputs"
    assert (
        not (tmp_path / "~").exists()
        and (tmp_path / "o" / "a.csv").is_file()
        and (tmp_path / "c.csv").is_file()
    )


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


@pytest.mark.parametrize("sign", [1, -1])
def test_overlays_have_a_colour_scale_if_a_map_is_visible(tmp_path, monkeypatch, sign):
    scales = []
    monkeypatch.setattr("cadm_paper.figures.colour_bar", lambda figure, axes, limit: scales.append(limit))
    picture, maps = np.zeros((30, 40, 3), np.uint8), sign * np.full((2, 3, 3), 0.5, np.float32)
    found = {"image": "a", "scores": {"cup": 0.1, "oven": 0.05}, "picture": picture, "maps": maps}
    assert save_overlays(found, tmp_path / "a.png").is_file()
    assert scales == ([0.5] if sign > 0 else [])


def test_the_packaged_model_matches_its_record_and_card():
    content = json.loads((PRETRAINED / "record.json").read_text())
    record = RunRecord.from_dict(content, PRETRAINED)
    model, card = Predictor.load().model, (PRETRAINED / "README.md").read_text(encoding="utf-8")
    assert model.classes == record.dataset["classes"] and model.config["backbone"] == record.config.backbone
    assert Predictor.load().image_size == (record.config.image_size,) * 2 and record.config.exif
    assert not record.config.holdout and record.dataset["test"]["images"] == 10_000
    facts = yaml.safe_load(card.split("---\n")[1])
    (tested,) = facts["model-index"][0]["results"]
    assert facts["license"] == "apache-2.0" and "MIT" in card
    assert {m["name"]: m["value"] for m in tested["metrics"]} == {
        name: round(100 * record.metrics[name], 2) for name in COLUMNS
    }
    assert sum(path.stat().st_size for path in PRETRAINED.iterdir()) < 10e6


def test_a_reader_that_stops_is_no_error():
    """As in `cadm runs list | head -1`."""
    command = [sys.executable, "-m", "cadm_paper", "runs", "list"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        program.stdout.close()
        assert program.stderr.read() == b""


def test_studies_are_lines_of_the_list_and_an_empty_report_is_one_error(tmp_path, monkeypatch, capsys):
    runs_list(outputs=ROOT / "outputs")
    studies = [line for line in capsys.readouterr().out.splitlines() if "reference/studies/" in line]
    assert len(studies) == len(list((ROOT / "outputs" / "reference" / "studies").glob("*/runs.jsonl")))
    monkeypatch.setenv("CADM_OUTPUTS", str(tmp_path))
    with pytest.raises(WorkflowError, match="cadm reproduce"):
        reproduce(report_only=True)

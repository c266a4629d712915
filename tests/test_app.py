"""Prediction, export and the command line with the inputs of ordinary life."""

import json
from pathlib import Path

import papermill
import pytest

from cadm_paper.app import cli
from cadm_paper.engine.config import ConfigError, TrainConfig, given_parameters

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "nbs" / "experiments" / "train.ipynb"


def given_on_the_command_line(monkeypatch, *words):
    """The configuration that `cadm train` starts with these words."""
    found = []
    monkeypatch.setattr("cadm_paper.train.train", lambda config, **how: found.append(config))
    with pytest.raises(SystemExit):
        cli.main(["train", *words])
    return found[0] if found else None


def given_to_papermill(**parameters):
    """The configuration of train.ipynb with these parameters, as papermill sets them below its cell."""
    cells = json.loads(TRAIN.read_text())["cells"]
    (source,) = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    namespace = {"before": {"__builtins__"}}
    exec(source, namespace)
    namespace.pop("__annotations__", None)
    return TrainConfig(**given_parameters(namespace | parameters, namespace["before"]))


def test_what_is_given_is_never_dropped(monkeypatch, capsys):
    """`None` for weights is none of them, not the preset's; for a number it is refused; "" is not nothing."""
    assert TrainConfig(preset="paper").weights == "imagenet" and TrainConfig(weights=None).weights == "none"
    for word in ("None", "none"):
        assert (
            given_on_the_command_line(monkeypatch, "--preset", "paper", "--weights", word).weights == "none"
        )
    assert given_to_papermill(preset="paper", weights=None).weights == "none"
    assert given_on_the_command_line(monkeypatch, "--data-dir", "None").data_dir is None
    assert given_to_papermill(seed=3) == TrainConfig(seed=3)
    for name in ("weights", "data_dir", "out_dir"):
        assert given_on_the_command_line(monkeypatch, f"--{name.replace('_', '-')}=") is None
        assert f"{name} = ''" in capsys.readouterr().err
        with pytest.raises(ConfigError, match=name):
            given_to_papermill(**{name: ""})
    with pytest.raises(ConfigError, match="lr = None"):
        given_to_papermill(lr=None)


def test_papermill_reads_every_line_of_the_parameters_cell(recwarn, caplog):
    assert set(papermill.inspect_notebook(str(TRAIN))) == {*TrainConfig.model_fields, "resume"}
    assert not recwarn.list and not caplog.records

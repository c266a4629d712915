"""Pretrained weights: their names, a read-only cache, concurrent callers."""

import os
import subprocess
import sys

import pytest

from cadm_paper import train as training
from cadm_paper.engine import pretrain as pretraining
from cadm_paper.engine.config import TrainConfig
from cadm_paper.engine.pretrain import PretrainConfig, pretrained_digits
from cadm_paper.files import sha256_file

SHORT = PretrainConfig(images=320, epochs=2)


def test_each_name_of_digit_weights_has_a_separate_seed(monkeypatch):
    asked = []
    monkeypatch.setattr(training, "pretrained_digits", lambda config: asked.append(config))
    for word in ("digits", "digits-1"):
        model = training.build_model(TrainConfig(weights=word, backbone="narrow_resnet_dilated"), "ab")
        assert model.provenance["source"] == word
    assert asked == [PretrainConfig("narrow_resnet_dilated", seed=seed) for seed in (0, 1)]


def test_finished_weights_are_returned_without_writing(tmp_path, monkeypatch):
    """Their folder may be read-only."""
    monkeypatch.setattr(pretraining, "pretrain", lambda config: pytest.fail("trained again"))
    monkeypatch.setattr(pretraining, "folder_lock", lambda *_, **how: pytest.fail("locked"))
    weights = tmp_path / f"narrow_resnet-{pretraining.pretrain_digest(SHORT)[:8]}" / "backbone.safetensors"
    weights.parent.mkdir()
    weights.touch()
    assert pretrained_digits(tmp_path, SHORT) == weights


@pytest.mark.slow
def test_concurrent_callers_train_once_and_weights_are_identical(tmp_path):
    """Two processes share a folder; this one uses another folder and other thread settings."""
    code = f"""
import sys
from cadm_paper.engine.pretrain import PretrainConfig, pretrained_digits
print(pretrained_digits(sys.argv[1], config={SHORT}))"""
    command, env = [sys.executable, "-c", code, str(tmp_path / "one")], {**os.environ, "OMP_NUM_THREADS": "2"}
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ours, (path, same) = pretrained_digits(tmp_path, config=SHORT), (p.communicate()[0].strip() for p in both)
    assert path == same and sha256_file(path) == sha256_file(ours)

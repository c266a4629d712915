"""The pretraining from outside: what it has seen, other processes, several callers at once."""

import json
import os
import subprocess
import sys

import pytest
import torch

from cadm_paper.data import scenes
from cadm_paper.data.scenes import CUT, TEST, TRAIN, digit_indices
from cadm_paper.engine.pretrain import (
    PretrainConfig,
    accuracy_on_test_digits,
    plan_single,
    pretrain,
    pretrain_record,
    pretrained_digits,
    single_digits,
)
from cadm_paper.files import sha256_file

SHORT = PretrainConfig(images=320, epochs=2, test_images=50)
CODE = "from cadm_paper.engine.pretrain import *; print(pretrained_digits({folder!r}, config=PretrainConfig(images=320, epochs=2, test_images=50)))"


def test_every_picture_of_the_default_pretraining_is_of_the_training_side():
    """By identity: each sample and each piece of a photograph that the default configuration paints, one by one."""
    config, allowed = PretrainConfig(), {int(i) for d in digit_indices(TRAIN) for i in d}
    digits = digit_indices(TRAIN)
    for i in range(config.images):
        plan, digit = plan_single(config, i)
        assert all(g.digit in allowed and g.digit in digits[digit] for g in plan.objects)
        assert plan.crop[0] >= 0 and plan.crop[0] + plan.crop[2] <= CUT


def test_training_paints_nothing_else(monkeypatch):
    """What `pretrain` really paints, seen where pixels are read: no other sample, no other column."""
    import cadm_paper.engine.pretrain as module

    painted = []
    monkeypatch.setattr(module, "paint", lambda scene: painted.append(scene) or scenes.paint(scene))
    pretrain(SHORT)
    assert painted == [plan_single(SHORT, i)[0] for i in range(SHORT.images)]


def test_another_process_gets_the_same_bytes_and_two_callers_train_once(tmp_path):
    """Two processes at once on one folder, another one elsewhere with other thread settings."""
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    run = lambda folder, **env: subprocess.Popen(
        [sys.executable, "-c", CODE.format(folder=folder)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        text=True,
    )
    both = [run(one, OMP_NUM_THREADS="1"), run(one, OMP_NUM_THREADS="1")]
    paths = {p.communicate()[0].strip() for p in both}
    assert len(paths) == 1 and [p.returncode for p in both] == [0, 0]
    third = run(other, OMP_NUM_THREADS="2").communicate()[0].strip()
    assert sha256_file(third) == sha256_file(paths.pop())


def test_the_caller_notices_nothing():
    """Random state, threads and gradients' switch are as they were."""
    torch.manual_seed(5)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    model, accuracy = pretrain(PretrainConfig(images=64, epochs=1, test_images=20))
    assert 0 <= accuracy_on_test_digits(model, PretrainConfig(test_images=20)) <= 1 and len(accuracy) == 1
    assert (
        torch.equal(state, torch.random.get_rng_state())
        and threads == torch.get_num_threads()
        and torch.is_grad_enabled()
    )


def test_test_pictures_are_others_than_training_pictures():
    train, test = (single_digits(SHORT, 200, s)[0] for s in (TRAIN, TEST))
    assert not {p.tobytes() for p in train} & {p.tobytes() for p in test}


@pytest.mark.parametrize("damage", ["weights", "record", "schema"])
def test_what_is_damaged_is_made_again(tmp_path, damage):
    config = PretrainConfig(images=64, epochs=1, test_images=20)
    path = pretrained_digits(tmp_path, config=config)
    good, record = path.read_bytes(), json.loads((path.parent / "pretrain.json").read_text())
    if damage == "weights":
        path.write_bytes(good[:100])
    else:
        (path.parent / "pretrain.json").write_text(
            "{" if damage == "record" else json.dumps({**record, "schema": "cadm-pretrain/9"})
        )
    assert pretrain_record(path.parent) is None
    assert (
        pretrained_digits(tmp_path, config=config).read_bytes() == good
        and pretrain_record(path.parent)["sha256"] == record["sha256"]
    )

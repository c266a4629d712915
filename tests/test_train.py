"""Training from outside: kills, two processes, other machines' settings, what is refused. The scenes are small and made once."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cadm_paper import train as module
from cadm_paper.data import build_scenes
from cadm_paper.engine.checkpoint import CheckpointError, load_checkpoint
from cadm_paper.engine.config import ConfigError, TrainConfig
from cadm_paper.engine.processes import Team
from cadm_paper.engine.record import RunRecord
from cadm_paper.files import FolderLocked, folder_lock
from cadm_paper.paper import COLUMNS
from cadm_paper.train import NonFiniteLoss, Progress, checkpoint_file, train

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    return build_scenes(tmp_path_factory.mktemp("data") / "scenes", train=96, test=48)


@pytest.fixture
def config(scenes, tmp_path):
    """A run of a few seconds: two epochs of three steps, both losses."""

    def make(out="run", **changes):
        given = (
            dict(
                data_dir=str(scenes),
                out_dir=str(tmp_path / out),
                weights="none",
                epochs=2,
                seed=3,
                threads=1,
                precision="fp32",
            )
            | changes
        )
        return TrainConfig(**given)

    return make


def weights(folder):
    return {p.name: p.read_bytes() for p in [Path(folder) / "checkpoint" / "model" / "model.safetensors"]}


def same_run(a: RunRecord, b: RunRecord):
    assert a.metrics == b.metrics and a.history == b.history and weights(a.folder) == weights(b.folder)
    for name, values in a.scores().items():
        assert np.array_equal(values, b.scores()[name]), name


class StopAt(Progress):
    """Raises in the middle of a run, as a kill would end it."""

    def __init__(self, step):
        self.left = step

    def step(self, loss):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


# ---- the same numbers again ------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_does_not(config):
    a = train(config("a"))
    torch.manual_seed(99)  # what a process did before does not matter
    torch.set_num_threads(2)
    same_run(a, train(config("b")))
    assert train(config("c", seed=4)).metrics["mAP"] != a.metrics["mAP"]


@pytest.mark.parametrize(
    "changes", [dict(), dict(accumulate=2, clip_grad=1.0, precision="bf16", flip=True, optimizer="adamw")]
)
def test_a_stopped_run_goes_on_to_the_bit(config, changes, monkeypatch):
    """Stopped after every step in turn, with a checkpoint after each step: the same weights, scores and history as undisturbed."""
    whole = train(config("whole", **changes))
    interrupted = config("stopped", **changes)
    for _ in range(20):
        try:
            record = train(interrupted, resume=True, progress=StopAt(1), checkpoint_minutes=1e-9)
            break
        except KeyboardInterrupt:
            assert not (Path(interrupted.out_dir) / "run.json").exists()
    same_run(whole, record)


def test_a_finished_run_is_left_alone_by_resume(config):
    train(config())
    folder = Path(config().out_dir)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    train(config(), resume=True)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_resuming_with_a_changed_configuration_is_refused_with_the_difference(config):
    with pytest.raises(KeyboardInterrupt):
        train(config(), progress=StopAt(2), checkpoint_minutes=1e-9)
    with pytest.raises(CheckpointError, match=r"lr: 0\.01 -> 0\.5"):
        train(config(lr=0.5), resume=True)
    with pytest.raises(CheckpointError, match="unfinished run"):
        train(config())
    train(config(), resume=True)
    with pytest.raises(CheckpointError, match=r"lr: 0\.01 -> 0\.5"):
        train(config(lr=0.5))  # another run's finished folder is not written over


def test_resuming_on_other_data_is_refused(config, monkeypatch):
    """data_dir is where, not what, and so in no digest; what lies there is."""
    with pytest.raises(KeyboardInterrupt):
        train(config(), progress=StopAt(1), checkpoint_minutes=1e-9)
    prepare = module.prepare_data

    def other(config):
        train_split, test_split = prepare(config)
        return replace(train_split, labels=1 - train_split.labels), test_split

    monkeypatch.setattr(module, "prepare_data", other)
    with pytest.raises(CheckpointError, match="from other training labels: give the old data"):
        train(config(), resume=True)
    monkeypatch.undo()
    assert train(config(), resume=True).metrics


def test_a_second_process_cannot_write_the_folder(config):
    with folder_lock(config().out_dir), pytest.raises(FolderLocked):
        train(config())


def test_a_dead_process_does_not_lock_the_folder(config, tmp_path):
    code = f"import os; from cadm_paper.files import folder_lock\nwith folder_lock({config().out_dir!r}): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    train(config())


def test_a_full_disk_leaves_the_last_checkpoint(config, monkeypatch):
    writes = []
    save = module.save_checkpoint

    def full(path, tensors, state):
        writes.append(path)
        if len(writes) == 3:
            raise OSError(28, "No space left on device")
        save(path, tensors, state)

    monkeypatch.setattr(module, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space"):
        train(config(), checkpoint_minutes=1e-9)
    monkeypatch.undo()
    assert load_checkpoint(checkpoint_file(config().out_dir))[1]["done"] == 2
    same_run(train(config(), resume=True), train(config("whole")))


def test_an_infinite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(config):
    with pytest.raises(NonFiniteLoss, match=r"epoch \d, step \d of 3: the loss is"):
        train(config(lr=1e30), checkpoint_minutes=1e-9)
    folder = Path(config().out_dir)
    assert not (folder / "run.json").exists()
    tensors, state = (
        load_checkpoint(checkpoint_file(folder)) if checkpoint_file(folder).is_file() else ({}, {})
    )
    assert all(v.isfinite().all() for v in tensors.values() if v.is_floating_point())


# ---- what the record says --------------------------------------------------------------------------------------------


def test_a_record_names_the_code_that_began_it_and_all_that_resumed_it(config, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        train(config(), progress=StopAt(1), checkpoint_minutes=1e-9)
    began = module.code_version()
    monkeypatch.setattr(module, "code_version", lambda: {**began, "commit": "another"})
    code = train(config(), resume=True).environment["code"]
    assert code.pop("resumed") == [{**began, "commit": "another"}] and code == began


def test_maps_beyond_half_precision_are_kept_whole(config, recwarn):
    given = config()
    _, test = module.prepare_data(given)
    trainer = module.Trainer(given, module.build_model(given, test.classes), Team(), 1)
    usual = module.example_maps(trainer, test, given)["maps"]
    recwarn.clear()
    with torch.no_grad():
        trainer.model.head.classifier.weight.mul_(1e9)
    large = module.example_maps(trainer, test, given)["maps"]
    assert (
        usual.dtype == np.float16
        and large.dtype == np.float32
        and np.isfinite(large).all()
        and not recwarn.list
    )
    np.testing.assert_allclose(large / 1e9, usual, rtol=2e-3, atol=1e-6)


# ---- parts and processes ---------------------------------------------------------------------------------------------


def run_torchrun(config, n):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={n}",
        "-m",
        "cadm_paper.train",
        config.model_dump_json(exclude_none=True),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return RunRecord.load(config.out_dir)


def test_two_processes_and_two_parts_agree(config):
    """Two processes of B/2 against one that accumulates the same two micro-batches: scores to 1e-4, history to 1e-5."""
    one = train(config("one", accumulate=2, batch_size=32))
    two = run_torchrun(config("two", processes=2, batch_size=32), 2)
    for name in ("scores", "scores_fcls", "scores_scls"):
        np.testing.assert_allclose(one.scores()[name], two.scores()[name], atol=1e-4)
    assert list(one.scores()["image_ids"]) == list(two.scores()["image_ids"])
    for a, b in zip(one.history, two.history):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["mAP"] == pytest.approx(
            b["mAP"], abs=5e-3
        )


class OneOfTwo(Team):
    """What one of two processes sees, the other being made up: its sums are sevens, and it always wants a checkpoint."""

    def rows(self, values):
        return torch.stack([values, torch.full_like(values, 7)])

    def agree(self, decision):
        return decision if self.main else True


def test_each_process_gets_its_own_sums_back(config, tmp_path):
    given = config()
    trainer = module.Trainer(given, module.build_model(given, range(3)), Team(), 3)
    trainer.sums += torch.tensor([0.1, 0.2, 0.3, 4], dtype=torch.float64)
    trainer.done, trainer.team = 2, OneOfTwo(0, 2)
    module.save_trainer(trainer, tmp_path, given)
    for rank, expected in [(0, [0.1, 0.2, 0.3, 4]), (1, [7, 7, 7, 7])]:
        trainer.team, trainer.sums = OneOfTwo(rank, 2), torch.zeros(4, dtype=torch.float64)
        module.load_trainer(trainer, tmp_path, given)
        assert trainer.sums.tolist() == expected and trainer.done == 2


def test_a_checkpoint_with_one_total_of_the_sums_can_be_gone_on_with(config, tmp_path):
    """As earlier versions wrote it."""
    given = config()
    trainer = module.Trainer(given, module.build_model(given, range(3)), Team(), 3)
    module.save_trainer(trainer, tmp_path, given)
    tensors, state = load_checkpoint(checkpoint_file(tmp_path))
    module.save_checkpoint(checkpoint_file(tmp_path), tensors, {**state, "sums": [1, 2, 3, 4]})
    for rank, expected in [(0, [1, 2, 3, 4]), (1, [0, 0, 0, 0])]:
        trainer.team = OneOfTwo(rank, 2)
        module.load_trainer(trainer, tmp_path, given)
        assert trainer.sums.tolist() == expected


WORKER = """
import json, os, signal, sys
from cadm_paper.engine.config import TrainConfig
from cadm_paper.train import Progress, train

class Killed(Progress):
    left = int(sys.argv[2])
    def step(self, loss):
        self.left -= 1
        if self.left < 0: os.kill(os.getpid(), signal.SIGKILL)

minutes = 1e9 if int(os.environ["RANK"]) else 1e-9
train(TrainConfig(**json.loads(sys.argv[1])), resume=True, progress=Killed(), checkpoint_minutes=minutes)
"""


def run_workers(configs, steps=10**6):
    """One process per configuration, as torchrun would start them; each is killed in step `steps` + 1. Their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(configs)),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, c.model_dump_json(exclude_none=True), str(steps)],
            cwd=ROOT,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, c in enumerate(configs)
    ]
    return [process.wait() for process in started]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_processes_killed_within_an_epoch_go_on_to_the_bit(config, n):
    """Only the main process's clock calls for checkpoints. Killed in the last step of the second epoch, the run goes on after its middle one."""
    how = dict(processes=n, batch_size=30, flip=True)
    assert run_workers([config("whole", **how)] * n) == [0] * n
    team = [config("killed", **how)] * n
    assert run_workers(team, steps=5) == [-signal.SIGKILL] * n
    state = load_checkpoint(checkpoint_file(team[0].out_dir))[1]
    assert (state["epoch"], state["done"], len(state["sums"])) == (1, 2, n) and all(
        sum(row) > 0 for row in state["sums"]
    )
    assert run_workers(team) == [0] * n
    same_run(RunRecord.load(config("whole").out_dir), RunRecord.load(team[0].out_dir))


def test_parts_differ_from_a_whole_batch_only_through_batch_norm(config, monkeypatch):
    """With batch norm in evaluation mode a batch in parts is the same batch."""
    eval_norms = lambda net: [m.eval() for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    step = module.Trainer.step

    def without_statistics(self, batch, n):
        eval_norms(self.model)
        step(self, batch, n)

    monkeypatch.setattr(module.Trainer, "step", without_statistics)
    whole, parts = train(config("whole", lr=1e-3)), train(config("parts", accumulate=4, lr=1e-3))
    np.testing.assert_allclose(whole.scores()["scores"], parts.scores()["scores"], atol=1e-5)


def test_five_images_in_four_parts_are_three_parts(config):
    """Five images cut into at most four parts come back as three (2, 2, 1), as with three; weights and batch-norm statistics must know."""
    four, three = (
        train(config(str(parts), accumulate=parts, batch_size=12, limit=5, epochs=2)) for parts in (4, 3)
    )
    for name, values in four.scores().items():
        np.testing.assert_array_equal(values, three.scores()[name])


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_processes_by_parameter(config):
    record = train(config(processes=2, epochs=1, batch_size=32))
    assert record.config.processes == 2 and len(record.scores()["scores"]) == 48


def test_wrong_configurations_are_named_before_anything_is_computed(config):
    with pytest.raises(ConfigError, match="known are"):
        train(config(dataset="imagenet"))
    with pytest.raises(ConfigError, match="float16"):
        train(config(precision="fp16", device="cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            train(config(device="cuda"))
    assert not Path(config().out_dir, "run.json").exists()


@pytest.mark.parametrize("method", ["linear_probe", "baseline_gap", "baseline"])
def test_every_row_leaves_a_record_of_the_same_form(config, method):
    record = train(config(method=method, epochs=1))
    assert set(COLUMNS) <= set(record.metrics) and (record.maps() is None) == (method == "linear_probe")
    assert (
        str(ROOT) not in (record.folder / "run.json").read_text()
        and str(record.folder) not in (record.folder / "run.json").read_text()
    )


# ---- the papermill notebook ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [["-p", "sede", "3"], ["-p", "epochs", "three"], ["-p", "resume", "perhaps"]]
)
def test_the_notebook_refuses_wrong_parameters_before_anything_is_computed(wrong, tmp_path):
    import papermill

    name, value = wrong[1:]
    with pytest.raises(papermill.PapermillExecutionError, match=name):
        papermill.execute_notebook(
            ROOT / "nbs" / "experiments" / "train.ipynb",
            tmp_path / "out.ipynb",
            {name: value, "out_dir": str(tmp_path / "run")},
            cwd=tmp_path,
            progress_bar=False,
        )
    assert not (tmp_path / "run").exists()


def test_the_notebook_trains_from_another_folder(tmp_path, scenes):
    """The papermill command from outside, casting the words that papermill hands over."""
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("papermill")),
            str(ROOT / "nbs" / "experiments" / "train.ipynb"),
            "out.ipynb",
            "-p",
            "dataset",
            "scenes-coco",
            "-p",
            "method",
            "cadm",
            "-p",
            "lam",
            "0.5",
            "-p",
            "seed",
            "3",
            "-p",
            "epochs",
            "1",
            "-p",
            "weights",
            "none",
            "-p",
            "flip",
            "true",
            "-p",
            "lr",
            "1e-3",
            "-p",
            "data_dir",
            str(scenes),
            "-p",
            "out_dir",
            "here",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = RunRecord.load(tmp_path / "here")
    assert (record.config.lam, record.config.seed, record.config.flip, record.config.lr) == (
        0.5,
        3,
        True,
        1e-3,
    )


# ---- kills -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_kills(config):
    """SIGKILL at random fractions of the run's own duration; each time it goes on; equal weights and metrics at the end."""
    whole = train(config("whole", epochs=6))
    killed = config("killed", epochs=6)
    command = [
        sys.executable,
        "-m",
        "cadm_paper.train",
        killed.model_dump_json(exclude_none=True),
        "--resume",
        "--checkpoint-minutes=1e-3",
    ]
    env, rng = {**os.environ, "OMP_NUM_THREADS": "1"}, np.random.default_rng(0)
    started = time.monotonic()
    subprocess.run(
        [*command[:3], config("timed", epochs=6).model_dump_json(exclude_none=True)],
        check=True,
        cwd=ROOT,
        env=env,
        capture_output=True,
    )
    duration, kills = time.monotonic() - started, 0
    for fraction in rng.uniform(0.3, 1.0, 20):
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(fraction * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    subprocess.run(command, check=True, cwd=ROOT, env=env, capture_output=True)
    assert kills >= 3
    same_run(whole, RunRecord.load(killed.out_dir))


@pytest.mark.slow
def test_the_paper_preset_starts_trains_and_resumes_at_full_resolution(tmp_path):
    """ResNet-101 at 448 px from nothing on made photographs in COCO's layout: two steps, stopped after the first; it warns loudly."""
    from cadm_paper.weights import UntrainedBackbone

    root = build_scenes(tmp_path / "coco", train=4, test=2, size=448)
    given = dict(preset="paper", data_dir=str(root), weights="none", batch_size=2, epochs=1, device="cpu")
    config = TrainConfig(out_dir=str(tmp_path / "run"), **given)
    assert (config.backbone, config.image_size, config.dataset, config.lam) == (
        "resnet101",
        448,
        "coco2014",
        0.5,
    )
    with pytest.warns(UntrainedBackbone), pytest.raises(KeyboardInterrupt):
        train(config, progress=StopAt(1), checkpoint_minutes=1e-9)
    with pytest.warns(UntrainedBackbone):
        record = train(config, resume=True)
    assert record.maps()["maps"].shape[2:] == (14, 14) and len(record.history) == 1
    with pytest.warns(UntrainedBackbone):
        same_run(train(TrainConfig(out_dir=str(tmp_path / "whole"), **given)), record)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))),
    reason="torch.compile on a CPU needs a C++ compiler",
)
def test_compiled_training_is_the_same_training(config):
    eager, compiled = train(config("eager", lr=1e-3)), train(config("compiled", lr=1e-3, compile=True))
    np.testing.assert_allclose(eager.scores()["scores"], compiled.scores()["scores"], atol=1e-3)

"""Training end to end: resume, several processes, every method, invalid input; on a few generated scenes."""

import functools
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cells import run_cells
from safetensors.torch import save_file

from cadm_paper import train as module
from cadm_paper.app.predict import Predictor
from cadm_paper.data import build_scenes
from cadm_paper.engine.checkpoint import CheckpointError, load_checkpoint
from cadm_paper.engine.config import ConfigError, TrainConfig
from cadm_paper.engine.record import RunRecord
from cadm_paper.files import FolderLocked, folder_lock
from cadm_paper.methods import METHODS
from cadm_paper.model import CADM
from cadm_paper.paper import COLUMNS
from cadm_paper.train import NonFiniteLoss, Progress, checkpoint_file, train

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "nbs" / "experiments" / "train.ipynb"
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
WITHOUT_MAPS = ("linear_probe", "cnn_rnn", "order_free_rnn", "ml_zsl")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    return build_scenes(tmp_path_factory.mktemp("data") / "scenes", train=96, test=48)


@pytest.fixture
def config(scenes, tmp_path):
    """Make the configuration of a run of less than a second: two epochs of three steps."""

    def make(out="run", **changes):
        given = dict(data_dir=str(scenes), weights="none", image_size=32, epochs=2, seed=3)
        return TrainConfig(out_dir=str(tmp_path / out), **given | dict(threads=1, precision="fp32") | changes)

    return make


def same_run(a: RunRecord, b: RunRecord):
    weights = [(r.folder / "checkpoint" / "model" / "model.safetensors").read_bytes() for r in (a, b)]
    assert a.metrics == b.metrics and a.history == b.history and weights[0] == weights[1]
    for name, values in a.scores().items():
        assert np.array_equal(values, b.scores()[name]), name


class StopAt(Progress):
    """Stop a run after a number of steps, by an error or a signal."""

    def __init__(self, steps, number=None):
        self.left, self.number = steps, number

    def step(self):
        self.left -= 1
        if self.left < 0 and self.number is None:
            raise KeyboardInterrupt
        if self.left == -1:
            signal.raise_signal(self.number)


def begun(config, steps=1, error=KeyboardInterrupt):
    """Stop a run after some steps, each with a checkpoint."""
    with pytest.raises(error):
        train(config, progress=StopAt(steps), checkpoint_minutes=1e-9)


def other_labels(config, monkeypatch):
    train_split, test_split = module.prepare_data(config())
    other = replace(train_split, labels=1 - train_split.labels), test_split
    monkeypatch.setattr(module, "prepare_data", lambda config: other)


# ---- reproducibility and resume -------------------------------------------------------------------


def test_equal_seeds_give_equal_runs(config):
    a = train(config("a"))
    torch.manual_seed(99)  # earlier work of the process has no effect
    same_run(a, train(config("b")))
    assert train(config("c", seed=4)).metrics["mAP"] != a.metrics["mAP"]


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        pytest.param(dict(accumulate=2, clip_grad=1.0, precision="bf16", flip=True), marks=pytest.mark.slow),
        dict(method="csra", method_args={"heads": 2}, optimizer="adamw"),
        pytest.param(dict(method="query2label", precision="bf16"), marks=pytest.mark.slow),  # with dropout
    ],
)
def test_a_stopped_run_resumes_bit_exactly(config, changes):
    """Stopped after each step: weights, scores and history equal those of an uninterrupted run."""
    whole, record = train(config("whole", **changes)), None
    while record is None:
        try:
            record = train(
                config("stopped", **changes), resume=True, progress=StopAt(1), checkpoint_minutes=1e-9
            )
        except KeyboardInterrupt:
            assert not Path(config("stopped").out_dir, "run.json").exists()
    same_run(whole, record)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "linear_probe"])  # has no steps
def test_every_method_resumes_bit_exactly(config, method):
    """Stopped after the first step; the rest of the state is that of the uninterrupted run."""
    given = functools.partial(config, method=method, epochs=1)
    begun(given("stopped"))
    same_run(train(given("whole")), train(given("stopped"), resume=True))


def files(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_finished_run_is_returned(config):
    record = train(config())
    before = files(record.folder)
    assert train(config()).metrics == train(config(), resume=True).metrics == record.metrics
    assert files(record.folder) == before


@pytest.mark.parametrize("finished", [False, True])
def test_another_configuration_other_labels_or_other_weights_are_refused(
    config, tmp_path, monkeypatch, finished
):
    """The run stays as it is. Names of folders and files are not compared, their content is."""
    file = tmp_path / "start.safetensors"
    first, other = (CADM(3, "narrow_resnet", None, quiet=True).backbone.state_dict() for _ in range(2))
    save_file(first, file)
    given = functools.partial(config, weights=str(file))
    train(given()) if finished else begun(given())
    before = files(given().out_dir)
    with pytest.raises(CheckpointError, match=r"lr: 0\.003 -> 0\.5"):
        train(given(lr=0.5), resume=not finished)
    with monkeypatch.context() as patch:
        other_labels(given, patch)
        name = "run.json" if finished else "last.safetensors"
        with pytest.raises(CheckpointError, match=f"{name} was trained from other training labels: use"):
            train(given(), resume=True)
    save_file(other, file)
    with pytest.raises(CheckpointError, match="from other initial weights: use the old data and weights"):
        train(given(), resume=True)
    assert files(given().out_dir) == before
    save_file(first, file)
    assert train(given(), resume=True).metrics


def test_an_unfinished_run_is_not_overwritten(config):
    begun(config())
    with pytest.raises(CheckpointError, match="unfinished run"):
        train(config())


def test_a_second_process_cannot_write_the_folder(config):
    with folder_lock(config().out_dir), pytest.raises(FolderLocked):
        train(config())


def test_a_full_disk_names_the_file_and_leaves_the_last_checkpoint(config, monkeypatch):
    begun(config())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*last.safetensors'"):
        train(config(), resume=True, checkpoint_minutes=1e-9)
    monkeypatch.undo()
    record = train(config(), resume=True)
    same_run(train(config("whole")), record)
    assert not list(record.folder.rglob("*.part"))


def test_an_infinite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(config):
    begun(config(), steps=2)
    parts, state = load_checkpoint(checkpoint_file(config().out_dir))
    parts["model"]["head.classifier.weight"][:] = torch.finfo(torch.float32).max
    module.save_checkpoint(checkpoint_file(config().out_dir), parts, state)
    before = checkpoint_file(config().out_dir).read_bytes()
    with pytest.raises(
        NonFiniteLoss, match=r"epoch 1, step 3 of 3: the loss is not finite.*checkpoint is good"
    ):
        train(config(), resume=True, checkpoint_minutes=1e-9)
    assert checkpoint_file(config().out_dir).read_bytes() == before


def test_a_record_names_the_code_of_its_start_and_of_each_resume(config, monkeypatch):
    begun(config())
    began = module.code_version()
    monkeypatch.setattr(module, "code_version", lambda: {**began, "commit": "another"})
    code = train(config(), resume=True).environment["code"]
    assert code.pop("resumed") == [{**began, "commit": "another"}] and code == began


BROKEN = {  # changes of a valid checkpoint's parts p and state s, as another version might write it
    "no model": lambda p, s: p.pop("model"),
    "missing tensor": lambda p, s: p["model"].popitem(),
    "other shape": lambda p, s: p["model"].update({"head.classifier.weight": torch.ones(2)}),
    "buffer's shape": lambda p, s: p["optimiser"].update({"0.momentum_buffer": torch.ones(2)}),
    "buffer of no parameter": lambda p, s: p["optimiser"].update({"99.momentum_buffer": torch.ones(2)}),
    "unknown field": lambda p, s: s["config"].update(sede=3),
    "empty state": lambda p, s: s.clear(),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_malformed_checkpoint_gives_one_line_with_its_name(config, change):
    begun(config())
    file = checkpoint_file(config().out_dir)
    parts, state = load_checkpoint(file)
    change(parts, state)
    module.save_checkpoint(file, parts, state)
    with pytest.raises(CheckpointError, match=r"^\S+last.safetensors: not a state of this run.+\Z"):
        train(config(), resume=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_says_how_to_resume(config, number):
    with pytest.raises(KeyboardInterrupt, match=f"stopped by {number.name}; .*resume with --resume"):
        train(config(), progress=StopAt(3, number))
    state = load_checkpoint(checkpoint_file(config().out_dir))[1]
    assert (state["epoch"], state["done"]) == (1, 1)
    same_run(train(config(), resume=True), train(config("whole")))


# ---- every method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_saves_a_model_that_gives_the_records_scores(config, method):
    """A complete record without paths; the saved model reproduces its scores of the test images."""
    record = train(config(method=method, epochs=1, lr=1e-3))
    assert set(COLUMNS) <= set(record.metrics)
    assert (record.maps() is None) == (method in WITHOUT_MAPS)
    text = (record.folder / "run.json").read_text()
    assert str(ROOT) not in text and str(record.folder) not in text
    predictor, (_, test) = Predictor.load(record.folder), module.prepare_data(config())
    predicted = [list(predictor(path)["scores"].values()) for path in test.paths]
    np.testing.assert_allclose(predicted, record.scores()["scores"], atol=1e-5)


# ---- micro-batches and processes ------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_equal_two_micro_batches(config):
    """Two processes against one with the same two micro-batches: scores to 1e-4, losses to 1e-5."""
    one, two = train(config("one", accumulate=2)), train(config("two", processes=2))
    for name in module.STREAMS:
        np.testing.assert_allclose(one.scores()[name], two.scores()[name], atol=1e-4)
    losses = [[row["loss"] for row in record.history] for record in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def worker(config, environment, steps):
    """One of several processes, killed in step `steps` + 1; rank 0's clock asks for checkpoints."""
    os.environ.update(environment)
    minutes = 1e9 if int(environment["RANK"]) else 1e-9
    train(config, resume=True, progress=StopAt(steps, signal.SIGKILL), checkpoint_minutes=minutes)


PORTS = itertools.count(20000 + os.getpid() % 10000)


def run_workers(config, steps=10**6):
    """Start `config.processes` processes with torchrun's variables; return their exit codes."""
    port, world = str(next(PORTS)), str(config.processes)
    environment = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=world)
    forks = multiprocessing.get_context("forkserver")  # which imports torch once
    forks.set_forkserver_preload(["cadm_paper.train"])
    ranks = [dict(environment, RANK=r, LOCAL_RANK=r) for r in map(str, range(config.processes))]
    started = [forks.Process(target=worker, args=(config, rank, steps)) for rank in ranks]
    [process.start() for process in started]
    [process.join() for process in started]
    return [process.exitcode for process in started]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_processes_killed_within_an_epoch_resume_bit_exactly(config, n):
    """Killed in the last step of the second epoch, the run resumes after its middle step."""
    how = dict(processes=n, batch_size=30, flip=True)
    whole, killed = config("whole", **how), config("killed", **how)
    assert run_workers(whole) == [0] * n
    assert run_workers(killed, steps=5) == [-signal.SIGKILL] * n
    state = load_checkpoint(checkpoint_file(killed.out_dir))[1]
    assert (state["epoch"], state["done"], len({tuple(row) for row in state["sums"]})) == (1, 2, n)
    assert run_workers(killed) == [0] * n
    same_run(RunRecord.load(whole.out_dir), RunRecord.load(killed.out_dir))


def test_micro_batches_differ_from_a_batch_only_through_batch_norm(config, monkeypatch):
    """With BatchNorm in evaluation mode, micro-batches give the scores of the whole batch."""
    step = module.Trainer.step

    def without_statistics(self, batch, n):
        [m.eval() for m in self.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        step(self, batch, n)

    monkeypatch.setattr(module.Trainer, "step", without_statistics)
    whole, parts = train(config("whole", lr=1e-3)), train(config("parts", accumulate=4, lr=1e-3))
    np.testing.assert_allclose(whole.scores()["scores"], parts.scores()["scores"], atol=1e-5)


@pytest.mark.slow
def test_processes_end_with_their_parent(config):
    """A killed parent leaves a checkpoint and no process; a probe works in two processes."""
    endless = config(processes=2, epochs=10**6).model_dump_json(exclude_none=True)
    code = "import sys, json; from cadm_paper.train import *; train(TrainConfig(**json.loads(sys.argv[1])))"
    process = subprocess.Popen([sys.executable, "-c", code, endless], cwd=ROOT, env=ENV)
    wait_until(checkpoint_file(config().out_dir).is_file)
    process.kill()
    process.wait()
    wait_until(lambda: subprocess.run(["pgrep", "-f", config().out_dir], capture_output=True).returncode)
    assert train(config("probe", processes=2, method="linear_probe")).metrics


def wait_until(done, seconds=100):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.2)


# ---- invalid input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, environ, said",
    [
        (dict(weights="nowhere.safetensors"), {}, "nowhere.safetensors"),
        (dict(dataset="own", data_dir="nowhere"), {}, "nowhere"),
        (dict(expected_missing="a,b", weights="nowhere/x.pth"), {}, "nowhere/x.pth"),
        # set by a cluster or a hosted notebook
        ({}, dict(WORLD_SIZE="2", RANK="1"), "processes = 1.*unset WORLD_SIZE"),
    ],
)
def test_an_impossible_run_leaves_no_folder(config, monkeypatch, changes, environ, said):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, OSError), match=said):
        train(config(**changes))
    assert not Path(config().out_dir).exists()


@pytest.mark.filterwarnings("ignore::cadm_paper.weights.UntrainedBackbone")
@pytest.mark.parametrize("changes", [dict(batch_size=2, accumulate=2), dict(batch_size=1), dict(limit=1)])
def test_a_micro_batch_too_small_for_batch_norm_names_the_settings(config, changes):
    """ResNet-18 has one position at 32 px, so a single image gives one value per channel."""
    with pytest.raises(
        ConfigError, match="batch_size = .*, accumulate = .*of 1 image, 32 px.*accumulate, or"
    ):
        train(config(backbone="resnet18", **changes))


@pytest.mark.parametrize("name, value", [("sede", "3"), ("epochs", "three"), ("resume", "perhaps")])
def test_the_notebook_rejects_wrong_parameters_before_training(name, value, tmp_path):
    with pytest.raises(ValueError, match=name if name != "resume" else "bool"):
        run_cells("train", **{name: value, "out_dir": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_notebook_trains_from_another_folder(tmp_path, scenes):
    """The papermill command casts text parameters."""
    given = dict(method="csra", method_args='{"heads": 2}', seed=3, epochs=1, weights="none", flip="true")
    given |= dict(lr="1e-3", data_dir=scenes, out_dir="here")
    command = [str(Path(sys.executable).with_name("papermill")), str(NOTEBOOK), "out.ipynb"]
    command += [word for name, value in given.items() for word in ("-p", name, str(value))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = RunRecord.load(tmp_path / "here").config
    assert (found.method_args, found.seed, found.flip, found.lr) == ({"heads": 2}, 3, True, 1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cadm_paper.weights.UntrainedBackbone")
def test_the_paper_preset_trains_and_resumes_at_full_resolution(tmp_path):
    """ResNet-101 at 448 px with random weights; stopped after one of two steps."""
    root = build_scenes(tmp_path / "coco", train=4, test=2, size=448)
    given = dict(preset="paper", data_dir=str(root), weights="none", batch_size=2, epochs=1, device="cpu")
    config = TrainConfig(out_dir=str(tmp_path / "run"), **given)
    assert (config.backbone, config.image_size, config.dataset) == ("resnet101", 448, "coco2014")
    begun(config)
    record = train(config, resume=True)
    assert record.maps()["maps"].shape[2:] == (14, 14) and len(record.history) == 1


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))),
    reason="torch.compile on a CPU needs a C++ compiler",
)
def test_compiled_training_equals_eager_training(config):
    eager, compiled = train(config("eager", lr=1e-3)), train(config("compiled", lr=1e-3, compile=True))
    np.testing.assert_allclose(eager.scores()["scores"], compiled.scores()["scores"], atol=1e-3)

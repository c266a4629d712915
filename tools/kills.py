"""Kill every writer of files at random moments: no data may be lost, and the next run leaves no temporary files.

python tools/kills.py [KILLS] [WRITER ...]
"""

import functools
import hashlib
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "CADM_PROGRESS": "0",
    "MPLBACKEND": "agg",
}  # no threads, because processes fork

import numpy as np
import torch

from cadm_paper.app.explorer import build_explorers
from cadm_paper.app.export import export_run
from cadm_paper.app.predict import predict_files
from cadm_paper.app.report import build_report
from cadm_paper.app.runs import runs_submit
from cadm_paper.data import build_scenes, download
from cadm_paper.data.loading import Loader
from cadm_paper.data.split import DataError
from cadm_paper.engine.checkpoint import save_checkpoint
from cadm_paper.engine.config import TrainConfig
from cadm_paper.engine.pretrain import PretrainConfig, pretrained_digits
from cadm_paper.engine.record import RunRecord, load_runs
from cadm_paper.engine.splits import prepare_data
from cadm_paper.engine.synthetic import synthetic_run, synthetic_runs
from cadm_paper.figures import curves
from cadm_paper.results.evaluation import evaluate_files
from cadm_paper.tables import table
from cadm_paper.train import train

for slow in ("matplotlib.pyplot", "matplotlib.backends.backend_pdf", "sklearn.linear_model", "torch._dynamo"):
    importlib.import_module(slow)  # kills must hit writers, not imports

VARYING = {"run.json", "record.json"}  # contain times
SHARED = Path(tempfile.gettempdir(), f"cadm-kills-{os.getpid()}")  # input of the writers
PORT = 20000 + os.getpid() % 10000


def config(home: Path, **changes) -> TrainConfig:
    """A run of one or two seconds."""
    how = dict(weights="none", epochs=2, threads=1, precision="fp32", data_dir=str(SHARED / "scenes"))
    return TrainConfig(out_dir=str(home / "run"), **how | changes)


def checkpoint(home: Path, new: bool) -> None:
    weights = {"w": torch.full((3_000_000,), float(new))}
    save_checkpoint(home / "last.safetensors", {"model": weights}, {"new": new})


def fetched(home: Path, new: bool) -> None:
    content = (SHARED / "www" / "toy.zip").read_bytes()
    marks = dict(size=len(content), checksum=f"sha256:{hashlib.sha256(content).hexdigest()}")
    archive = download.Archive((f"http://127.0.0.1:{PORT}/toy.zip",), ("toy/annotations/0",), **marks)
    download.SOURCES["voc2007"] = download.Source((archive,), "a page", "")
    try:
        download.data_get("voc2007", home, yes=True, quiet=True, wait=0.1)
    except DataError as error:  # the toy is not all of VOC
        assert "is not complete" in str(error), error


def submit(home: Path, new: bool) -> None:
    run = RunRecord.load(SHARED / "run")
    if not list((home / "runs").rglob("run.json")):
        runs_submit(run.folder, outputs=home)


def runs(new: bool) -> list[RunRecord]:
    return load_runs(SHARED / ("new" if new else "old"))


def evaluated(home: Path, new: bool) -> None:
    scores = runs(new)[0].folder / "scores.npz"
    evaluate_files(scores, json=home / "a.json", csv=home / "b.csv", per_class=home / "c.csv")


def predicted(home: Path, new: bool) -> None:
    images = sorted((SHARED / "scenes").rglob("*.jpg"))[:20]
    predict_files(images, SHARED / "run", maps=home, json_file=home / "a.json", csv_file=home / "a.csv")


def cached(home: Path, new: bool) -> None:
    if not (home / "scenes").exists():
        shutil.copytree(SHARED / "scenes", home / "scenes", ignore=shutil.ignore_patterns(".cadm-index"))
    if new:
        Loader(prepare_data(config(home, data_dir=str(home / "scenes")))[0], 80)


class Writer(NamedTuple):
    """Writes `new` files, or first the old ones to replace; `old`: whether there are old files."""

    write: Callable[[Path, bool], object]
    old: bool = True


WRITERS = {
    "training": Writer(lambda home, new: train(config(home), True, checkpoint_minutes=1e-9), old=False),
    "checkpoint": Writer(checkpoint),
    "scenes": Writer(lambda home, new: build_scenes(home / "s", train=40, test=20), old=False),
    "pretraining": Writer(
        lambda home, new: pretrained_digits(home, config=PretrainConfig(images=64, epochs=1)), old=False
    ),
    "download": Writer(fetched, old=False),
    "submit": Writer(submit, old=False),
    "cache": Writer(cached),
    "evidence": Writer(
        lambda home, new: (
            runs(new)[0].keep("evidence.npz", a=np.zeros(10**6))
            or shutil.copy(runs(new)[0].folder / "evidence.npz", home)
        ),
        old=False,
    ),
    "tables": Writer(lambda home, new: table("table1", runs(new)).save(home)),
    "figures": Writer(lambda home, new: curves(runs(new)).save(home)),
    "report": Writer(lambda home, new: build_report(SHARED / f"few-{new}", home)),
    "explorer": Writer(lambda home, new: build_explorers(runs(new), home)),
    "export": Writer(lambda home, new: export_run(SHARED / "run", home / "model")),
    "evaluation": Writer(evaluated),
    "predictions": Writer(predicted, old=False),
}


def prepare() -> None:
    """The input of the writers: scenes, a run, records, an archive."""
    build_scenes(SHARED / "scenes", train=96, test=48)
    train(config(SHARED, epochs=1))
    for seed, name in enumerate(("old", "new")):
        synthetic_runs(SHARED / name, ["scenes-coco"], seeds=(seed,), images=60, drawn=4)
        synthetic_run(SHARED / f"few-{name == 'new'}" / "run", method="baseline", seed=seed, images=60)
    (SHARED / "www").mkdir()
    with zipfile.ZipFile(SHARED / "www" / "toy.zip", "w") as archive:
        for number in range(200):
            archive.writestr(f"toy/{'annotations/' * (number < 9)}{number}", os.urandom(50_000))


def forked(act: Callable[[], object], seconds: float | None = None) -> int:
    """Run a function in another process, killed after some seconds; returns its exit status (-9: killed)."""
    pid = os.fork()
    if pid == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        try:
            act()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tree(home: Path) -> dict[str, str]:
    """Checksums of all files by name, without locks; files with times have an empty one."""
    found = {}
    for path in (p for p in home.rglob("*") if p.is_file() and p.name != ".lock"):
        name = re.sub(r"[0-9a-f]{16}", "*", path.relative_to(home).as_posix())
        found[name] = "" if path.name in VARYING else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


class Trial:
    """A writer with its old and new files and its duration."""

    def __init__(self, name: str):
        self.writer, self.home, self.kept = WRITERS[name], SHARED / "homes" / name, SHARED / "kept" / name
        self.kept.mkdir(parents=True)
        if self.writer.old:
            assert forked(lambda: self.writer.write(self.kept, False)) == 0, name
        self.old = tree(self.kept)
        self.reset()
        began = time.monotonic()
        assert forked(lambda: self.writer.write(self.home, True)) == 0, name
        self.seconds, self.new = time.monotonic() - began, tree(self.home)

    def reset(self) -> None:
        """Back to the old files."""
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self.kept, self.home)

    def kill(self, fraction: float) -> tuple[bool, list[str]]:
        """Kill it after this fraction of its duration: whether it still ran, and all problems then and after
        the next run.
        """
        self.reset()
        killed = forked(lambda: self.writer.write(self.home, True), fraction * self.seconds) < 0
        there = tree(self.home)
        stays = {name: mark for name, mark in self.old.items() if name in self.new}
        wrong = [f"lost: {n}" for n, mark in stays.items() if there.get(n) not in (mark, self.new[n])]
        began = time.monotonic()
        if forked(lambda: self.writer.write(self.home, True)):
            return killed, [*wrong, "the next run fails"]
        self.seconds = min(self.seconds, time.monotonic() - began)
        there = tree(self.home)
        wrong += [f"left: {name}" for name in sorted(there.keys() - self.new.keys())]
        wrong += [f"missing: {name}" for name in sorted(self.new.keys() - there.keys())]
        return killed, wrong + [f"differs: {n}" for n in there.keys() & self.new if there[n] != self.new[n]]


def main(kills: int = 300, *names: str) -> int:
    """Kill each writer in turn; prints all problems and returns 1 if there are any."""
    SHARED.mkdir()
    server = [
        sys.executable,
        "-m",
        "http.server",
        str(PORT),
        "--bind",
        "127.0.0.1",
        "-d",
        str(SHARED / "www"),
    ]
    serving, bad, killed = None, 0, 0
    try:
        assert forked(prepare) == 0
        serving = subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        trial, random = functools.cache(Trial), np.random.default_rng(0)
        for number in range(kills):
            name = (names or tuple(WRITERS))[number % len(names or WRITERS)]
            hit, wrong = trial(name).kill(random.uniform(0.0, 1.0))
            killed, bad = killed + hit, bad + bool(wrong)
            if wrong:
                print(f"kill {number + 1}, {name}: {'; '.join(wrong)}", flush=True)
    finally:
        if serving:
            serving.kill()
            serving.wait()
        shutil.rmtree(SHARED)
    print(f"{killed} of {kills} kills hit a running writer; {bad} caused problems")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2]), *sys.argv[2:]))

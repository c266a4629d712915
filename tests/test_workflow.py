"""What the notebook app/batch cannot show in a cell: whole batches through Snakemake and papermill, killed, stopped, broken and gone on with.

The runs are made by a stand-in for train.ipynb that computes nothing but keeps every promise of the real one: a checkpoint after each epoch,
a record at the end, a result that depends on the whole sequence of epochs.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from cadm_paper.app import batch as workflow
from cadm_paper.app.batch import WorkflowError, parse_batch
from cadm_paper.engine.record import RunRecord, write_record

ROOT = Path(__file__).resolve().parents[1]

SETUP = "before = set(globals())"
PARAMETERS = """
preset: str = None
dataset: str = None
data_dir: str = None
method: str = None
lam: float = None
seed: int = None
epochs: int = None
device: str = None
processes: int = None
out_dir: str = None
resume: bool = None
"""
BODY = """
from cadm_paper.engine.config import TrainConfig, given_parameters
given = given_parameters({n: v for n, v in globals().items() if n not in ("TrainConfig", "given_parameters")}, before)
import hashlib, json, os, time
from pathlib import Path
import numpy as np
from cadm_paper.engine.variants import run_name
from cadm_paper.files import folder_lock, write_json
from cadm_paper.engine.record import environment, save_arrays, write_record

given.pop("resume", None)
config = TrainConfig(**given)
out = Path(config.out_dir)
if not (out / "run.json").exists():
    with folder_lock(out, wait=True):
        began = time.time()
        path = out / "checkpoint" / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {"epoch": 0, "value": "start"}
        first = state["epoch"]
        while state["epoch"] < config.epochs:
            if os.environ.get("STUB_FAIL") == config.method and state["epoch"] == 1:
                raise ValueError("the stand-in was told to fail")
            time.sleep(float(os.environ.get("STUB_SLEEP", "0")))
            text = state["value"] + run_name(config)
            state = {"epoch": state["epoch"] + 1, "value": hashlib.sha256(text.encode()).hexdigest()}
            write_json(path, state)
        value = int(state["value"][:8], 16) / 16**8
        with open(os.environ["STUB_LOG"], "a") as log:
            log.write(json.dumps([run_name(config), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS"), began, time.time(), first]) + "\\n")
        save_arrays(out / "scores.npz", scores=np.full((2, 3), value, dtype=np.float32))
        write_record(out, run_name(config), config, ["scores.npz"], metrics={"mAP": value, "CF1": value, "OF1": value}, history=[],
                     dataset={"name": config.dataset}, environment={}, timing={"seconds": 0})
"""
TABLE = """
import json
from pathlib import Path
from cadm_paper.engine.record import load_runs
rows = {r.name: r.metrics["mAP"] for r in load_runs(runs_dir)}
states = {r["run"]: r["state"] for r in json.loads((Path(runs_dir) / "status.json").read_text())["runs"]}
Path(runs_dir, "..", "table.json").write_text(json.dumps({"rows": rows, "states": states}, sort_keys=True))
"""


def write_notebook(path, *cells):
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    )
    for tag, source in cells:
        book.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": [tag]} if tag else {}))
    nbformat.write(book, path)
    return path


class Site:
    """A checkout of its own, with the library's own workflow and stand-ins for the notebooks."""

    def __init__(self, folder: Path):
        self.folder, self.outputs, self.log = folder, folder / "outputs", folder / "log.txt"
        experiments = folder / "nbs" / "experiments"
        experiments.mkdir(parents=True)
        (folder / "settings.ini").touch()
        (folder / "nbs" / "index.ipynb").touch()
        shutil.copytree(
            ROOT / "workflow", folder / "workflow", ignore=shutil.ignore_patterns(".snakemake", "__pycache__")
        )
        self.train = write_notebook(
            experiments / "train.ipynb", ("", SETUP), ("parameters", PARAMETERS), ("", BODY)
        )
        write_notebook(experiments / "table1.ipynb", ("parameters", "runs_dir: str = None"), ("", TABLE))
        self.config = folder / "batch.yaml"
        self.write([dict(method="baseline"), dict(method="cadm", lam=[0, 0.5])])

    def write(self, runs, **changes):
        content = dict(
            defaults=dict(preset="mini", epochs=3),
            runs=runs,
            notebooks=["table1"],
            report=False,
            prepare_data=False,
            **changes,
        )
        self.config.write_text(yaml.safe_dump(content))

    def start(self, *more, jobs=2, **environ):
        code = "import sys; from cadm_paper.app.batch import reproduce; sys.exit(reproduce(sys.argv[1], int(sys.argv[2]), force='force' in sys.argv, profile='slurm' if 'slurm' in sys.argv else None))"
        env = {
            **os.environ,
            "STUB_LOG": str(self.log),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "CADM_OUTPUTS": str(self.outputs),
            **environ,
        }
        return subprocess.Popen(
            [sys.executable, "-c", code, str(self.config), str(jobs), *more],
            cwd=self.folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *more, **kwargs):
        process = self.start(*more, **kwargs)
        try:
            output = process.communicate(timeout=600)[0]
        except subprocess.TimeoutExpired:
            process.kill()  # the rest notices
            raise
        return process.returncode, output

    def trained(self):
        """Names of the runs that were finished by the stand-in, in order."""
        return (
            [json.loads(line)[0] for line in self.log.read_text().splitlines()] if self.log.exists() else []
        )

    def table(self):
        return json.loads((self.outputs / "table.json").read_text())


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def entries(site):
    """What the stand-in wrote down: (name, devices, threads, began, ended, epoch that it went on from)."""
    return [json.loads(line) for line in site.log.read_text().splitlines()]


def still_running(site):
    """Command lines of live processes that mention the site's folder."""
    import psutil

    found = []
    for p in psutil.process_iter(["cmdline", "status", "cwd"]):
        text = " ".join(p.info["cmdline"] or [])
        if (str(site.folder) in text or (p.info["cwd"] or "").startswith(str(site.folder))) and p.info[
            "status"
        ] != psutil.STATUS_ZOMBIE:
            found.append(text)
    return found


def wait_until(condition, process=None, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.time() < end, "it did not happen in time"
        time.sleep(0.2)


# ---- what needs no run


@pytest.mark.parametrize("path", sorted((ROOT / "workflow" / "config").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_valid_and_names_notebooks_that_exist(path):
    batch = workflow.load_batch(str(path))
    assert batch.runs and batch.title
    assert all((ROOT / "nbs" / "experiments" / f"{name}.ipynb").is_file() for name in batch.notebooks)


def test_paper_lists_every_run_of_tables_1_and_2():
    batch = workflow.load_batch(str(ROOT / "workflow" / "config" / "paper.yaml"))
    assert batch.keep
    rows = {(c.dataset, c.method, c.lam if c.method == "cadm" else None) for c in batch.runs}
    assert rows >= {
        (d, m, l)
        for d in ("coco2014", "nuswide")
        for m, l in [("baseline_gap", None), ("baseline", None), ("cadm", 0.0), ("cadm", 0.5)]
    }
    seeds = {
        key: {c.seed for c in batch.runs if (c.dataset, c.method, c.lam) == key}
        for key in {(c.dataset, c.method, c.lam) for c in batch.runs}
    }
    assert len({frozenset(s) for s in seeds.values()}) == 1 and len(next(iter(seeds.values()))) >= 3
    assert all((c.image_size, c.epochs, c.backbone) == (448, 60, "resnet101") for c in batch.runs)


@pytest.mark.parametrize(
    "content, hint",
    [
        (dict(runs=[dict(sede=1)]), "did you mean 'seed'"),
        (dict(runs=[dict(epochs=1.5)]), "epochs"),
        (dict(runs=[dict(lam="half")]), "lam"),
        (dict(runs=[dict(resume=True)]), "resume"),
        (dict(runs=[dict(out_dir="x")]), "CADM_OUTPUTS"),
        (dict(runs=["cadm"]), "run 1"),
        (dict(run=[]), "did you mean 'runs'"),
        (dict(defaults=dict(method="cdam"), runs=[{}]), "method"),
        (dict(runs=[dict(seed=[0, 0])]), "same run"),
    ],
)
def test_a_wrong_line_is_refused_with_a_hint(content, hint):
    with pytest.raises(WorkflowError, match=hint):
        parse_batch(content)


def test_a_wrong_config_ends_the_command_before_anything_is_done(site):
    site.write([dict(method="baseline", sede=3)])
    code, output = site.run()
    assert code == 2 and "did you mean 'seed'" in output and not site.outputs.exists()


def test_a_run_made_by_hand_counts_while_its_code_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("CADM_OUTPUTS", str(tmp_path))
    notebook = write_notebook(
        tmp_path / "train.ipynb", ("parameters", PARAMETERS), ("", "import cadm_paper.train")
    )
    content = dict(
        defaults=dict(preset="mini"), runs=[dict(lam=0.5)], train_notebook=str(notebook), prepare_data=False
    )
    (run,) = workflow.plan(parse_batch(content))
    sources = workflow.source_digests(["import cadm_paper.train"])
    run.folder.mkdir(parents=True)
    record = lambda sources, mAP=0.5: write_record(
        run.folder,
        run.name,
        run.config,
        [],
        metrics={"mAP": mAP},
        history=[],
        dataset={},
        environment={"code": {"sources": sources}},
        timing={},
    )

    def opened():
        session = workflow.open_session(content, alone=True)
        session.held.close()
        return session

    record({**sources, "cadm_paper.loss": "0" * 64})
    assert (
        workflow.state(run).reason.endswith("changed since: cadm_paper.loss")
        and opened().stamps() == [str(run.stamp)]
        and not run.stamp.exists()
    )
    record(sources)
    assert (
        workflow.state(run).word == "finished"
        and workflow.Session(parse_batch(content), [run], run.folders).stamps() == []
    )  # a dry run of snakemake asks for nothing
    assert opened().stamps() == [str(run.stamp)] and run.stamp.exists()  # adopted
    record(sources, mAP=0.75)  # and polished
    for _ in range(2):
        assert (
            opened().stamps() == [str(run.stamp)]
            and not run.stamp.exists()
            and "changed since it was made" in workflow.state(run).reason
        )


def test_a_kernel_is_ended_and_not_interrupted(tmp_path, monkeypatch):
    from jupyter_client.provisioning import LocalProvisioner

    sent, send = [], LocalProvisioner.send_signal

    async def noted(self, number):
        sent.append(number)
        await send(self, number)

    monkeypatch.setattr(LocalProvisioner, "send_signal", noted)
    workflow.papermill(
        write_notebook(tmp_path / "a.ipynb", ("parameters", "x = 0"), ("", "assert x == 3")),
        tmp_path / "b.ipynb",
        {"x": 3},
    )
    assert (
        sent[0] == signal.SIGKILL
    )  # an interrupt first would be reported as an error by whoever is quick enough


# ---- whole batches


def test_a_batch_is_run_once_with_one_thread_a_run(site):
    site.write(
        [dict(method="baseline", device="auto"), dict(method="cadm", lam=[0, 0.5])]
    )  # auto on a machine without a GPU
    code, output = site.run(CADM_GPUS="")
    assert code == 0, output
    assert len(site.trained()) == 3 and set(site.table()["states"].values()) == {"finished"}
    assert (
        "[3/3]" in output
        and {e[2] for e in entries(site)} == {"1"}
        and {e[1] for e in entries(site)} == {None, ""}
    )  # left as it is; kept from a GPU
    code, output = site.run(CADM_GPUS="")
    assert code == 0 and len(site.trained()) == 3, output


@pytest.mark.slow
def test_only_content_makes_a_run_stale(site):
    assert site.run()[0] == 0 and len(site.trained()) == 3
    book = nbformat.read(site.train, 4)
    book.cells.insert(0, nbformat.v4.new_markdown_cell("a sentence"))
    book.cells[-1].source = "# a comment\n" + book.cells[-1].source
    nbformat.write(book, site.train)
    for path in site.folder.rglob("*"):
        os.utime(path)
    code, output = site.run()
    assert code == 0 and len(site.trained()) == 3, output
    other = Site(site.folder / "elsewhere")  # a fresh clone with the records copied in
    shutil.copy(site.train, other.train)
    shutil.copytree(site.outputs / "runs", other.outputs / "runs")
    code, output = other.run()
    assert code == 0 and other.trained() == [] and other.table() == site.table(), output
    book.cells[-1].source += "\nchanged = 1"
    nbformat.write(book, site.train)
    site.write([dict(method="baseline"), dict(method="cadm", lam=[0, 0.5])], keep=True)
    assert site.run()[0] == 0 and len(site.trained()) == 3
    assert set(site.table()["states"].values()) == {"stale"}  # the rows stay, marked
    code, output = site.run("force")
    assert code == 0 and len(site.trained()) == 6 and set(site.table()["states"].values()) == {"finished"}, (
        output
    )


@pytest.mark.slow
def test_a_failing_run_leaves_the_others_going_and_goes_on_from_its_checkpoint(site):
    code, output = site.run(STUB_FAIL="baseline")
    assert (
        code == 1
        and "ValueError: the stand-in was told to fail" in output
        and "to go on: cadm reproduce --config" in output
    )
    assert len(site.trained()) == 2
    states = site.table()["states"]
    failed = next(k for k in states if "baseline" in k)
    assert states.pop(failed) == "failed" and set(states.values()) == {"finished"}
    status = {r["run"]: r for r in json.loads((site.outputs / "runs" / "status.json").read_text())["runs"]}
    executed = nbformat.read(site.outputs / status[failed]["notebook"], 4)
    assert any(o.get("ename") == "ValueError" for c in executed.cells for o in c.get("outputs", []))
    code, output = site.run()
    assert code == 0 and len(site.trained()) == 3, output
    assert entries(site)[-1][5] == 1  # it went on from the epoch that was finished
    assert set(site.table()["states"].values()) == {"finished"}


@pytest.mark.slow
def test_stopping_ends_every_process_and_the_next_call_goes_on(site):
    process = site.start(STUB_SLEEP="1.5")
    wait_until(
        lambda: list((site.outputs / "work").rglob("state.json")) if site.outputs.exists() else False, process
    )
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "to go on" in output
    wait_until(lambda: not still_running(site), seconds=30)
    code, output = site.run()
    assert code == 0 and len(site.trained()) == 3, output
    assert max(e[5] for e in entries(site)) >= 1  # from a checkpoint


@pytest.mark.slow
def test_killed_at_five_random_moments_or_with_one_job_the_tables_are_the_same(tmp_path):
    undisturbed, alone, killed = (Site(tmp_path / name) for name in ("a", "b", "c"))
    for site, jobs in ((undisturbed, 2), (alone, 1)):
        code, output = site.run(jobs=jobs)
        assert code == 0, output
    draw = random.Random(int(os.environ.get("CADM_TEST_SEED", time.time_ns() % 2**31)))
    moments = [draw.uniform(1, 14) for _ in range(5)]
    for i, moment in enumerate(moments):
        process = killed.start(STUB_SLEEP="1")
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            if i % 2:
                process.kill()  # only the command: the rest has to notice
            else:
                import psutil

                for p in [*psutil.Process(process.pid).children(recursive=True), process]:
                    p.kill()
        process.stdout.close()
        process.wait()
    code, output = killed.run()
    assert code == 0, f"{moments}\n{output}"
    assert killed.table() == undisturbed.table() == alone.table(), moments
    assert len(killed.trained()) >= 3 and not list((killed.outputs / "work" / "runs").rglob("*.replaced"))


@pytest.mark.slow
def test_two_runs_never_share_a_gpu(site):
    site.write([dict(method="baseline", seed=[0, 1, 2, 3], device="auto")])
    locks = str(site.folder / "locks")
    code, output = site.run(jobs=3, CADM_GPUS="0,1", CADM_GPU_LOCKS=locks, STUB_SLEEP="0.5")
    assert code == 0, output
    used = [(e[1], e[3], e[4]) for e in entries(site)]
    assert {device for device, *_ in used} == {"0", "1"}
    for device in "01":
        spans = sorted((a, b) for d, a, b in used if d == device)
        assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))


@pytest.mark.slow
def test_a_batch_on_other_data_keeps_to_itself(site):
    site.write([dict(method="baseline")])
    assert site.run()[0] == 0
    usual = {p: p.read_bytes() for p in site.outputs.rglob("runs/**/*") if p.is_file()}
    site.write([dict(method="baseline")], data="mine")
    code, output = site.run()
    assert code == 0 and len(site.trained()) == 2 and len(set(site.trained())) == 1, (
        output
    )  # the same name, trained again
    assert {p: p.read_bytes() for p in usual} == usual
    assert [p.parent.parent.parent.parent.name for p in site.outputs.rglob("run.json")].count("on-mine") == 1
    code, output = site.run()
    assert code == 0 and len(site.trained()) == 2, output


# ---- the real notebook, in small


class RealSite(Site):
    """A site with the repository's own train.ipynb and small scenes."""

    def __init__(self, folder):
        from cadm_paper.data import build_scenes

        super().__init__(folder)
        shutil.copy(ROOT / "nbs" / "experiments" / "train.ipynb", self.train)
        build_scenes(folder / "data" / "scenes-coco", "coco", train=160, test=64)
        self.write([dict(method="cadm", lam=0.5)])

    def write(self, runs, **changes):
        defaults = dict(preset="mini", weights="none", epochs=12)
        self.config.write_text(
            yaml.safe_dump(
                dict(defaults=defaults, runs=runs, notebooks=[], report=False, evidence=True, **changes)
            )
        )

    def start(self, *more, **environ):
        return super().start(
            *more, **{"CADM_DATA": str(self.folder / "data"), "OMP_NUM_THREADS": "1", **environ}
        )

    def record(self):
        (found,) = (p.parent for p in self.outputs.glob("runs/*/*/run.json"))
        return RunRecord.load(found)

    def epochs_done(self):
        """Epochs in the checkpoint of the batch's only run."""
        import safetensors

        for path in self.outputs.glob("work/runs/*/*/*/checkpoint/last.safetensors"):
            with (
                contextlib.suppress(OSError, safetensors.SafetensorError),
                safetensors.safe_open(path, framework="numpy") as file,
            ):
                return json.loads(file.metadata()["state"])["epoch"]
        return 0

    def result(self):
        """All that a run leaves that is to be the same: metrics, history, and the bytes of weights, scores, maps and evidence."""
        import numpy as np

        record = self.record()
        with np.load(record.folder / "evidence.npz") as file:
            evidence = {
                k: v.tobytes() for k, v in file.items() if k != "record"
            }  # the record has its own times
        return record.metrics, record.history, record.files, evidence


@pytest.mark.slow
def test_a_real_training_killed_in_the_middle_ends_as_if_it_had_not_been(tmp_path):
    import psutil

    undisturbed, killed = RealSite(tmp_path / "a"), RealSite(tmp_path / "b")
    code, output = undisturbed.run()
    assert code == 0, output
    process = killed.start()
    wait_until(lambda: killed.epochs_done() >= 2, process)
    for p in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            p.kill()
    process.stdout.close()
    process.wait()
    assert not list(killed.outputs.glob("runs/*/*/run.json")), "it was killed too late to show anything"
    code, output = killed.run()
    assert (
        code == 0 and (found := re.search(r"begins after epoch (\d+) of 12", output)) and int(found[1]) >= 2
    ), output
    assert killed.result() == undisturbed.result()


@pytest.mark.slow
def test_evidence_is_measured_with_the_run_or_later_and_a_run_by_hand_counts(tmp_path):
    site = RealSite(tmp_path)
    site.write([dict(method="cadm", lam=0.5, epochs=2), dict(method="baseline", epochs=2)])
    environ = {"CADM_OUTPUTS": str(site.outputs), "CADM_DATA": str(tmp_path / "data")}
    line = [
        sys.executable,
        "-c",
        "from cadm_paper.app.cli import main; main()",
        "train",
        "--method",
        "cadm",
        "--weights",
        "none",
        "--epochs",
        "2",
    ]
    done = subprocess.run(
        line,
        env={**os.environ, **environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    by_hand = site.record().folder / "run.json"
    before = by_hand.read_bytes()
    code, output = site.run()
    assert code == 0 and "2 runs, 1 to do, 1 to measure" in output and by_hand.read_bytes() == before, output
    assert [p.parent.name.split("-seed")[0] for p in site.outputs.rglob("evidence.npz")] == ["cadm-lam0.5"]
    code, output = site.run()
    assert code == 0 and "2 runs, 0 to do, 2 at a time" in output, output
    (by_hand.parent / "evidence.npz").unlink()
    code, output = site.run()
    assert (
        code == 0
        and "0 to do, 1 to measure" in output
        and (by_hand.parent / "evidence.npz").exists()
        and by_hand.read_bytes() == before
    ), output


@pytest.mark.slow
def test_a_batch_on_scenes_with_independent_labels(tmp_path, monkeypatch):
    from cadm_paper.data.scenes import scenes_info

    site = RealSite(tmp_path)
    site.write([dict(method="cadm", lam=0.5, epochs=1)], data="independent", prepare_data=False)
    monkeypatch.setenv("CADM_DATA", str(tmp_path / "data"))
    assert workflow.VARIANTS["independent"] == dict(context=False)
    monkeypatch.setitem(
        workflow.VARIANTS, "independent", dict(context=False, train=96, test=32)
    )  # what the job of the workflow makes, in small
    workflow.data_job("scenes-coco", tmp_path / "ready.json", "independent")
    assert scenes_info(tmp_path / "data" / "independent" / "scenes-coco")["parameters"]["context"] is False
    code, output = site.run()
    assert code == 0, output
    (found,) = site.outputs.rglob("run.json")
    assert (
        found.relative_to(site.outputs).parts[:3] == ("on-independent", "runs", "scenes-coco")
        and (found.parent / "evidence.npz").exists()
    )
    assert json.loads(found.read_text())["dataset"]["test"]["images"] == 32


# ---- a cluster, as far as one machine allows

SBATCH = """#!/bin/sh
# Takes the job in, and runs it at once in the background: the call is kept for the test to read.
id=$$
printf '%s\\n' "$@" > "$SLURM_STANDIN/$id.call"
log=/dev/null; command=
while [ $# -gt 0 ]; do
  case "$1" in --wrap=*) command="${1#--wrap=}";; --wrap) shift; command="$1";; --output) shift; log=$(echo "$1" | sed "s/%j/$id/");; esac
  shift
done
[ -n "$command" ] || command=$(cat)
mkdir -p "$(dirname "$log")"; echo RUNNING > "$SLURM_STANDIN/$id.state"
( SLURM_JOB_ID=$id SLURM_JOBID=$id CADM_GPUS=0,1 sh -c "$command" > "$log" 2>&1 && echo COMPLETED > "$SLURM_STANDIN/$id.state" || echo FAILED > "$SLURM_STANDIN/$id.state" ) > /dev/null 2>&1 &
echo $id
"""
SRUN = """#!/bin/sh
# srun's own options, then the command
while [ $# -gt 0 ]; do case "$1" in -*) shift;; [0-9]*) shift;; *) break;; esac; done
exec "$@"
"""
SACCT = """#!/bin/sh
for f in "$SLURM_STANDIN"/*.state; do [ -e "$f" ] && echo "$(basename $f .state)|$(cat $f)"; done; exit 0
"""


@pytest.mark.slow
def test_the_slurm_profile_submits_what_each_rule_asks_for(site):
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="the Slurm executor is not installed")
    tools = site.folder / "slurm"
    tools.mkdir()
    for name, text in dict(
        sbatch=SBATCH,
        srun=SRUN,
        sacct=SACCT,
        squeue=SACCT,
        **{n: "#!/bin/sh\nexit 0\n" for n in ("scancel", "sinfo", "scontrol", "sacctmgr")},
    ).items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    profile = site.folder / "workflow" / "profiles" / "slurm" / "config.yaml"
    profile.write_text(
        profile.read_text() + "slurm-init-seconds-before-status-checks: 2\nslurm-no-account: true\n"
    )
    site.write([dict(method="baseline"), dict(method="cadm", lam=0.5, device="cuda", processes=2)])
    code, output = site.run("slurm", jobs=4, SLURM_STANDIN=str(tools), PATH=f"{tools}:{os.environ['PATH']}")
    calls = [path.read_text().splitlines() for path in sorted(tools.glob("*.call"))]
    assert code == 0, output + "\n".join(map(str, calls))
    trained = {
        next(a for a in c if a.startswith("--wrap")).split("run=")[1].split("-seed")[0]: c
        for c in calls
        if any("rule_train" in a for a in c)
    }
    assert set(trained) == {"baseline", "cadm-lam0.5"} and len(site.trained()) == 2
    assert all({"--mem", "64000", "-t", "2880", "--cpus-per-task=8"} <= set(c) for c in trained.values())
    assert "--gpus=2" in trained["cadm-lam0.5"] and not any(
        a.startswith("--gpus") for a in trained["baseline"]
    )
    assert {e[1] for e in entries(site)} == {"", "0,1"}  # a run on the CPU sees none, the other one both


@pytest.mark.slow
def test_the_bare_snakemake_line_works_too(site):
    environ = {
        **os.environ,
        "STUB_LOG": str(site.log),
        "PYTHONPATH": str(ROOT),
        "CADM_OUTPUTS": str(site.outputs),
    }
    line = [sys.executable, "-m", "snakemake", "--configfile", str(site.config)]
    dry = subprocess.run([*line, "-n"], cwd=site.folder, env=environ, capture_output=True, text=True)
    assert (
        dry.returncode == 0 and not site.trained() and not (site.outputs / "work" / "batch.json").exists()
    ), dry.stderr
    assert re.search(r"train +3", dry.stdout + dry.stderr)
    done = subprocess.run(line, cwd=site.folder, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and len(site.trained()) == 3 and len(site.table()["rows"]) == 3, done.stderr
    code, output = site.run()
    assert code == 0 and len(site.trained()) == 3, output

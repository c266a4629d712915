"""Whole batches through Snakemake and papermill: complete, killed, failing and continued.

Most runs are made by a stand-in for train.ipynb that computes nothing but behaves like the real one: a checkpoint after each epoch, a
record at the end, a result that depends on all epochs.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from cadm_paper.app import batch, jobs
from cadm_paper.data import build_scenes
from cadm_paper.engine import status
from cadm_paper.engine.record import load_runs
from cadm_paper.engine.synthetic import synthetic_run
from cadm_paper.engine.variants import MAIN, Variant

ROOT = Path(__file__).resolve().parents[1]
NAMES = "preset dataset method lam seed epochs weights device processes out_dir data_dir"
PARAMETERS = " = ".join([*NAMES.split(), "resume", "..."])
STAND_IN = """
import hashlib, json, os, time
import numpy as np
import safetensors.numpy
from cadm_paper.engine.config import TrainConfig
from cadm_paper.engine.record import code_version, save_arrays, write_record
from cadm_paper.engine.splits import prepare_data
from cadm_paper.files import folder_lock, whole_file
from cadm_paper.paper import COLUMNS
config = TrainConfig(**{name: globals()[name] for name in "NAMES".split() if globals()[name] is not ...})
checkpoint = os.path.join(out_dir, "checkpoint", "last.safetensors")
with folder_lock(out_dir):
    first, value = 0, "start"
    if os.path.exists(checkpoint):
        with safetensors.safe_open(checkpoint, "np") as file:
            first, value = (json.loads(file.metadata()["state"])[k] for k in ("epoch", "value"))
    for epoch in range(first, config.epochs):
        if os.environ.get("STUB_FAIL") == config.method and epoch == 1:
            raise ValueError("asked to fail")
        time.sleep(float(os.environ.get("STUB_SLEEP", "0")))
        value = hashlib.sha256(f"{value} {config.seed} {config.lam}".encode()).hexdigest()
        with whole_file(checkpoint) as file:
            state = {"state": json.dumps({"epoch": epoch + 1, "value": value})}
            file.write(safetensors.numpy.save({"x": np.zeros(1)}, metadata=state))
    os.remove(checkpoint)
    code = code_version() | {"package": os.environ.get("STUB_CODE", code_version()["package"])}
    made = {"first": first, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": os.environ["OMP_NUM_THREADS"]}
    train, test = (split.summary() | {"missing_ids": []} for split in prepare_data(config))
    classes, aps = list(test["positives"]), [0.5] * len(test["positives"])
    write_record(out_dir, "stub", config, [], metrics=dict.fromkeys(COLUMNS, int(value[:8], 16) / 16**8), history=[],
                 dataset={"name": config.dataset, "classes": classes, "train": train, "test": test}, per_class_ap=aps,
                 environment={"code": code}, timing=dict.fromkeys(("wall_s", "cpu_s", "training_s"), 0.0),
                 machine={"device": "cpu", "precision": "fp32", "threads": 1}, made={**made, "ended": time.time()})
"""
TABLE = """
import json
from pathlib import Path
from cadm_paper.engine.record import load_runs
from cadm_paper.engine.status import states
reasons = {p.name: [now.word, now.reason] for p, now in states(Path(runs_dir)).items()}
rows = {r.folder.name: r.metrics["mAP"] for r in load_runs(runs_dir)}
Path(runs_dir, "..", "table.json").write_text(json.dumps([reasons, rows], sort_keys=True))
"""


def write_notebook(path, *cells):
    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


class Site:
    """A checkout with the project's workflow, small scenes, and stand-ins for the notebooks unless `real`."""

    def __init__(self, folder: Path, real: bool = False):
        self.folder, self.outputs, self.data = folder, folder / "outputs", folder / "data"
        self.temporary = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # socket names must be short
        books = folder / "nbs" / "experiments"
        write_notebook(books / "train.ipynb", PARAMETERS, STAND_IN.replace("NAMES", NAMES))
        if real:
            shutil.copy(ROOT / "nbs" / "experiments" / "train.ipynb", books)
        write_notebook(books / "table1.ipynb", "runs_dir = None", TABLE)
        for name in ("settings.ini", "nbs/index.ipynb"):
            (folder / name).touch()
        shutil.copytree(ROOT / "workflow", folder / "workflow", ignore=shutil.ignore_patterns(".snakemake"))
        build_scenes(self.data / "scenes-coco", "coco", train=160 if real else 16, test=64 if real else 8)
        self.write([{"method": "baseline"}, {"method": "cadm"}])

    def write(self, runs, **changes):
        content = {"title": "Test", "notebooks": ["table1"], "report": False, "runs": runs, **changes}
        content["defaults"] = {
            "preset": "mini",
            "weights": "none",
            "epochs": 3,
            **changes.get("defaults", {}),
        }
        (self.folder / "batch.yaml").write_text(yaml.safe_dump(content))

    def start(self, *more, program="cadm_paper.app.cli reproduce --config batch.yaml", **environ):
        folders = {
            "CADM_OUTPUTS": self.outputs,
            "CADM_DATA": self.data,
            "TMPDIR": self.temporary,
            "PYTHONPATH": ROOT,
        }
        line = [sys.executable, "-m", *program.split(), *more]
        environ = {**os.environ, "CADM_GPUS": "", **{k: str(v) for k, v in folders.items()}, **environ}
        kwargs = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        return subprocess.Popen(line, cwd=self.folder, env=environ, **kwargs)

    def run(self, *more, code=0, **environ):
        """The output; the exit code must be `code`."""
        process = self.start(*more, **environ)
        output = process.communicate(timeout=600)[0]
        assert process.returncode == code, output
        return output

    def table(self):
        """States and numbers of the runs by name, as the table read them."""
        reasons, rows = json.loads((self.outputs / "table.json").read_text())
        return {name: word for name, (word, _) in reasons.items()}, rows, reasons

    def made(self):
        """The stand-in's notes in each record, and the time it was written."""
        return {r.folder.name: r.extra["made"] for r in load_runs(self.outputs / "runs")}

    def processes(self):
        """Live processes of this site."""
        named = lambda p: str(self.folder) in " ".join([*(p.info["cmdline"] or []), p.info["cwd"] or ""])
        every = psutil.process_iter(["cmdline", "cwd", "status"])
        return [p.info for p in every if named(p) and p.info["status"] != psutil.STATUS_ZOMBIE]

    def sockets(self):
        """Sockets of kernels and other temporary files."""
        return [p for p in self.temporary.glob("cadm-*/**/*") if not p.is_dir()]

    def wait(self, condition, seconds=300):
        end = time.time() + seconds
        while not condition():
            assert time.time() < end, self.processes()
            time.sleep(0.1)


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "workflow" / "config").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_valid(path):
    found = batch.load_batch(str(path))
    assert batch.plan(found) and found.title and found.clean == (path.stem != "mini")


def test_paper_lists_every_run_of_tables_1_and_2():
    runs = [run.config for run in batch.plan(batch.load_batch("paper"))]
    assert {(c.dataset, Variant.of(c)) for c in runs} == {
        (d, v) for d in ("coco2014", "nuswide") for v in MAIN
    }
    assert {(c.image_size, c.epochs, c.backbone) for c in runs} == {(448, 60, "resnet101")}


@pytest.mark.parametrize(
    "content, hint",
    [
        ({"runs": [{"seed": 0}, {"sede": 1}]}, "run 2: .*did you mean 'seed'"),
        ({"runs": [{"epochs": 1.5}]}, "run 1: epochs"),
        ({"runs": [{"out_dir": "x"}]}, "CADM_OUTPUTS"),
        ({"runs": [{}, "cadm"]}, "run 2: 'cadm' is not a mapping"),
        ({"runs": [{"preset": {}}]}, "run 1: preset = {}"),
        ({"run": []}, "did you mean 'runs'"),
        ({"defaults": {"dataset": "voc2077"}, "runs": [{}]}, "did you mean 'voc2007'"),
        ({"runs": [{"seed": [0, 0]}]}, "listed twice"),
        ({"runs": [{"seed": 0}, {"seed": []}]}, "run 2: seed has no value"),
        ({"notebooks": ["tabel1"]}, "did you mean 'table1'"),
    ],
)
def test_an_invalid_line_is_rejected_with_a_hint(content, hint):
    with pytest.raises(ValueError, match=hint):
        batch.parse_batch(content)


@pytest.mark.parametrize(
    "text", ["", "# runs: later", "- seed: 0", "runs", "? [1]\n: 2", "runs:\n  -", "runs: [{"]
)
def test_a_file_that_is_no_config_is_one_line_that_names_it(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    for config, says in ((tmp_path / "x.yaml", r"x\.yaml: "), ("x", "no config named 'x'")):
        with pytest.raises(batch.WorkflowError, match=says) as error:
            batch.load_batch(str(config))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content, modified", [({"dirty": True}, True), ({"clean": False}, True), ({}, None)])
def test_uncommitted_code_is_rejected_if_the_batch_requires_it(monkeypatch, content, modified):
    monkeypatch.setattr(batch, "code_version", lambda: {"modified": True})
    with pytest.raises(ValueError, match="uncommitted changes"):
        batch.check_code(batch.parse_batch({"clean": True}), ["a run"])
    monkeypatch.setattr(batch, "code_version", lambda: {"modified": modified})
    batch.check_code(batch.parse_batch({"clean": True} | content), ["a run"])


BUSY = """
import time
handlers = get_ipython().kernel.shell_handlers
answer = handlers["kernel_info_request"]

async def busy(*given):
    await answer(*given)
    time.sleep(0.2)

handlers["kernel_info_request"] = busy
"""


def test_a_kernel_that_is_busy_with_its_last_answer_is_not_interrupted(tmp_path, capfd):
    """It would print "KeyboardInterrupt caught in kernel"."""
    write_notebook(tmp_path / "book.ipynb", "x = 1", BUSY)
    jobs.execute(tmp_path / "book.ipynb", tmp_path / "out.ipynb", {"x": 2})
    assert "Interrupt" not in capfd.readouterr().err


def test_a_record_of_other_labels_is_stale(tmp_path, monkeypatch):
    monkeypatch.setenv("CADM_DATA", str(tmp_path))
    file = synthetic_run(tmp_path / "run", images=40, drawn=2).folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"synthetic": False}))
    assert status.state(file.parent).word == "finished"  # no data to compare with
    build_scenes(tmp_path / "scenes-coco", "coco", train=16, test=8)
    status._fingerprints.cache_clear()
    assert "other train and test images or labels" in status.state(file.parent).reason
    monkeypatch.setenv("CADM_DATA", str(tmp_path / "elsewhere"))
    assert status.state(file.parent).word == "finished"


@pytest.mark.slow
def test_a_batch_runs_once_and_time_stamps_are_ignored(site):
    output = site.run()
    assert "[2/2]" in output and "epoch" in output and set(site.table()[0].values()) == {"finished"}
    made = site.made()
    assert {(m["gpus"], m["threads"]) for m in made.values()} == {("", "1")} and not site.sockets()
    other = Site(site.folder / "elsewhere")  # a fresh clone with the records copied in, newest first
    shutil.copytree(site.outputs / "runs", other.outputs / "runs")
    for n, path in enumerate(sorted(other.folder.rglob("*"))):
        os.utime(path, (1e9 - n, 1e9 - n))
    assert "2 runs, 0 to do" in other.run() and other.made() == made and other.table() == site.table()
    output = other.run("--dry-run", STUB_CODE="other")
    assert output.count("keep") == 2 and "made by" not in output


@pytest.mark.slow
def test_failures_do_not_stop_other_runs_and_force_reruns_records_of_other_code(site):
    output = site.run(STUB_FAIL="baseline", STUB_CODE="other", code=1)
    states = site.table()[0]
    assert "ValueError: asked to fail" in output and sorted(states.values()) == ["failed", "finished"]
    (reason,) = (why for word, why in site.table()[2].values() if word == "failed")
    assert "asked to fail" in (site.outputs / reason.split("; see ")[1]).read_text()
    assert site.run(STUB_CODE="other").count("[1/1]") == 1
    made = site.made()
    assert [m["first"] for m in made.values()] == [1, 0]  # continued from the checkpoint
    assert (
        site.run("--dry-run").count("made by commit") == 2 and "0 to do" in site.run() and site.made() == made
    )
    site.run("--force", STUB_FAIL="cadm", code=1)
    again = site.made()  # a failure keeps the older record
    assert ["baseline" in name for name in made if made[name] != again[name]] == [True]
    site.run("--force")
    assert [m["first"] for m in site.made().values()] == [0, 1] and "made by" not in site.run("--dry-run")


@pytest.mark.slow
def test_kills_at_random_moments_leave_no_process_and_do_not_change_the_tables(tmp_path):
    undisturbed, killed = Site(tmp_path / "a"), Site(tmp_path / "b")
    undisturbed.run("--jobs", "1")
    draw = random.Random(seed := int(os.environ.get("CADM_TEST_SEED", time.time_ns() % 2**31)))
    for number in range(4):
        process = killed.start(STUB_SLEEP="1")
        killed.wait(lambda n=number: n or list(killed.outputs.glob("runs/*/*/checkpoint/last.safetensors")))
        assert killed.sockets() or number, "the kernels have no sockets in files"
        time.sleep(draw.uniform(0, 8))
        process.send_signal(
            signal.SIGINT if number == 1 else signal.SIGKILL
        )  # the command only; the other processes must end by themselves
        killed.wait(lambda: not killed.processes(), seconds=20)
        process.communicate()
    killed.run()
    assert killed.table() == undisturbed.table(), seed
    assert not killed.sockets()


@pytest.mark.slow
def test_a_second_workflow_in_a_folder_is_rejected(site):
    process = site.start(STUB_SLEEP="3")
    site.wait(lambda: list(site.outputs.glob("runs/*/*/checkpoint")))
    assert "another process is writing here" in site.run(code=2)
    process.send_signal(signal.SIGINT)
    assert "stopped" in process.communicate()[0] and process.returncode == 130


@pytest.mark.slow
def test_two_runs_never_share_a_gpu(site):
    site.write([{"method": "baseline", "seed": [0, 1, 2, 3], "device": "auto"}])
    site.run(CADM_GPUS="0,1", CADM_GPU_LOCKS=str(site.folder / "locks"), STUB_SLEEP="0.3")
    made = sorted(site.made().values(), key=lambda m: m["ended"])
    assert {m["gpus"] for m in made} == {"0", "1"}
    for one, two in [(a, b) for i, a in enumerate(made) for b in made[i + 1 :] if a["gpus"] == b["gpus"]]:
        assert two["ended"] - one["ended"] > 3 * 0.3


@pytest.mark.slow
def test_a_killed_training_ends_with_the_results_of_an_undisturbed_one(tmp_path):
    results = []
    for site, kill in ((Site(tmp_path / "a", real=True), False), (Site(tmp_path / "b", real=True), True)):
        site.write([{"method": "cadm"}], evidence=True, notebooks=[], defaults={"epochs": 8})
        if kill:
            process = site.start()
            site.wait(lambda site=site: list(site.outputs.glob("runs/*/*/checkpoint/last.safetensors")))
            for p in [*psutil.Process(process.pid).children(recursive=True), process]:
                p.kill()
            process.communicate()
            assert not list(site.outputs.glob("runs/*/*/run.json")), "killed too late for this test"
        site.run()
        (record,) = load_runs(site.outputs / "runs")
        results.append((record.metrics, record.history, record.files, set(record.beside("evidence.npz"))))
        assert bool(record.environment["code"].get("resumed")) == kill
    assert results[0] == results[1]


@pytest.mark.slow
def test_a_fresh_clone_makes_its_first_report(tmp_path):
    """Clone, reproduce with one epoch, open the report."""
    clone = tmp_path / "clone"
    if subprocess.run(["git", "clone", "-q", ROOT, clone], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    runs = [{"dataset": "scenes-coco", "method": "cadm", "lam": lam} for lam in (0, 0.5)]
    config = yaml.safe_load((clone / "workflow" / "config" / "mini.yaml").read_text())
    config |= {"runs": runs, "defaults": config["defaults"] | {"epochs": 1, "limit": 200}}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config))
    env = {**os.environ, "PYTHONPATH": str(clone)}
    env.pop("CADM_OUTPUTS", None)
    command = [sys.executable, "-m", "cadm_paper", "reproduce", "--config", tmp_path / "short.yaml"]
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    outputs = clone / "outputs"
    page = (outputs / "report" / "index.html").read_text(encoding="utf-8")
    assert all(f'id="run-{r.digest}"' in page for r in load_runs(outputs / "runs"))
    for made in ("tables/table1.html", "tables/table2.html", "figures/figure4*.png"):
        assert list(outputs.glob(made)), made
    assert not subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True).stdout


@pytest.mark.slow
def test_other_data_and_snakemake_alone(site):
    site.write([{"method": "baseline"}], data="mine", notebooks=[])
    shutil.copytree(site.data / "scenes-coco", site.data / "mine" / "scenes-coco")
    line = "snakemake --configfile batch.yaml"
    site.run("--dry-run", program=line)
    assert not site.outputs.exists() or not list(site.outputs.rglob("run.json"))
    site.run(program=line)
    (record,) = site.outputs.rglob("run.json")
    assert record.relative_to(site.outputs).parts[:3] == ("on-mine", "runs", "scenes-coco")
    assert "0 to do" in site.run()


SLURM = """#!/bin/sh
# Accepts a job and runs it at once; keeps the call for the test.
case "$(basename $0)" in sacct|squeue) for f in "$STANDIN"/*.state; do [ -e "$f" ] && echo "$(basename $f .state)|$(cat $f)"; done; exit 0;; sbatch) ;; *) exit 0;; esac
id=$$; printf '%s\\n' "$@" > "$STANDIN/$id.call"; log=/dev/null; command=
while [ $# -gt 0 ]; do case "$1" in --wrap=*) command="${1#--wrap=}";; --wrap) shift; command="$1";; esac; shift; done
[ -n "$command" ] || command=$(cat)
echo RUNNING > "$STANDIN/$id.state"
( SLURM_JOB_ID=$id SLURM_JOBID=$id CADM_GPUS=0,1 sh -c "$command" > "$STANDIN/$id.log" 2>&1 && echo COMPLETED > "$STANDIN/$id.state" || echo FAILED > "$STANDIN/$id.state" ) > /dev/null 2>&1 &
echo $id
"""
SRUN = '#!/bin/sh\nwhile [ $# -gt 0 ]; do case "$1" in -*) shift;; [0-9]*) shift;; *) break;; esac; done\nexec "$@"\n'


@pytest.mark.slow
def test_the_slurm_profile_submits_the_resources_of_each_rule(site):
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="the Slurm executor is not installed")
    tools = site.folder / "slurm"
    tools.mkdir()
    for name in ("sbatch", "srun", "sacct", "squeue", "scancel", "sinfo", "scontrol", "sacctmgr"):
        (tools / name).write_text(SRUN if name == "srun" else SLURM)
        (tools / name).chmod(0o755)
    profile = site.folder / "workflow" / "profiles" / "slurm" / "config.yaml"
    profile.write_text(
        profile.read_text() + "slurm-init-seconds-before-status-checks: 2\nslurm-no-account: true\n"
    )
    site.write([{"method": "baseline"}, {"method": "cadm", "device": "cuda", "processes": 2}], notebooks=[])
    site.run("--profile", "slurm", STANDIN=str(tools), PATH=f"{tools}:{os.environ['PATH']}")
    calls = ["\n".join(p.read_text().splitlines()) for p in tools.glob("*.call")]
    trained = {("cadm" if "run=cadm" in call else "baseline"): call for call in calls if "rule_train" in call}
    assert len(site.made()) == len(trained) == 2 and all(
        "64000" in c and "2880" in c for c in trained.values()
    )
    assert "--gpus=2" in trained["cadm"] and "--gpus" not in trained["baseline"]
    assert {m["gpus"] for m in site.made().values()} == {"", "0,1"}


@pytest.mark.slow
def test_gpu_runs_trains_a_config_with_several_processes_and_keeps_finished_runs(tmp_path):
    build_scenes(tmp_path / "data" / "scenes-coco", "coco", train=16, test=8)
    line = dict(preset="mini", dataset="scenes-coco", weights="none", epochs=1, seed=[1, 2])
    content = {"evidence": True, "runs": [line, {**line, "seed": 3, "weights": "none.npz"}], "notebooks": []}
    (tmp_path / "tiny.yaml").write_text(json.dumps(content))  # JSON is YAML
    env = os.environ | {"CADM_DATA": str(tmp_path / "data"), "CADM_OUTPUTS": str(tmp_path / "out")}
    command = [sys.executable, "tools/gpu_runs.py", str(tmp_path / "tiny.yaml"), "--jobs", "2"]
    said, made = [], []
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        said.append([text.split("  ", 1)[1] for text in done.stdout.splitlines()])
        files = [p for f in (tmp_path / "out").rglob("run.json") for p in f.parent.iterdir()]
        made.append({p: p.stat().st_mtime_ns for p in files})
    assert said[0] == said[1] and made[0] == made[1]
    assert [text.startswith("failed: scenes-coco/cadm") for text in said[0]] == [False, False, True]
    assert sorted(p.name for p in made[0]).count("replicates.npz") == 2
    assert sorted(p.name for p in made[0]).count("evidence.npz") == 2

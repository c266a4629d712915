"""What the notebook 07b_workflow cannot show in a cell: whole batches through Snakemake and papermill, killed, stopped, broken and gone on with.

The runs are made by a stand-in for train.ipynb that computes nothing but keeps every promise of the real one: a checkpoint after each epoch,
a record at the end, a result that depends on the whole sequence of epochs.
"""
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import nbformat
import pytest
import yaml

from cadm_paper import workflow
from cadm_paper.workflow import WorkflowError, parse_batch

ROOT = Path(__file__).resolve().parents[1]

SETUP = "before = set(globals())"
PARAMETERS = """
preset: str = None
dataset: str = None
method: str = None
lam: float = None
seed: int = None
epochs: int = None
device: str = None
out_dir: str = None
resume: bool = None
"""
BODY = """
from cadm_paper.config import TrainConfig, given_parameters
given = given_parameters({n: v for n, v in globals().items() if n not in ("TrainConfig", "given_parameters")}, before, extra=("resume",))
import hashlib, json, os, time
from pathlib import Path
import numpy as np
from cadm_paper.config import run_name
from cadm_paper.files import folder_lock, write_json
from cadm_paper.record import environment, save_arrays, write_record

given.pop("resume")
config = TrainConfig(**given)
out = Path(config.out_dir)
if not (out / "run.json").exists():
    with folder_lock(out, wait=True):
        path = out / "checkpoint" / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {"epoch": 0, "value": "start"}
        while state["epoch"] < config.epochs:
            if os.environ.get("STUB_FAIL") == config.method and state["epoch"] == 1:
                raise ValueError("the stand-in was told to fail")
            time.sleep(float(os.environ.get("STUB_SLEEP", "0")))
            text = state["value"] + run_name(config)
            state = {"epoch": state["epoch"] + 1, "value": hashlib.sha256(text.encode()).hexdigest()}
            write_json(path, state)
        value = int(state["value"][:8], 16) / 16**8
        with open(os.environ["STUB_LOG"], "a") as log:
            log.write(json.dumps([run_name(config), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")]) + "\\n")
        save_arrays(out / "scores.npz", scores=np.full((2, 3), value, dtype=np.float32))
        write_record(out, run_name(config), config, ["scores.npz"], metrics={"mAP": value, "CF1": value, "OF1": value}, history=[],
                     dataset={"name": config.dataset}, environment={}, timing={"seconds": 0})
"""
TABLE = """
import json
from pathlib import Path
from cadm_paper.record import load_runs
rows = {r.name: r.metrics["mAP"] for r in load_runs(runs_dir)}
states = {r["run"]: r["state"] for r in json.loads((Path(runs_dir) / "status.json").read_text())["runs"]}
Path(out_dir, "table.json").write_text(json.dumps({"rows": rows, "states": states}, sort_keys=True))
"""


def write_notebook(path, *cells):
    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
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
        shutil.copytree(ROOT / "workflow", folder / "workflow", ignore=shutil.ignore_patterns(".snakemake", "__pycache__"))
        self.train = write_notebook(experiments / "train.ipynb", ("", SETUP), ("parameters", PARAMETERS), ("", BODY))
        write_notebook(experiments / "table1.ipynb", ("parameters", "runs_dir: str = None\nout_dir: str = None"), ("", TABLE))
        self.config = folder / "batch.yaml"
        self.write([dict(method="baseline"), dict(method="cadm", lam=[0, 0.5])])

    def write(self, runs, **changes):
        content = dict(defaults=dict(preset="mini", epochs=3), runs=runs, notebooks=["table1"], report=False, prepare_data=False, **changes)
        self.config.write_text(yaml.safe_dump(content))

    def start(self, *more, jobs=2, **environ):
        code = "import sys; from cadm_paper.workflow import reproduce; sys.exit(reproduce(sys.argv[1], int(sys.argv[2]), force='force' in sys.argv))"
        env = {**os.environ, "STUB_LOG": str(self.log), "PYTHONPATH": str(ROOT), "CADM_OUTPUTS": str(self.outputs), **environ}
        return subprocess.Popen([sys.executable, "-c", code, str(self.config), str(jobs), *more], cwd=self.folder, env=env,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def run(self, *more, **kwargs):
        process = self.start(*more, **kwargs)
        output = process.communicate(timeout=300)[0]
        return process.returncode, output

    def trained(self):
        "Names of the runs that were finished by the stand-in, in order."
        return [json.loads(line)[0] for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def table(self):
        return json.loads((self.outputs / "report" / "table.json").read_text())


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_a_batch_is_run_once_and_only_content_makes_it_stale(site):
    code, output = site.run()
    assert code == 0, output
    assert len(site.trained()) == 3 and set(site.table()["states"].values()) == {"finished"}
    assert "[3/3]" in output
    code, output = site.run()
    assert code == 0 and len(site.trained()) == 3, output

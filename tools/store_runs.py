"""Store finished runs as a study: one record per line in runs.jsonl, metrics in results.csv, one .npz of arrays per variant.

Runs that the study already has, and that are not among the new ones, stay in it with their arrays.

python tools/store_runs.py outputs/runs outputs/reference/studies/mine --keep replicates.npz evidence.npz
python tools/store_runs.py outputs/runs outputs/reference/studies/confirm-scenes --config confirm-scenes --scores 1
python tools/store_runs.py outputs/runs outputs/reference/studies/curve-scenes --config curve-scenes --keep
"""

import argparse
import csv
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cadm_paper.app.batch import load_batch, plan
from cadm_paper.engine.record import SCHEMA, RunRecord, load_runs
from cadm_paper.engine.variants import Variant
from cadm_paper.files import sha256_file
from cadm_paper.results.measures import replicates

ARRAYS = ("replicates.npz", "evidence.npz", "scores.npz", "maps.npz")  # all that a study can have


def line_of(record: RunRecord) -> dict:
    """The content of a record's run.json."""
    parts = {k: v for k, v in vars(record).items() if k not in ("folder", "extra", "store", "config")}
    return {"schema": SCHEMA, "config": record.config.model_dump(), **parts, **record.extra}


def store(records: Iterable[RunRecord], arrays: dict[str, dict[str, np.ndarray]], study: Path) -> None:
    """Write a study from records and, by record name, arrays under file/array. The folder must be new."""
    study.mkdir(parents=True)
    records = sorted(records, key=lambda r: (Variant.of(r), r.dataset["name"], r.config.seed, r.name))
    lines, archives = {r.name: line_of(r) for r in records}, {}
    assert len(lines) == len(records), "two runs of one name"
    for r in records:
        for key, values in arrays.get(r.name, {}).items():
            archives.setdefault(f"{Variant.of(r).slug}.npz", {})[f"{r.name}/{key}"] = values
    for file, content in archives.items():
        np.savez_compressed(study / file, **content)
        for name in {key.split("/")[0] for key in content}:
            lines[name]["archive"] = {"file": file, "sha256": sha256_file(study / file)}
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines.values())
    (study / "runs.jsonl").write_text(text, encoding="utf-8")
    write_results(records, study / "results.csv")


def write_results(records: list[RunRecord], path: Path) -> None:
    """One row per run: variant, seed, data set, all metrics (fractions), commit."""
    metrics = list(dict.fromkeys(name for r in records for name in r.metrics))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["variant", "seed", "dataset", *metrics, "commit", "run"])
        writer.writeheader()
        for r in records:
            which = dict(
                variant=Variant.of(r).slug, seed=r.config.seed, dataset=r.dataset["name"], run=r.name
            )
            writer.writerow({**which, **r.metrics, "commit": r.environment["code"].get("commit")})


def keep_replicates(record: RunRecord) -> None:
    """Compute the replicates of a run from its scores, unless it has them or has no scores."""
    names = [name for name in record.scores() or () if name.startswith("scores")]
    if names and not record.holds("replicates.npz"):
        names += ["scores_both"] * record.config.method.startswith("baseline")  # the average of two poolings
        record.keep("replicates.npz", **{name: replicates(record, name) for name in names})


def kept_arrays(record: RunRecord, files: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of some .npz files of a run, under file/array; checksums verified."""
    found = {}
    for file in files:
        if record.holds(file):
            read = record.arrays(file) if file in record.files else record.beside(file)
            found |= {f"{Path(file).stem}/{key}": values for key, values in read.items()}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("study", type=Path)
    parser.add_argument("--keep", nargs="*", default=["replicates.npz", "evidence.npz"])
    parser.add_argument("--scores", nargs="*", type=int, default=[], help="seeds whose scores are also kept")
    parser.add_argument("--config", help="store only the runs of this config, as in cadm reproduce")
    given = parser.parse_args()
    runs = load_runs(given.runs)
    if given.config:
        named = {run.key for run in plan(load_batch(given.config))}
        runs = [run for run in runs if f"{run.dataset['name']}/{run.name}" in named]
    for run in runs if "replicates.npz" in given.keep else ():
        keep_replicates(run)
    new = {run.name for run in runs}
    stored = load_runs(given.study) if given.study.is_dir() else []
    runs += [run for run in stored if run.name not in new]
    scored = lambda r: ["scores.npz"] * (r.config.seed in given.scores)
    files = lambda r: [*given.keep, *scored(r)] if r.name in new else ARRAYS
    arrays = {r.name: kept_arrays(r, files(r)) for r in runs}
    shutil.rmtree(given.study, ignore_errors=True)  # everything it has is in memory
    store(runs, arrays, given.study)
    print(f"{len(runs)} runs in {given.study}, {len(new)} of them new")

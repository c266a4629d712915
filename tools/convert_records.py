"""Convert run folders of schema cadm-run/1 to studies of cadm-run/2, once: python tools/convert_records.py OLD NEW.

OLD holds studies, each with run folders below it; NEW gets the same studies in the form of tools/store_runs.py. A field that is gone
must have had its default; metrics and arrays are read back and must be equal. The old digest stays as `digest_v1`.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from store_runs import store

from cadm_paper.engine.config import config_digest
from cadm_paper.engine.record import SCHEMA, RunRecord, load_runs
from cadm_paper.engine.variants import run_name
from cadm_paper.files import sha256_file

GONE = {  # fields that are gone, and the one value that all runs had
    "asl_clip": 0.05,
    "checkpoint_minutes": 5.0,
    "classification": "bce",
    "crops": "none",
    "crowd": True,
    "decay_norms": True,
    "difficult": "ignore",
    "ema_decay": 0.0,
    "embed_relu": "hidden",
    "embed_resize": "interpolate",
    "gamma_neg": 4.0,
    "gamma_pos": 0.0,
    "lce_scale": 1.0,
    "limit_test": 0,
    "pack_dir": None,
    "report_epoch": "last",
    "sync_bn": False,
    "tensorboard": False,
    "tf32": True,
    "unlabelled_test": "keep",
}
STUDIES = (
    "mini",
    *(f"studies/{s}" for s in "confirm control explore independent photographs recipe".split()),
)


def converted(old: dict, folder: Path) -> RunRecord:
    """The record of a schema-1 run.json."""
    asked, resolved, extra = old["requested"], old["config"], set(old)
    for name, value in GONE.items():
        assert resolved.get(name, value) == asked.get(name, value) == value, (folder, name)
    limit = asked["limit_train"]  # alone: limits the test images too
    assert not limit or old["dataset"]["test"]["images"] <= limit
    machine = {name: resolved[name] for name in ("device", "precision", "threads")}
    assert all(asked[k] == v for k, v in resolved.items() if k not in machine)
    environment = dict(old["environment"])
    assert environment.pop("device_type") == machine["device"] and environment.pop("processes") == 1
    assert all(environment.pop(name) == machine[name] for name in ("precision", "threads"))
    environment["code"] = {k: v for k, v in environment["code"].items() if k != "sources"}
    assert not environment["code"].keys() - {"cadm_paper", "commit", "modified"}
    assert old["effective_lambda"] == asked["lam"]
    same = ("metrics", "history", "timing", "dataset", "files")
    rest = extra - {*same, *"schema name digest config requested environment effective_lambda".split()}
    new = {
        "schema": SCHEMA,
        "name": "unnamed",
        "digest": "",
        "config": {k: v for k, v in asked.items() if k not in {*GONE, "limit_train"}} | {"limit": limit},
        "machine": machine,
        "environment": environment,
        "digest_v1": old["digest"],
        **{k: old[k] for k in (*same, *sorted(rest))},
    }
    record = RunRecord.from_dict(new, folder)
    record.digest, record.name = config_digest(record.config), run_name(record.config)
    return record


def old_arrays(folder: Path, files: dict) -> dict[str, np.ndarray]:
    """All arrays of a run folder under file/array; checksums checked, and dropped where the study's own takes their place."""
    found, run = {}, sha256_file(folder / "run.json")
    for path in sorted(folder.glob("*.npz")):
        assert path.name not in files or sha256_file(path) == files[path.name], path
        with np.load(path, allow_pickle=False) as arrays:
            content = {k: arrays[k] for k in arrays.files}
        assert path.name in files or str(content.pop("record")) == run, path
        found |= {f"{path.stem}/{k}": v for k, v in content.items()}
    return found


def check(study: Path, old: dict[str, dict], arrays: dict) -> None:
    """Read a study back: metrics, history and arrays are what they were, bit for bit."""
    read = load_runs(study)
    assert {r.extra["digest_v1"] for r in read} == old.keys()
    for r in read:
        was = old[r.extra["digest_v1"]]
        assert r.metrics == was["metrics"] and r.history == was["history"] and r.files == was["files"]
        assert config_digest(r.config) == r.digest and r.dataset == was["dataset"]
        files = {key.split("/")[0] for key in arrays[r.name]}
        for file in files:
            found = r.arrays(f"{file}.npz") if f"{file}.npz" in r.files else r.beside(f"{file}.npz")
            expected = {k.split("/", 1)[1]: v for k, v in arrays[r.name].items() if k.startswith(f"{file}/")}
            assert found.keys() == expected.keys()
            for k, v in expected.items():
                assert (
                    found[k].dtype == v.dtype
                    and found[k].tobytes() == v.tobytes()
                    and found[k].shape == v.shape
                )


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    for name in STUDIES:
        folders = [p.parent for p in sorted((source / name).rglob("run.json"))]
        old = [json.loads((f / "run.json").read_text(encoding="utf-8")) for f in folders]
        records = [converted(content, folder) for content, folder in zip(old, folders)]
        arrays = {r.name: old_arrays(r.folder, r.files) for r in records}
        store(records, arrays, target / name)
        check(target / name, {content["digest"]: content for content in old}, arrays)
        print(f"{name}: {len(records)} runs in {len(list((target / name).iterdir()))} files")
    for text in source.rglob("README.md"):
        shutil.copy(text, target / text.relative_to(source))

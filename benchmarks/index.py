"""Time of `load_split` at full size: COCO's 82,783 training images and NUS-WIDE's 269,648, first reading and cached index.

No data are needed: files in the official format and size are generated in a temporary folder (COCO's JSON with the real number of objects and bytes; NUS-WIDE's
162 label files; one file per photograph, for NUS-WIDE with a photograph's size, so that the checks for missing photographs and placeholders cost the same).
Labels are random, about as many as the real ones. Each time is of a new process, measured around `load_split` (check that the index is current, open it, check every photograph):
`load` is wall-clock time, `cpu` CPU time; `process` is the wall-clock time of the whole interpreter.

References in the same run: pycocotools on the same JSON file, and NumPy's `loadtxt` on all label files of NUS-WIDE.

    python benchmarks/index.py --out benchmarks/results/index.json        # minutes, 2 GB of temporary disk
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import write

COCO = dict(images=82_783, labelled=82_081, objects=604_907, categories=80)  # instances_train2014.json
NUS = dict(Train=161_789, Test=107_859, concepts=81)

LOAD = """
import json, sys, time
from cadm_paper.data import load_split
name, root, split, cache = sys.argv[1:]
start, cpu = time.perf_counter(), time.process_time()
s = load_split(name, root, split, cache=cache == "True")
print(json.dumps(dict(load=time.perf_counter() - start, cpu=time.process_time() - cpu, images=len(s), labelled=int(s.labelled.sum()), fingerprint=s.fingerprint)))
"""

READ = """
import json, sys, time
from cadm_paper.data.nuswide import read_nus
start, cpu = time.perf_counter(), time.process_time()
read_nus(*sys.argv[1:])
print(json.dumps(dict(load=time.perf_counter() - start, cpu=time.process_time() - cpu)))
"""


def new_process(code: str, *args) -> dict:
    """Run Python code in a new process; returns its line of JSON with the time of the whole process."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True, check=True
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "process": time.perf_counter() - start}


def stand_ins(root: Path, names, sizes) -> None:
    """Placeholder files for photographs: sparse files of the given sizes with distinct first bytes."""
    for folder in {str(Path(n).parent) for n in names}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for k, n in enumerate(names):
        file = os.open(root / n, os.O_CREAT | os.O_WRONLY)
        os.write(file, b"%08d" % k)
        os.ftruncate(file, int(sizes[k]))
        os.close(file)


def make_coco(root: Path, share: float) -> Path:
    """A share of COCO's training annotations: ids with gaps, outlines that give the real file size."""
    g = np.random.default_rng(0)
    count, labelled, total = (round(share * COCO[k]) for k in ("images", "labelled", "objects"))
    ids = np.sort(g.choice(581_921, count, replace=False)).tolist()
    carrying = g.permutation(count)[:labelled]
    owner = np.concatenate([carrying, g.choice(carrying, total - len(carrying))]).tolist()
    category = (np.minimum(g.zipf(1.3, total), COCO["categories"])).tolist()
    outline = [[round(float(v), 2) for v in g.uniform(0, 640, 2 * 26)] for _ in range(1000)]
    names = [f"COCO_train2014_{i:012d}.jpg" for i in ids]
    images = [
        dict(
            license=5,
            file_name=n,
            coco_url=f"http://images.example.org/train2014/{n}",
            height=480,
            width=640,
            date_captured="2013-11-14 16:28:13",
            flickr_url=f"http://example.org/{i}_z.jpg",
            id=i,
        )
        for i, n in zip(ids, names)
    ]
    objects = [
        dict(
            segmentation=[outline[k % 1000]],
            area=702.1,
            iscrowd=int(k % 77 == 0),
            image_id=ids[o],
            bbox=[473.07, 395.93, 38.65, 28.67],
            category_id=c,
            id=k + 1,
        )
        for k, (o, c) in enumerate(zip(owner, category))
    ]
    categories = [
        dict(supercategory="thing", id=c, name=f"class {c}") for c in range(1, COCO["categories"] + 1)
    ]
    path = root / "annotations" / "instances_train2014.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps(dict(info={}, licenses=[], images=images, annotations=objects, categories=categories))
    )
    stand_ins(root, [f"train2014/{n}" for n in names], [100_000] * len(names))
    return path


def make_nus(root: Path, share: float) -> None:
    """NUS-WIDE's label files with a share of its images: 162 label files, image lists with backslashes, 704 folders of photographs."""
    g = np.random.default_rng(0)
    concepts = [f"concept{c:02d}" for c in range(NUS["concepts"])]
    rate = 0.28 / np.arange(1, len(concepts) + 1) ** 0.8
    for part in ("ConceptsList", "ImageList", "Groundtruth/TrainTestLabels"):
        (root / part).mkdir(parents=True)
    (root / "ConceptsList" / "Concepts81.txt").write_text("\n".join(concepts) + "\n")
    for kind in ("Train", "Test"):
        n = round(share * NUS[kind])
        names = [f"folder{k % 704:03d}\\{k:04d}_{g.integers(10**9)}{k}.jpg" for k in range(n)]
        (root / "ImageList" / f"{kind}Imagelist.txt").write_text(
            "".join(f"{s}\r\n" for s in names), newline=""
        )
        for c, concept in enumerate(concepts):
            lines = np.full((n, 3), (48, 13, 10), np.uint8)
            lines[:, 0] += g.random(n) < rate[c]
            (root / "Groundtruth" / "TrainTestLabels" / f"Labels_{concept}_{kind}.txt").write_bytes(
                lines.tobytes()
            )
        stand_ins(
            root / "Flickr",
            [s.replace("\\", "/") for s in names],
            g.lognormal(np.log(60_000), 0.6, n).clip(5_000, 400_000),
        )


def measure(name: str, root: Path, splits, repeats: int) -> dict:
    """First reading without a cache, one that writes the index, then `repeats` from it; fingerprints must agree."""
    result = {}
    for split in splits:
        first = new_process(LOAD, name, root, split, False)
        new_process(LOAD, name, root, split, True)
        new_process(LOAD, name, root, split, True)
        cached = [new_process(LOAD, name, root, split, True) for _ in range(repeats)]
        assert {c["fingerprint"] for c in cached} == {first["fingerprint"]}
        result[split] = dict(
            images=first["images"],
            labelled=first["labelled"],
            first_load_s=first["load"],
            first_cpu_s=first["cpu"],
            cached_load_s=statistics.median(c["load"] for c in cached),
            cached_load_all_s=sorted(c["load"] for c in cached),
            cached_cpu_s=statistics.median(c["cpu"] for c in cached),
            cached_process_s=statistics.median(c["process"] for c in cached),
        )
    return result


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--share", type=float, default=1, help="of the images; below 1 as a functional check")
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    result = dict(
        command="python benchmarks/index.py",
        python=platform.python_version(),
        machine=platform.machine(),
        cores=os.cpu_count(),
        share=a.share,
    )
    with tempfile.TemporaryDirectory() as tmp:
        path = make_coco(Path(tmp) / "coco", a.share)
        result["coco2014"] = measure("coco2014", path.parents[1], ["train2014"], a.repeats)
        plain = new_process(
            "import json, sys, time; from pycocotools.coco import COCO; t, c = time.perf_counter(), time.process_time(); COCO(sys.argv[1]); print(json.dumps(dict(load=time.perf_counter() - t, cpu=time.process_time() - c)))",
            path,
        )
        train = result["coco2014"]["train2014"]
        result["coco2014"].update(
            json_bytes=path.stat().st_size,
            pycocotools_load_s=plain["load"],
            pycocotools_cpu_s=plain["cpu"],
            first_over_pycocotools_cpu=train["first_cpu_s"] / plain["cpu"],
            pycocotools_over_cached_cpu=plain["cpu"] / train["cached_cpu_s"],
        )
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp) / "nuswide"
        make_nus(root, a.share)
        result["nuswide"] = measure("nuswide", root, ["train", "test"], a.repeats)
        plain = new_process(
            "import glob, json, sys, time, numpy; t, c = time.perf_counter(), time.process_time(); [numpy.loadtxt(f, dtype=numpy.int8) for f in glob.glob(sys.argv[1])]; print(json.dumps(dict(load=time.perf_counter() - t, cpu=time.process_time() - c)))",
            root / "Groundtruth" / "TrainTestLabels" / "*.txt",
        )
        both = [new_process(READ, root, split) for split in ("train", "test")]
        result["nuswide"].update(
            {
                f"both_splits_first_{k}_s": sum(
                    result["nuswide"][s][f"first_{k}_s"] for s in ("train", "test")
                )
                for k in ("load", "cpu")
            }
        )
        result["nuswide"].update({f"label_files_{k}_s": sum(r[k] for r in both) for k in ("load", "cpu")})
        result["nuswide"].update(loadtxt_load_s=plain["load"], loadtxt_cpu_s=plain["cpu"])
        result["load_average"] = os.getloadavg()[2]
    print(json.dumps(result, indent=1))
    write(result, a.out)


if __name__ == "__main__":
    main()

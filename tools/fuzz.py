"""Damaged and hostile files for every reader: it must return a value, or raise a one-line error that names the file.

python tools/fuzz.py [FILES [READER ...]]
"""

import faulthandler
import io
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import traceback
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from cadm_paper.app.batch import load_batch
from cadm_paper.app.cli import refused
from cadm_paper.data import build_scenes, load_split
from cadm_paper.data.download import unpack
from cadm_paper.data.loading import Loader, load_image
from cadm_paper.data.scenes import scenes_info
from cadm_paper.data.voc import VOC_CLASSES
from cadm_paper.engine.checkpoint import load_checkpoint, save_checkpoint
from cadm_paper.engine.record import RunRecord, load_runs
from cadm_paper.engine.synthetic import synthetic_run
from cadm_paper.methods import load_model
from cadm_paper.model import CADM
from cadm_paper.results.claims import read_verdicts
from cadm_paper.results.evaluation import evaluate_files
from cadm_paper.weights import read_state_dict

SECONDS, BYTES = 10, 2 * 2**30  # limits of one file

# ---- valid files: each function writes to a folder and returns the file to damage


def put(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def picture(kind="JPEG", mode="RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file := io.BytesIO(), kind)
    return file.getvalue()


def coco(root):
    for name in "ab":
        put(root / f"train2014/{name}.jpg", picture())
    thing = dict(id=1, image_id=1, category_id=1, bbox=[0.5, 1, 5, 5], iscrowd=0)
    content = dict(
        images=[dict(id=1, file_name="a.jpg"), dict(id=2, file_name="b.jpg")],
        categories=[dict(id=1, name="cat"), dict(id=3, name="dog")],
        annotations=[thing, thing | dict(id=2, image_id=2, category_id=3)],
    )
    return put(root / "annotations/instances_train2014.json", json.dumps(content))


def nus(file):
    def make(root):
        put(root / "ConceptsList/Concepts81.txt", "sky\nsea\n")
        put(root / "ImageList/TrainImagelist.txt", "a\\1_1.jpg\na\\2_2.jpg\n")
        for concept in ("sky", "sea"):
            put(root / f"Groundtruth/TrainTestLabels/Labels_{concept}_Train.txt", "0\n1\n")
        for n in (1, 2):
            put(root / f"Flickr/a/{n}_{n}.jpg", picture())
        return root / file

    return make


def voc(file):
    def make(root):
        for c in VOC_CLASSES:
            put(root / f"VOC2007/ImageSets/Main/{c}_trainval.txt", "000001  1\n000002 -1\n")
        corners = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        thing = f"<object><name>cat</name><difficult>0</difficult>{corners}</object>"
        for i in ("000001", "000002"):
            put(root / f"VOC2007/Annotations/{i}.xml", f"<annotation>{thing}</annotation>")
            put(root / f"VOC2007/JPEGImages/{i}.jpg", picture())
        return root / "VOC2007" / file

    return make


def own(file, text, **more):
    def make(root):
        for name, content in {"a.jpg": picture(), "b.jpg": picture(), **more}.items():
            put(root / name, content)
        return put(root / file, text)

    return make


def index(root):
    coco(root)
    load_split("coco2014", root, "train2014")
    return next(root.glob(".cadm-index/*.npz"))


def decoded(root):
    coco(root)
    list(Loader(load_split("coco2014", root, "train2014"), 16).epoch(2))
    return next(root.glob(".cadm-index/*.raw"))


def scores(root):
    rng = np.random.default_rng(0)
    arrays = dict(
        scores=rng.random((6, 3)), targets=rng.integers(0, 2, (6, 3)), classes=np.array(list("abc"))
    )
    np.savez(root / "s.npz", **arrays)
    return root / "s.npz"


def record(root):
    return synthetic_run(root / "scenes-coco" / "cadm", images=20, drawn=2).folder / "run.json"


def record_arrays(root):
    return record(root).with_name("scores.npz")


def study(root):
    line = json.dumps(json.loads(record(root).read_text()))
    (root / "scenes-coco" / "cadm" / "run.json").unlink()
    return put(root / "runs.jsonl", line + "\n")


def weights(file):
    state = {"a.weight": torch.ones(3, 2), "b": torch.zeros(4)}
    savers = {
        ".safetensors": lambda path: safetensors.torch.save_file(state, path),
        ".npz": lambda path: np.savez(path, **{k: v.numpy() for k, v in state.items()}),
        ".pth": lambda path: torch.save(state, path),
    }
    return lambda root: savers[Path(file).suffix](root / file) or root / file


def model(file):
    def make(root):
        torch.manual_seed(0)
        CADM(3, "narrow_resnet", None, image_size=32, quiet=True).save_pretrained(root / "model")
        return root / "model" / file

    return make


def checkpoint(root):
    save_checkpoint(root / "state.safetensors", {"model": {"w": torch.ones(2)}}, {"epoch": 1})
    return root / "state.safetensors"


def batch(root):
    run = "dataset: scenes-coco\n    preset: mini\n    method: cadm\n    lam: [0, 0.5]\n    seed: 1\n"
    return put(root / "b.yaml", f"title: a batch\nnotebooks: [table1]\nreport: false\nruns:\n  - {run}")


def scenes(root):
    return build_scenes(root / "s", train=1, test=1) / "scenes.json"


def archive(kind):
    def make(root):
        path = root / f"a.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
                [file.writestr(f"d/{name}", name * 100) for name in "ab"]
        else:
            with tarfile.open(path, "w") as file:
                for name in "ab":
                    (entry := tarfile.TarInfo(f"d/{name}")).size = 100
                    file.addfile(entry, io.BytesIO(name.encode() * 100))
        return path

    return make


def unpacked(root, path):
    """As in `fetch`, which passes only files."""
    if path.is_file():
        unpack(path, root / "out")


def verdicts(root):
    return put(root / "verdicts.json", json.dumps({"counts": {"holds": 1}, "claims": []}))


split = lambda name, what: lambda root, path: load_split(name, root, what, cache=False)
image = lambda kind, mode="RGB": lambda root: put(root / "x.jpg", picture(kind, mode))
pixels = lambda root, path: load_image(path, 24)


def again(root, path):
    """A damaged cache file is rebuilt: no error, no other value."""
    found = load_split("coco2014", root, "train2014")
    assert found.labels.tolist() == [[1, 0], [0, 1]] and [p.name for p in found.paths] == ["a.jpg", "b.jpg"]
    batches = list(Loader(found, 16).epoch(2))
    assert (batches[0].images[0] == load_image(found.paths[0], 16)).all() or path.suffix == ".raw"


def arrays(root, path):
    return [r.scores() for r in load_runs(root)]


READERS = {
    "coco": (coco, split("coco2014", "train2014")),
    "nus concepts": (nus("ConceptsList/Concepts81.txt"), split("nuswide", "train")),
    "nus images": (nus("ImageList/TrainImagelist.txt"), split("nuswide", "train")),
    "nus labels": (nus("Groundtruth/TrainTestLabels/Labels_sea_Train.txt"), split("nuswide", "train")),
    "voc list": (voc("ImageSets/Main/cow_trainval.txt"), split("voc2007", "trainval")),
    "voc xml": (voc("Annotations/000001.xml"), split("voc2007", "trainval")),
    "own csv": (own("train.csv", "path,labels,ignored\na.jpg,cat;dog,\nb.jpg,,cat\n"), split("own", "train")),
    "own wide": (own("train.csv", "path,cat,dog,id\na.jpg,1,0,1\nb.jpg,0,-1,2\n"), split("own", "train")),
    "own classes": (
        own("classes.txt", "cat\ndog\n", **{"train.csv": "path,labels\na.jpg,cat\n"}),
        split("own", "train"),
    ),
    "index": (index, again),
    "decoded": (decoded, again),
    "scenes": (scenes, lambda root, path: scenes_info(path.parent)),
    **{f"image {k}": (image(k), pixels) for k in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")},
    "image 16 bit": (image("TIFF", "I;16"), pixels),
    "image CMYK": (image("JPEG", "CMYK"), pixels),
    "zip": (archive("zip"), unpacked),
    "tar": (archive("tar"), unpacked),
    "scores": (scores, lambda root, path: evaluate_files(path)),
    "record": (record, lambda root, path: RunRecord.load(path.parent)),
    "record arrays": (record_arrays, arrays),
    "study": (study, lambda root, path: load_runs(root)),
    **{f"weights {f}": (weights(f), lambda root, path: read_state_dict(path)) for f in ("w.pth", "w.npz")},
    "weights safetensors": (weights("w.safetensors"), lambda root, path: read_state_dict(path)),
    "model config": (model("config.json"), lambda root, path: load_model(path.parent)),
    "model weights": (model("model.safetensors"), lambda root, path: load_model(path.parent)),
    "checkpoint": (checkpoint, lambda root, path: load_checkpoint(path)),
    "verdicts": (verdicts, lambda root, path: read_verdicts(root)),
    "batch": (batch, lambda root, path: load_batch(str(path))),
}

# ---- how files are damaged: bytes, words, values of JSON, members of archives, and no regular file

WORDS = [
    b"",
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"9" * 5000,
    b"null",
    b"true",
    b'"',
    b"{",
    b"[" * 50_000,
    b"\0",
    b"\xff",
]
WORDS += [
    b"010",
    b"1:30",
    b"&a [*a]",
    b"../../etc/passwd",
    b"<script>",
    b"\\ud800",
    b"a" * 200_000,
    b"\n\n",
    b",;|",
]
VALUES = [
    None,
    True,
    -1,
    2**70,
    1e308,
    "",
    "x\0",
    "\ud800",
    "../x",
    "9" * 5000,
    [],
    {},
    [[]],
    {"id": 1},
    "<b>",
    0.5,
]


def flip(raw, rng):
    at = rng.randrange(max(len(raw), 1))
    return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]


def cut(raw, rng):
    a, b = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    return rng.choice([raw[:a], raw[:a] + raw[b:], raw[:b] + raw[a:]])


def word(raw, rng):
    found = list(re.finditer(rb"[\w.+-]+", raw)) or [re.match(b"", raw)]
    at = rng.choice(found)
    return raw[: at.start()] + rng.choice(WORDS) + raw[at.end() :]


def line(raw, rng):
    lines = raw.splitlines(keepends=True) or [b""]
    at = rng.randrange(len(lines))
    return b"".join(
        lines[:at] + rng.choice([[], [lines[at]] * 2, [rng.choice(WORDS) + b"\n"]]) + lines[at + 1 :]
    )


def value(raw, rng):
    try:
        content = json.loads(raw.splitlines()[0] if raw.count(b"\n") == 1 else raw)
    except (ValueError, IndexError):
        return word(raw, rng)
    places, todo = [], [content]
    while todo:
        node = todo.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        places += [(node, key) for key in keys]
        todo += [node[key] for key in keys]
    node, key = rng.choice(places)
    node[key] = rng.choice(VALUES)
    return json.dumps(content).encode()


def member(raw, rng):
    """Another member of a zip archive (.npz, .pth): a bomb, objects, an array of a wrong length."""
    if not zipfile.is_zipfile(io.BytesIO(raw)):
        return flip(raw, rng)
    with zipfile.ZipFile(io.BytesIO(raw)) as old:
        files = {i.filename: old.read(i) for i in old.infolist()}
    name = rng.choice(sorted(files))
    if files[name][:6] == b"\x93NUMPY":
        header = b"{'descr': '%s', 'fortran_order': False, 'shape': (%s), }\n"
        descr, shape = (
            rng.choice([b"|O", b"<f8", b"|u1", b"<U9", b"<c8"]),
            rng.choice([b"", b"10000000000,", b"3, -1", b"0,"]),
        )
        text = header % (descr, shape)
        files[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + files[name][80:]
    else:
        files[name] = word(files[name], rng)
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as new:
        [new.writestr(n, content) for n, content in files.items()]
        if rng.random() < 0.2:
            new.writestr("bomb.npy", bytes(2**26))
    raw = bytearray(out.getvalue())
    if rng.random() < 0.2:
        raw[raw.rindex(b"PK\1\2") + 8] |= 1  # marked as encrypted
    return bytes(raw)


def no_file(path, rng):
    path.unlink()
    kind = rng.randrange(5)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind > 2:
        path.symlink_to(["/dev/zero", path.with_name("nowhere")][kind - 3])


DAMAGES = [flip, flip, cut, cut, word, word, line, value, value, member]


# ---- one process per reader, with limits


class TooSlow(BaseException):
    pass


def late(*_):
    raise TooSlow


def faults(name: str, root: Path, files: int) -> list[str]:
    """Failures of a reader with this many damaged files, in a separate process with limits."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    signal.signal(signal.SIGALRM, late)
    torch.set_num_threads(1)
    make, read = READERS[name]
    rng, found = random.Random(name), []
    (root / "good").mkdir()
    good = make(root / "good")
    read(root / "good", good)  # the valid file
    raw = good.read_bytes()
    for n in range(files):
        path, how = good, rng.choice(DAMAGES) if n >= 8 else no_file
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        content = raw
        path.write_bytes(raw)
        if how is no_file:
            no_file(path, random.Random(n))
        else:
            content = how(raw, rng)
            path.write_bytes(content)
        signal.alarm(SECONDS)
        faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # if no signal is handled
        try:
            read(root / "good", path)
        except TooSlow:
            found.append(f"{n} {how.__name__}: over {SECONDS} s")
        except Exception as error:
            text = str(error)
            if not refused(error) or "\n" in text or not (str(root) in text or path.name in text):
                where = traceback.extract_tb(error.__traceback__)[-1]
                found.append(
                    f"{n} {how.__name__}: {type(error).__name__} {text[:200]!r} ({where.filename}:{where.lineno})"
                )
        finally:
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return found + [f"{peak:,} bytes of memory"] * (peak > BYTES)


def main(files: int = 80, *names: str) -> int:
    """Damage this many files for each reader (default all); prints the failures."""
    wrong = 0
    for name in names or READERS:
        with tempfile.TemporaryDirectory() as root, ProcessPoolExecutor(1, get_context("fork")) as pool:
            found = pool.submit(faults, name, Path(root), files).result()
        wrong += len(found)
        print(*(f"{name}: {line}" for line in found), sep="\n", end="\n" * bool(found))
    print(f"{files} files for each of {len(names or READERS)} readers; {wrong} failures")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2]), *sys.argv[2:]))

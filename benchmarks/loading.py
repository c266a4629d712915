"""Images per second from files on disk to normalised tensors ready for the model, as ratios to the field's usual loader.

Usual: `Image.open`, `convert("RGB")`, resize to 448 x 448, random flip, `ToTensor`, `Normalize`, in a `DataLoader` of as many worker
processes as the feeder has threads. Against it: the feeder on the same files, on a JPEG pack and on a raw pack, each followed by `prepare`
(flip, normalisation). The photographs are coco-tiny's originals, copied several times, so that "cold" (the
files are dropped from the page cache before each epoch; what the disk or a hypervisor caches is out of reach) means reading all of them.

The ways take turns, one epoch each, so that whatever else the machine does falls on all; a ratio is taken in each round, and its median
reported. Two kinds: of wall-clock times, and of the CPU time that all threads and worker processes spent, which is what a busy machine
does not distort. Also: the first batch of a new process with everything in the page cache, memory over epochs, the pack's size and loss,
and what decoding large photographs at reduced size saves and changes.

    python benchmarks/loading.py --out benchmarks/results/loading.json
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import setting, spread, write
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cadm_paper.data.feed import PIXELS, DeviceFeeder, Feeder, flip_mask, prepare
from cadm_paper.data.images import load_image
from cadm_paper.data.pack import Pack, pack
from cadm_paper.data.split import Split

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CADM_SHARED_DATA", ROOT.parent / "shared" / "data"))


class Usual(Dataset):
    """What most multi-label code does with one photograph."""

    def __init__(self, split: Split, size: int, flip: float = 0.5):
        self.split = split
        self.steps = transforms.Compose(
            [
                transforms.Resize((size, size)),
                transforms.RandomHorizontalFlip(flip),
                transforms.ToTensor(),
                transforms.Normalize(*PIXELS["imagenet"]),
            ]
        )

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        return self.steps(Image.open(self.split.paths[i]).convert("RGB")), torch.from_numpy(
            self.split.labels[i]
        )


class UsualLoader:
    def __init__(self, split, size, batch, workers):
        self.loader = DataLoader(
            Usual(split, size), batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )

    def __call__(self, epoch):
        for images, _ in self.loader:
            yield images

    def processes(self):
        return [w.pid for w in getattr(self.loader._iterator, "_workers", [])]


class OurLoader:
    def __init__(self, split, size, batch, workers, packed=None):
        self.feeder, self.batch = Feeder(split, size, workers=workers, pack=packed, in_memory=False), batch

    def __call__(self, epoch):
        for batch in self.feeder.epoch(self.batch, seed=0, epoch=epoch, shuffle=True):
            yield prepare(batch.images, flip=flip_mask(batch.indices, 0, epoch))

    def processes(self):
        return []


class GpuLoader(OurLoader):
    """Decoding on the GPU. The other ways leave their tensors on the CPU, so its ratio is a lower bound."""

    def __init__(self, split, size, batch, workers):
        self.feeder, self.batch = DeviceFeeder(split, size, "cuda", workers=workers), batch


def copies(folder: Path, times: int) -> Split:
    """coco-tiny's photographs, `times` times each, as files of their own."""
    originals = sorted((SHARED / "coco-tiny").glob("*/*.jpg"))
    if not originals:
        sys.exit(
            f"{SHARED / 'coco-tiny'}: no photographs; set CADM_SHARED_DATA to the folder that holds coco-tiny/"
        )
    paths = [folder / f"{k:02}-{p.name}" for k in range(times) for p in originals]
    for k, path in enumerate(paths):
        shutil.copyfile(originals[k % len(originals)], path)
    return Split(
        "coco-tiny",
        "copies",
        folder,
        tuple(map(str, range(80))),
        tuple(p.stem for p in paths),
        paths,
        np.zeros((len(paths), 80), np.int8),
    )


def drop_from_cache(paths) -> None:
    """Ask the kernel to forget the content of files."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cpu_seconds(processes) -> float:
    """CPU time of this process (all threads) and of worker processes, seconds."""
    ticks = 0
    for pid in processes:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def resident_megabytes(processes=()) -> float:
    """Proportional memory of this process, or of worker processes, in MB: pages shared by several count once."""
    lines = (Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() for pid in processes or ["self"])
    return sum(int(line.split()[1]) for text in lines for line in text if line.startswith("Pss:")) / 1000


def one_epoch(way, epoch: int, images: int) -> dict:
    """Wall and CPU time of one pass; the sum of a pixel column makes sure that every batch arrived."""
    wall, cpu, seen = time.perf_counter(), cpu_seconds(way.processes()), 0
    for batch in way(epoch):
        seen += len(batch)
        batch[:, 0, 0].sum().item()
    assert seen == images
    return dict(wall=time.perf_counter() - wall, cpu=cpu_seconds(way.processes()) - cpu)


def rounds(ways: dict, count: int, images: int, before=lambda name: None) -> dict:
    """Epochs of all ways in turn, the order reversed every other time; images/s and ratios to `usual`."""
    times = {name: [] for name in ways}
    for r in range(count):
        for name in list(ways) if r % 2 == 0 else reversed(ways):
            before(name)
            times[name].append(one_epoch(ways[name], r + 1, images))
    result = {}
    for name, own in times.items():
        result[name] = dict(
            images_per_s=spread([images / t["wall"] for t in own]),
            cpu_ms_per_image=spread([1000 * t["cpu"] / images for t in own]),
        )
        if name != "usual":
            for kind in ("wall", "cpu"):
                result[name][f"{kind}_ratio"] = spread(
                    [u[kind] / t[kind] for u, t in zip(times["usual"], own)]
                )
    return result


def memory_over_epochs(way, epochs: int, images: int) -> dict:
    """Memory in MB (of the worker processes where there are any, else of this process) after each of some epochs."""
    return dict(
        after_epoch_mb=[
            round(resident_megabytes(way.processes()), 1) for e in range(epochs) if one_epoch(way, e, images)
        ]
    )


FIRST = """
import sys, time
began = time.perf_counter()
sys.path.insert(0, sys.argv[1])
import loading
from pathlib import Path
loading.torch.set_num_threads(1)
imported = time.perf_counter()
folder, packed, size, batch, workers = sys.argv[2], sys.argv[3], *map(int, sys.argv[4:])
paths = sorted(Path(folder).glob("*.jpg"))
split = loading.Split("coco-tiny", "copies", folder, tuple(map(str, range(80))), tuple(p.stem for p in paths), paths, loading.np.zeros((len(paths), 80), loading.np.int8))
way = loading.UsualLoader(split, size, batch, workers) if packed == "usual" else loading.OurLoader(split, size, batch, workers, None if packed == "files" else packed)
start = time.perf_counter()
next(iter(way(0)))[:, 0, 0].sum().item()
print(imported - began, start - imported, time.perf_counter() - start)
"""


def first_batch(folder: Path, which: str, a) -> dict:
    """New processes: seconds for importing, for opening split and pack, and from there to the first prepared batch."""
    command = [
        sys.executable,
        "-c",
        FIRST,
        str(ROOT / "benchmarks"),
        str(folder),
        which,
        str(a.size),
        str(a.batch),
        str(a.workers),
    ]
    done = [
        list(map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))
        for _ in range(a.starts)
    ]
    return {
        name: spread(list(values))
        for name, values in zip(("import_s", "open_s", "first_batch_s"), zip(*done))
    }


def largest_difference(split, size: int) -> float:
    """Between the tensors of the usual way and ours, no flip, in steps of 1/255 before the division by the deviation."""
    usual = Usual(split, size, flip=0.0)
    batch = next(iter(Feeder(split, size, in_memory=False).epoch(32)))
    theirs = torch.stack([usual[i][0] for i in batch.indices.tolist()])
    return (
        ((prepare(batch.images) - theirs) * torch.tensor(PIXELS["imagenet"][1]).view(1, 3, 1, 1) * 255)
        .abs()
        .max()
        .item()
    )


def draft_on_large(split, size: int, repeats: int) -> dict:
    """`draft=True` on photographs of camera size (made by enlarging ten originals eight times): CPU time as a ratio, mean change of pixels."""
    with tempfile.TemporaryDirectory() as tmp:
        paths = [Path(tmp) / path.name for path in split.paths[:10]]
        for path, original in zip(paths, split.paths):
            image = Image.open(original).convert("RGB")
            image.resize((image.width * 8, image.height * 8), Image.Resampling.BICUBIC).save(path, quality=90)
        times, images = {False: [], True: []}, {}
        for draft in (False, True) * repeats:
            start = time.process_time()
            images[draft] = [load_image(path, size, draft=draft) for path in paths]
            times[draft].append(time.process_time() - start)
        change = [(a.float() - b.float()).abs().mean().item() for a, b in zip(images[False], images[True])]
        return dict(
            cpu_ratio=spread([full / fast for full, fast in zip(times[False], times[True])]),
            mean_absolute_change=statistics.mean(change),
        )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", type=int, default=448)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="worker processes of the usual loader, threads of ours",
    )
    p.add_argument("--copies", type=int, default=6, help="of each of the hundred photographs")
    p.add_argument("--rounds", type=int, default=7, help="warm rounds; cold ones are half as many")
    p.add_argument("--starts", type=int, default=5, help="new processes for the first batch")
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    random.seed(0), torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as tmp:
        (photographs := Path(tmp) / "photographs").mkdir()
        split = copies(photographs, a.copies)
        packs = {
            kind: pack(split, Path(tmp) / kind, a.size, encoding=kind, workers=a.workers)
            for kind in ("jpeg", "raw")
        }
        ways = dict(
            usual=UsualLoader(split, a.size, a.batch, a.workers),
            files=OurLoader(split, a.size, a.batch, a.workers),
            packed_jpeg=OurLoader(split, a.size, a.batch, a.workers, packs["jpeg"]),
            packed_raw=OurLoader(split, a.size, a.batch, a.workers, packs["raw"]),
        )
        files = dict(
            usual=split.paths,
            files=split.paths,
            packed_jpeg=list(packs["jpeg"].glob("*.bin")),
            packed_raw=list(packs["raw"].glob("*.bin")),
        )
        if torch.cuda.is_available():
            ways["files_on_gpu"], files["files_on_gpu"] = (
                GpuLoader(split, a.size, a.batch, a.workers),
                split.paths,
            )
        n = len(split)
        for way in ways.values():
            one_epoch(way, 0, n)
        result = dict(
            command=f"python benchmarks/loading.py --size {a.size} --batch {a.batch} --workers {a.workers} --copies {a.copies} --rounds {a.rounds} --starts {a.starts}",
            photographs=f"coco-tiny, 100 originals x {a.copies}",
            size=a.size,
            batch=a.batch,
            workers=a.workers,
            largest_difference_to_usual=largest_difference(split, a.size),
            setting=setting("cpu"),
        )
        result["warm"] = rounds(ways, a.rounds, n)
        result["cold"] = rounds(ways, -(-a.rounds // 2), n, before=lambda name: drop_from_cache(files[name]))
        result["memory"] = {name: memory_over_epochs(way, 4, n) for name, way in ways.items()}
        result["first_batch"] = {
            name: first_batch(photographs, which, a)
            for name, which in dict(
                usual="usual", files="files", packed_jpeg=str(packs["jpeg"]), packed_raw=str(packs["raw"])
            ).items()
        }
        result["draft"] = draft_on_large(split, a.size, 3)
        result["packs"] = {
            kind: Pack(path).loss
            | dict(bytes_per_image=sum(f.stat().st_size for f in path.glob("*.bin")) / n)
            for kind, path in packs.items()
        }
        result["setting"]["load_5min_after"] = round(os.getloadavg()[1], 1)
    print(json.dumps(result, indent=1))
    write(result, a.out)


if __name__ == "__main__":
    main()

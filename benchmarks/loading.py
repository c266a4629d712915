"""Images per second from files to normalised tensors, as ratios to the usual PIL loader.

Usual: `Image.open`, `convert("RGB")`, resize to 448 x 448, random flip, `ToTensor`, `Normalize`, in a `DataLoader`.
Ours: `Loader` and `prepare` (flip, normalisation), with photographs decoded in each epoch by as many worker processes,
and from the shared array of decoded images, without workers.

Loaders alternate, one epoch each, so that other load on the machine affects all. Ratios are computed per round, and their median
is reported: of wall-clock time, and of the CPU time of all processes, which other load affects less.

    python benchmarks/loading.py --out benchmarks/results/loading.json
"""

import argparse
import json
import os
import shutil
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

from cadm_paper.data.loading import PIXELS, Loader, flip_mask, prepare
from cadm_paper.data.split import Split

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CADM_SHARED_DATA", ROOT.parent / "shared" / "data"))


class Usual(Dataset):
    """Loading of one photograph in most multi-label code."""

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
        image = Image.open(self.split.paths[i]).convert("RGB")
        return self.steps(image), torch.from_numpy(self.split.labels[i])


class UsualWay:
    def __init__(self, split, size, batch, workers):
        how = dict(num_workers=workers, persistent_workers=workers > 0)
        self.loader = DataLoader(Usual(split, size), batch, shuffle=True, **how)

    def __call__(self, epoch):
        for images, _ in self.loader:
            yield images


class OurWay:
    def __init__(self, split, size, batch, workers, cache):
        self.ours, self.batch = Loader(split, size, workers=workers, cache=cache), batch
        self.loader = self.ours._batches

    def __call__(self, epoch):
        for batch in self.ours.epoch(self.batch, seed=0, epoch=epoch, shuffle=True):
            yield prepare(batch.images, flip=flip_mask(batch.indices, 0, epoch))


def copies(folder: Path, times: int) -> Split:
    """coco-tiny's photographs, each copied `times` times into separate files."""
    originals = sorted((SHARED / "coco-tiny").glob("*/*.jpg"))
    if not originals:
        sys.exit(f"{SHARED}: no coco-tiny; set CADM_SHARED_DATA to the folder that holds it")
    paths = [folder / f"{k:02}-{p.name}" for k in range(times) for p in originals]
    for k, path in enumerate(paths):
        shutil.copyfile(originals[k % len(originals)], path)
    labels, ids = np.zeros((len(paths), 80), np.int8), [p.stem for p in paths]
    return Split("coco-tiny", "copies", folder, map(str, range(80)), ids, paths, labels)


def cpu_seconds(way) -> float:
    """CPU time of this process and of a loader's worker processes, seconds."""
    ticks = 0
    for worker in getattr(way.loader._iterator, "_workers", []):
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def one_epoch(way, epoch: int, images: int) -> dict:
    """Wall and CPU time of one pass; summing a pixel column forces every batch to be ready."""
    wall, cpu, seen = time.perf_counter(), cpu_seconds(way), 0
    for batch in way(epoch):
        seen += len(batch)
        batch[:, 0, 0].sum().item()
    assert seen == images
    return dict(wall=time.perf_counter() - wall, cpu=cpu_seconds(way) - cpu)


def rounds(ways: dict, count: int, images: int) -> dict:
    """Alternating epochs of all loaders, in reversed order every other round; images/s and ratios to `usual`."""
    times = {name: [] for name in ways}
    for r in range(-1, count):  # warm-up round
        for name in list(ways) if r % 2 == 0 else reversed(ways):
            taken = one_epoch(ways[name], r + 1, images)
            times[name] += [taken] if r >= 0 else []
    result = {}
    for name, own in times.items():
        result[name] = dict(
            images_per_s=spread([images / t["wall"] for t in own]),
            cpu_ms_per_image=spread([1000 * t["cpu"] / images for t in own]),
        )
        for kind in ("wall", "cpu") if name != "usual" else ():
            ratios = [u[kind] / t[kind] for u, t in zip(times["usual"], own)]
            result[name][f"{kind}_ratio"] = spread(ratios)
    return result


def largest_difference(split, size: int) -> float:
    """Largest difference of the two loaders' tensors without flip, in 1/255 before normalisation."""
    usual, batch = Usual(split, size, flip=0.0), next(Loader(split, size, cache=False).epoch(32))
    theirs = torch.stack([usual[i][0] for i in batch.indices.tolist()])
    scale = torch.tensor(PIXELS["imagenet"][1]).view(1, 3, 1, 1) * 255
    return ((prepare(batch.images) - theirs) * scale).abs().max().item()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", type=int, default=448)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode")
    p.add_argument("--copies", type=int, default=4, help="of each of the hundred photographs")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    given = {k: v for k, v in vars(a).items() if k != "out"}
    with tempfile.TemporaryDirectory() as tmp:
        split, how = copies(Path(tmp), a.copies), (a.size, a.batch, a.workers)
        ways = dict(
            usual=UsualWay(split, *how),
            files=OurWay(split, *how, cache=False),
            array=OurWay(split, *how, cache=True),
        )
        result = dict(
            command="python benchmarks/loading.py " + " ".join(f"--{k} {v}" for k, v in given.items()),
            photographs=f"coco-tiny, 100 originals x {a.copies}",
            largest_difference_to_usual=largest_difference(split, a.size),
            setting=setting("cpu"),
            ways=rounds(ways, a.rounds, len(split)),
        )
    result["setting"]["load_5min_after"] = round(os.getloadavg()[1], 1)
    print(json.dumps(result, indent=1))
    write(result, a.out)


if __name__ == "__main__":
    main()

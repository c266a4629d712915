"""ResNet-50 on photographs on a CPU, at 160 and 224 px: a training step and an epoch, ours against a conventional loop.

usual: PIL and a `DataLoader`, float32, contiguous memory, mean cross-entropy, foreach SGD, `.item()` at each step;
ours:  `Loader` (files decoded in each epoch) and `Trainer.step` with both losses;
bare:  for the step only: backbone, pooling and a linear layer in our number format and memory layout.

Steps and epochs alternate. Times are wall-clock times: measure on an idle machine.

    python benchmarks/photographs.py --out benchmarks/results/photographs.json
"""

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from loading import UsualWay, copies
from measure import keep_freed_memory, setting, spread, write
from train_step import CLASSES, our_trainer, plain_step, random_batch

from cadm_paper.data.loading import Loader
from cadm_paper.engine.config import TrainConfig
from cadm_paper.engine.processes import machine_settings, resolve_machine
from cadm_paper.model import CADM


class UsualLoop:
    """One epoch of a conventional loop."""

    def __init__(self, split, config: TrainConfig, workers: int):
        self.batches = UsualWay(split, config.image_size, config.batch_size, workers)
        self.backbone = CADM(CLASSES, config.backbone, None, quiet=True).backbone
        self.head = torch.nn.Linear(self.backbone(torch.zeros(1, 3, 64, 64)).shape[1], CLASSES)
        parameters = [*self.backbone.parameters(), *self.head.parameters()]
        self.sgd = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-4)

    def __call__(self, epoch: int) -> None:
        total = 0.0
        for images, targets in self.batches.loader:
            logits = self.head(self.backbone(images).mean((2, 3)))
            loss = F.binary_cross_entropy_with_logits(logits, targets.float())
            self.sgd.zero_grad()
            loss.backward()
            self.sgd.step()
            total += loss.item()


class OurLoop:
    """One epoch of `Trainer` and `Loader`."""

    def __init__(self, split, config: TrainConfig, workers: int):
        self.loader, self.config = Loader(split, config.image_size, workers=workers, cache=False), config
        self.trainer = our_trainer(config, torch.device("cpu"))

    def __call__(self, epoch: int) -> None:
        for batch in self.loader.epoch(self.config.batch_size, seed=0, epoch=epoch, shuffle=True):
            self.trainer.step(batch, len(batch.indices))


def rates(ways: dict, rounds: int, images: int) -> dict:
    """Images per second of alternating loops, and ratios of `ours` to the others in each round."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for r in range(-1, rounds):  # the first is a warm-up
        for name in list(ways) if r % 2 == 0 else reversed(ways):
            start = time.perf_counter()
            ways[name](r + 1)
            taken[name] += [time.perf_counter() - start] if r >= 0 else []
    result = {"images_per_s": {name: spread([images / t for t in own]) for name, own in taken.items()}}
    for other in ways.keys() - {"ours"}:
        ratios = [theirs / ours for theirs, ours in zip(taken[other], taken["ours"])]
        result[f"ours_over_{other}"] = spread(ratios)
    return result


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--sizes", type=int, nargs="+", default=[160, 224])
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--backbone", default="resnet50")
    p.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that decode, of either loader"
    )
    p.add_argument("--copies", type=int, default=2, help="of each of the hundred photographs")
    p.add_argument("--rounds", type=int, default=7, help="of steps; epochs are taken in half as many")
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    keep_freed_memory()
    warnings.filterwarnings("ignore", message=".*random weights")  # irrelevant for speed
    cpu, result = torch.device("cpu"), {"what": __doc__.splitlines()[0], "batch": a.batch, "sizes": {}}
    for size in a.sizes:
        given = dict(backbone=a.backbone, image_size=size, batch_size=a.batch)
        config = resolve_machine(
            TrainConfig(preset="paper", weights="none", lr=1e-6, lam=0.5, device="cpu", **given)
        )
        with machine_settings(config.threads, config.seed), tempfile.TemporaryDirectory() as tmp:
            batch, trainer = random_batch(config, cpu), our_trainer(config, cpu)
            steps = dict(
                bare=plain_step(config, batch, cpu, False),
                usual=plain_step(config, batch, cpu, False, usual=True),
            )
            steps = {name: lambda _, step=step: step() for name, step in steps.items()}
            steps["ours"] = lambda _: trainer.step(batch, a.batch)
            step = rates(steps, a.rounds, a.batch)
            split = copies(Path(tmp), a.copies)
            loops = dict(usual=UsualLoop(split, config, a.workers), ours=OurLoop(split, config, a.workers))
            epoch = rates(loops, max(a.rounds // 2, 1), len(split))
        result["sizes"][size] = {"step": step, "epoch": epoch}
        for what, found in (("step", step), ("epoch", epoch)):
            said = {k: f"{v['median']:.1f}" for k, v in found["images_per_s"].items()}
            print(
                f"{size} px, {what}, images per second: {said}, ours over usual {found['ours_over_usual']['median']:.2f}"
            )
    result["setting"] = setting("cpu", config.precision, config.threads)
    write(result, a.out)


if __name__ == "__main__":
    main()

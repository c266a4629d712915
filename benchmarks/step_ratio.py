"""The embedded benchmark's training step as a ratio to its bare backbone's step, in one process on the same batch.

Bare: the narrow backbone with global pooling, one linear layer, binary cross-entropy and SGD, without our trainer.
Ours: `Trainer.step` of `cadm_paper.train` for each variant. Steps alternate; ratios are of adjacent pairs.

    python benchmarks/step_ratio.py [--rounds 30] [--out benchmarks/results/step_ratio.json]
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import in_turn, keep_freed_memory, setting, spread, write

from cadm_paper.data.loading import Batch, prepare
from cadm_paper.engine.config import TrainConfig
from cadm_paper.engine.processes import ProcessGroup, machine_settings, resolve_machine
from cadm_paper.model import narrow_resnet
from cadm_paper.train import Trainer, build_model

ROWS = {
    "baseline_gap": {},
    "baseline": {},
    "csra": {},
    "cadm lam 0": {"method": "cadm", "lam": 0.0},
    "cadm lam 0.5": {"method": "cadm", "lam": 0.5},
}


def random_batch(config: TrainConfig, classes: int) -> Batch:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (config.batch_size, 3, config.image_size, config.image_size), dtype=torch.uint8, generator=g
    )
    return Batch(
        images.contiguous(memory_format=torch.channels_last),
        (torch.rand(config.batch_size, classes, generator=g) < 0.15).to(torch.int8),
        torch.arange(config.batch_size),
    )


def bare_step(config: TrainConfig, batch: Batch):
    """A step of the bare backbone in the same number format and memory layout."""
    backbone = narrow_resnet().to(memory_format=torch.channels_last)
    head = torch.nn.Linear(backbone(torch.zeros(1, 3, 80, 80)).shape[1], batch.targets.shape[1])
    sgd = torch.optim.SGD(
        [*backbone.parameters(), *head.parameters()],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )

    def step():
        x = prepare(batch.images, normalise=config.normalise)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            logits = head(backbone(x).mean((2, 3)))
        (
            F.binary_cross_entropy_with_logits(logits.float(), batch.targets.float(), reduction="sum")
            / len(x)
        ).backward()
        sgd.step()
        sgd.zero_grad(set_to_none=True)

    return step


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rounds", type=int, default=30)
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    keep_freed_memory()
    ratios = {}
    for name, row in ROWS.items():
        config = resolve_machine(
            TrainConfig(preset="mini", weights="none", lr=1e-4, **{"method": name, **row})
        )
        with machine_settings(config.threads, config.seed):
            batch = random_batch(config, 20)
            trainer = Trainer(config, build_model(config, range(20)), ProcessGroup(), 10**6)
            trainer.network.train()

            steps = {"bare": bare_step(config, batch), "ours": lambda: trainer.step(batch, config.batch_size)}
            in_turn(steps, 3, "cpu")
            times = in_turn(steps, a.rounds, "cpu")
        ratios[name] = spread([ours / bare for ours, bare in zip(times["ours"], times["bare"])])
        print(f"{name}: {ratios[name]['median']:.3f} times the bare backbone's step")
    result = {
        "what": "one training step of the mini preset over its bare backbone's step, CPU time",
        "ratios": ratios,
        "precision": config.precision,
        "batch_size": config.batch_size,
        "setting": setting("cpu", config.precision),
    }
    write(result, a.out)


if __name__ == "__main__":
    main()

"""The training step in the paper's setting (ResNet-101, 448 px) against a bare and a conventional loop, as ratios in one process.

(a) plain:  the backbone with global average pooling and one linear layer, compiled, bfloat16, channels last, fused SGD; without our head;
(b) ours:   `Trainer.step` of `cadm_paper.train` with both losses and the same settings;
(c) usual:  the loop of the field's published code: float32, NCHW, eager, foreach SGD, with TF32 convolutions on and off.

Also: the fraction of the roofline that (b) reaches, from the measured matrix rate and bandwidth of this device; the rate of an
epoch of generated photographs with the loader, relative to the step's rate; peak memory per batch size.

    python benchmarks/train_step.py --out benchmarks/results/train_step-gpu.json             # a GPU
    python benchmarks/train_step.py --small                                                  # a CPU: functional check
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure import in_turn, peak_bytes, seconds, setting, spread, write

from cadm_paper.data.loading import Batch, Loader
from cadm_paper.data.split import Split
from cadm_paper.engine.config import TrainConfig
from cadm_paper.engine.processes import ProcessGroup, machine_settings, resolve_machine
from cadm_paper.model import CADM
from cadm_paper.train import Trainer, build_model

CLASSES = 80


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--small", action="store_true", help="resnet18, 64 px, batch 4, as a functional check")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument(
        "--memory",
        type=int,
        nargs="*",
        default=[16, 32, 64, 128],
        help="batch sizes whose peak memory is measured",
    )
    p.add_argument(
        "--loader-images",
        type=int,
        default=2048,
        help="generated photographs for the epoch with the loader; 0: skip",
    )
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--out", type=Path)
    return p.parse_args()


def random_batch(config: TrainConfig, device) -> Batch:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (config.batch_size, 3, config.image_size, config.image_size), dtype=torch.uint8, generator=g
    )
    targets = (torch.rand(config.batch_size, CLASSES, generator=g) < 2.9 / CLASSES).to(
        torch.int8
    )  # COCO's labels an image
    return Batch(
        images.contiguous(memory_format=torch.channels_last).to(device),
        targets.to(device),
        torch.arange(config.batch_size),
    )


def plain_step(config: TrainConfig, batch: Batch, device, compiled: bool, usual: bool = False):
    """(a), or (c) with `usual`: backbone, average pooling, linear layer, cross-entropy, SGD."""
    layout = torch.contiguous_format if usual else torch.channels_last
    backbone = CADM(CLASSES, config.backbone, None, quiet=True).backbone.to(device, memory_format=layout)
    x = (batch.images.float() / 255).contiguous(memory_format=layout)
    head = torch.nn.Linear(backbone(x[:1]).shape[1], CLASSES).to(device)
    run = lambda x: head(backbone(x).mean((2, 3)))
    run = torch.compile(run) if compiled and not usual else run
    sgd = torch.optim.SGD(
        [*backbone.parameters(), *head.parameters()],
        lr=1e-6,
        momentum=0.9,
        weight_decay=1e-4,
        **({"foreach": True} if usual else {"fused": True}),
    )
    y = batch.targets.float()

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=not usual and config.precision == "bf16"):
            logits = run(x)
        (F.binary_cross_entropy_with_logits(logits.float(), y, reduction="sum") / len(x)).backward()
        sgd.step()
        sgd.zero_grad(set_to_none=True)

    return step


def our_trainer(config: TrainConfig, device) -> Trainer:
    model = build_model(config, range(CLASSES), device=device)
    trainer = Trainer(config, model, ProcessGroup(device=device), 10**6)
    trainer.network.train()
    return trainer


def our_step(config: TrainConfig, batch: Batch, device):
    """(b)"""
    trainer = our_trainer(config, device)
    return lambda: trainer.step(batch, config.batch_size)


def tf32(on: bool):
    def switch(step):
        def run():
            before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = on
            step()
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before

        return run

    return switch


def device_limits(device, small: bool) -> dict:
    """Measured rates of this device: bfloat16 matrix products (FLOP/s) and copying (bytes/s read and written)."""
    n = 512 if small else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    x = torch.empty((2**22 if small else 2**28), device=device, dtype=torch.uint8)
    kind = device.type
    for f in (lambda: a @ a, lambda: x.clone()):
        seconds(f, kind)
    return {
        "matmul_flops": 2 * n**3 / min(seconds(lambda: a @ a, kind) for _ in range(10)),
        "copy_bytes_per_s": 2 * x.numel() / min(seconds(lambda: x.clone(), kind) for _ in range(10)),
    }


def roofline(config: TrainConfig, device, limits: dict) -> dict:
    """Minimal time of a step: for each convolution, forward and both gradients, the larger of arithmetic time and time to transfer its
    operands once; for each BatchNorm and ReLU, the time to read and write its map twice (forward, backward)."""
    model, time_, flops = CADM(CLASSES, config.backbone, None, quiet=True).backbone.to(device), 0.0, 0.0
    half, b = 2, config.batch_size

    def count(module, inputs, output):
        nonlocal time_, flops
        moved = half * b * (inputs[0][0].numel() + output[0].numel())
        if isinstance(module, torch.nn.Conv2d):
            work = 2 * b * output[0].numel() * module.weight[0].numel()
            flops += 3 * work
            time_ += 3 * max(
                work / limits["matmul_flops"],
                (moved + half * module.weight.numel()) / limits["copy_bytes_per_s"],
            )
        else:
            time_ += 2 * moved / limits["copy_bytes_per_s"]

    hooks = [
        m.register_forward_hook(count)
        for m in model.modules()
        if isinstance(m, (torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU))
    ]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, config.image_size, config.image_size, device=device))
    for hook in hooks:
        hook.remove()
    return {"least_seconds": time_, "flops": flops}


def generated_photographs(folder: Path, count: int, size: int) -> Split:
    """A split of JPEG files with smooth noise."""
    from PIL import Image

    rng, paths = np.random.default_rng(0), [folder / f"{i:06}.jpg" for i in range(count)]
    for path in paths:
        small = Image.fromarray(rng.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)
    labels, classes = rng.random((count, CLASSES)) < 2.9 / CLASSES, map(str, range(CLASSES))
    return Split("generated", "train", folder, classes, [p.stem for p in paths], paths, labels)


def loader_share(config: TrainConfig, device, step_seconds: float, count: int, workers: int) -> dict:
    """Images per second of an epoch with the loader, relative to the step's rate."""
    with tempfile.TemporaryDirectory() as tmp:
        photographs = generated_photographs(Path(tmp), count, config.image_size)
        loader = Loader(photographs, config.image_size, workers=workers)
        trainer = our_trainer(config, device)
        batches = loader.epoch(config.batch_size, seed=0, shuffle=True)
        trainer.step(next(batches), config.batch_size)  # warm
        done = 0

        def rest():
            nonlocal done
            for batch in batches:
                if len(batch.indices) == config.batch_size:
                    trainer.step(batch, config.batch_size)
                    done += 1

        taken = seconds(rest, device.type)
    return {
        "share_of_step_rate": done * step_seconds / taken,
        "images_per_second": done * config.batch_size / taken,
        "workers": workers,
    }


def main() -> None:
    a = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled = not a.no_compile and device.type == "cuda"
    size = dict(backbone="resnet18", image_size=64, batch_size=4) if a.small else dict(batch_size=a.batch)
    config = resolve_machine(
        TrainConfig(
            preset="paper",
            weights="none",
            lr=1e-6,
            lam=0.5,
            compile=compiled,
            device=device.type,
            threads=0,
            **size,
        )
    )
    result = {
        "what": "training step at the paper's setting, ratios of images per second",
        "small": a.small,
        "compiled": compiled,
        "setting": setting(str(device), config.precision, config.threads),
        "batch_size": config.batch_size,
        "image_size": config.image_size,
        "backbone": config.backbone,
    }
    import warnings

    warnings.filterwarnings("ignore", message=".*random weights")  # irrelevant for speed
    with machine_settings(config.threads, config.seed):
        batch = random_batch(config, device)
        usual = plain_step(config, batch, device, False, usual=True)
        steps = {
            "plain": plain_step(config, batch, device, compiled),
            "ours": our_step(config, batch, device),
            "usual_tf32": tf32(True)(usual),
            "usual_float32": tf32(False)(usual),
        }
        in_turn(steps, 1 if a.small else 3, device.type)
        times = in_turn(steps, 3 if a.small else a.rounds, device.type)
        mid = {name: spread(t)["median"] for name, t in times.items()}
        for other in ("plain", "usual_tf32", "usual_float32"):
            result[f"ours_over_{other}"] = spread([o / u for o, u in zip(times[other], times["ours"])])
        result["images_per_second"] = {name: config.batch_size / t for name, t in mid.items()}
        limits = device_limits(device, a.small)
        least = roofline(config, device, limits)
        result["roofline"] = limits | least | {"share": least["least_seconds"] / mid["ours"]}
        del steps, usual
        if a.loader_images and not (a.small and a.loader_images > 64):
            result["loader"] = loader_share(config, device, mid["ours"], a.loader_images, config.threads)
        elif a.small:
            result["loader"] = loader_share(config, device, mid["ours"], 24, config.threads)
        for b in [config.batch_size] if a.small else a.memory:
            one = config.model_copy(update=dict(batch_size=b))
            try:
                step = our_step(one, random_batch(one, device), device)
                step()
                result.setdefault("peak_bytes", {})[b] = peak_bytes(step, device.type)
            except torch.cuda.OutOfMemoryError:
                result.setdefault("peak_bytes", {})[b] = None
    for name in ("ours_over_plain", "ours_over_usual_tf32", "ours_over_usual_float32"):
        print(
            f"{name}: {result[name]['median']:.3f} (quartiles {result[name]['quartiles'][0]:.3f} to {result[name]['quartiles'][1]:.3f})"
        )
    print(
        f"share of the roofline: {result['roofline']['share']:.3f}; images/s: "
        + ", ".join(f"{k} {v:.1f}" for k, v in result["images_per_second"].items())
    )
    write(result, a.out)


if __name__ == "__main__":
    main()

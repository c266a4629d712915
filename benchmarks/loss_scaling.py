"""Time and peak memory of the loss (Eq. 4, 5, 12), forward and backward, against the number of classes.

Ours at C = 80, 1,000 and 10,000, and in the same run the naive form at C = 80 and 1,000: all C x C differences of label vectors,
masked to pairs of present labels (Eq. 9 divided by |S|, which equals Eq. 11 by Eq. 10). Both forms must give the same value before
the measurement. Each image has three labels, about as in COCO.

    python benchmarks/loss_scaling.py --out benchmarks/results/loss_scaling.json
"""

import argparse
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from measure import in_turn, keep_freed_memory, peak_bytes, setting, spread, write

from cadm_paper.loss import CADMLoss, classification_loss


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--classes", type=int, nargs="+", default=[80, 1000, 10000])
    p.add_argument(
        "--naive-up-to", type=int, default=1000, help="most classes that the pairwise form is run with"
    )
    p.add_argument("--batch", type=int, default=8, help="images, for the growth of ours")
    p.add_argument(
        "--naive-batch",
        type=int,
        default=2,
        help="images, for the comparison (all pairs of 1,000 classes: 1 GB an image)",
    )
    p.add_argument("--dim", type=int, default=64, help="length of a label vector")
    p.add_argument("--repeats", type=int, default=30, help="of ours")
    p.add_argument("--naive-repeats", type=int, default=5, help="of both forms in turn")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    p.add_argument("--out", type=Path, help="write the result there, as JSON")
    return p.parse_args()


def make_batch(a: argparse.Namespace, classes: int, images: int) -> tuple[SimpleNamespace, torch.Tensor]:
    """A model's output with gradients, and targets with three present labels per image."""
    g = torch.Generator().manual_seed(classes)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(a.device).requires_grad_()
    targets = torch.zeros(images, classes, dtype=torch.int8)
    for image in targets:
        image[torch.randperm(classes, generator=g)[:3]] = 1
    return SimpleNamespace(
        logits=draw(images, classes), label_vectors=draw(images, classes, a.dim)
    ), targets.to(a.device)


def naive(output: SimpleNamespace, targets: torch.Tensor) -> torch.Tensor:
    """Eq. 5 with the first term of Eq. 12 over all pairs of classes; every image has present labels."""
    a, present = output.label_vectors, (targets == 1).float()
    size = present.sum(1)
    pairs = (a[:, :, None] - a[:, None]).square().sum(-1) * present[:, :, None] * present[:, None]
    center = (present[:, :, None] * a).sum(1) / size[:, None]
    far = F.relu(1 - (a - center[:, None]).square().sum(-1)) * (targets == 0)
    return (
        classification_loss(output.logits, targets) + 0.5 * (pairs.sum((1, 2)) / 2 / size + far.sum(1)).mean()
    )


def make_step(form, output: SimpleNamespace, targets: torch.Tensor):
    """One forward and backward."""

    def step():
        output.logits.grad = output.label_vectors.grad = None
        form(output, targets).backward()

    return step


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    kept = keep_freed_memory()
    ours, both, vectors = {}, {}, {}
    for C in a.classes:
        output, targets = make_batch(a, C, a.batch)
        vectors[C] = output.label_vectors.numel() * output.label_vectors.element_size()
        ours[C] = make_step(CADMLoss(lam=0.5), output, targets)
        if C <= a.naive_up_to:
            output, targets = make_batch(a, C, a.naive_batch)
            torch.testing.assert_close(
                naive(output, targets), CADMLoss(lam=0.5)(output, targets), rtol=1e-4, atol=1e-4
            )
            both[f"ours C={C}"], both[f"naive C={C}"] = (
                make_step(form, output, targets) for form in (CADMLoss(lam=0.5), naive)
            )
    for step in [*ours.values(), *both.values()]:
        step()  # warms up
    peaks, both_peaks = (
        {name: peak_bytes(step, a.device) for name, step in steps.items()} for steps in (ours, both)
    )
    times, both_times = in_turn(ours, a.repeats, a.device), in_turn(both, a.naive_repeats, a.device)
    median = {C: statistics.median(t) for C, t in times.items()}
    result = {
        "what": "forward and backward of Eq. 5 against the number of classes, and against all pairs of classes",
        "settings": {k: v for k, v in vars(a).items() if k != "out"},
        "growth": {
            f"{C} -> {D} classes": {
                "classes": D / C,
                "time": median[D] / median[C],
                "peak": peaks[D] / peaks[C],
            }
            for C, D in zip(a.classes, a.classes[1:])
        },
        "peak_in_units_of_the_label_vectors": {f"C={C}": peaks[C] / vectors[C] for C in a.classes},
        "naive_over_ours": {
            f"C={C}": {
                "time": spread(
                    [n / o for n, o in zip(both_times[f"naive C={C}"], both_times[f"ours C={C}"])]
                ),
                "peak": both_peaks[f"naive C={C}"] / both_peaks[f"ours C={C}"],
            }
            for C in a.classes
            if C <= a.naive_up_to
        },
        "freed_memory_kept": kept,
        "clock": "wall" if a.device.startswith("cuda") else "CPU time of the process",
        "seconds": {f"C={C}": spread(t) for C, t in times.items()},
        "seconds_of_the_comparison": {name: spread(t) for name, t in both_times.items()},
        "peak_bytes": {f"C={C}": peak for C, peak in peaks.items()},
        "peak_bytes_of_the_comparison": both_peaks,
        "environment": setting(a.device, threads=a.threads),
    }
    print(json.dumps({k: v for k, v in result.items() if not k.startswith("seconds")}, indent=1))
    write(result, a.out)


if __name__ == "__main__":
    main()

"""Time and peak memory of CADM's head and loss relative to a plain ResNet, forward and backward.

Plain: backbone, global average pooling, one linear layer, binary cross-entropy. CADM: the same backbone with the same
parameters, both streams, the maps, f_embed, Eq. 4 and Eq. 12 with lambda 0.5. There are two time ratios, because on a busy
machine whole steps vary by more than the head costs:

- `whole`: alternating steps, ratio of each adjacent pair (median, quartiles, extremes) and of the fastest;
- `parts`: 1 + (head step of CADM - head step of plain) / plain whole step; head steps run on precomputed features.

Peak memory is what the step allocates besides parameters and images: from CUDA's allocator on a GPU, and on a CPU
from the profiler's list of allocations and releases, which is exact.

    python benchmarks/head_overhead.py                      # ResNet-101, 448 px, batch 2 on a CPU, 16 on a GPU
    python benchmarks/head_overhead.py --batch 32 --precision bf16 --out benchmarks/results/head_overhead-gpu.json
"""

import argparse
import json
import statistics

import torch
import torch.nn.functional as F
from measure import in_turn, network_options, peak_bytes, setting, spread, write

from cadm_paper.loss import CADMLoss
from cadm_paper.model import CADM


def arguments() -> argparse.Namespace:
    p = network_options(__doc__, "pairs of whole steps")
    p.add_argument("--head-repeats", type=int, default=30, help="pairs of head steps")
    p.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    return p.parse_args()


def make_steps(a: argparse.Namespace) -> dict:
    """Functions by name that run one forward and backward pass: both whole steps and both heads."""
    torch.manual_seed(0)
    model = CADM(a.classes, a.backbone, None, quiet=True, image_size=a.size).to(a.device)
    plain_head = torch.nn.Linear(model.head.classifier.in_features, a.classes).to(a.device)
    images = torch.randn(a.batch, 3, a.size, a.size, device=a.device)
    targets = (
        torch.rand(a.batch, a.classes, device=a.device) < 2.9 / a.classes
    ).float()  # COCO's labels an image
    loss = CADMLoss(lam=0.5)
    half = lambda: torch.autocast(torch.device(a.device).type, torch.bfloat16, enabled=a.precision == "bf16")
    with torch.no_grad(), half():
        features = model.backbone(images)

    def plain(x):
        return (
            F.binary_cross_entropy_with_logits(plain_head(x.mean((2, 3))).float(), targets, reduction="sum")
            / a.batch
        )

    def cadm(x):
        with torch.autocast(torch.device(a.device).type, enabled=False):  # as in a Network
            return loss(model.head(x.float()), targets)

    def clear():
        for part in (model, plain_head):
            part.zero_grad(set_to_none=True)

    def step(make_features, head):
        clear()
        with half():
            head(make_features()).backward()

    whole, ready = lambda: model.backbone(images), lambda: features.detach().requires_grad_()
    return {
        "clear": clear,
        "plain": lambda: step(whole, plain),
        "cadm": lambda: step(whole, cadm),
        "plain_head": lambda: step(ready, plain),
        "cadm_head": lambda: step(ready, cadm),
    }


def main() -> None:
    a = arguments()
    a.batch = a.batch or (16 if a.device.startswith("cuda") else 2)
    torch.set_num_threads(a.threads)
    steps = make_steps(a)
    peaks = {}
    for name in ("plain", "cadm"):  # also warms up
        steps[name]()
        steps["clear"]()
        peaks[name] = peak_bytes(steps[name], a.device)
    whole = in_turn({name: steps[name] for name in ("plain", "cadm")}, a.repeats, a.device)
    in_turn({name: steps[name] for name in ("plain_head", "cadm_head")}, 3, a.device)
    heads = in_turn({name: steps[name] for name in ("plain_head", "cadm_head")}, a.head_repeats, a.device)
    plain, cadm, plain_head, cadm_head = *whole.values(), *heads.values()
    extra = [c - p for p, c in zip(plain_head, cadm_head)]
    result = {
        "what": "CADM head and loss over a plain ResNet, forward and backward",
        "settings": {k: v for k, v in vars(a).items() if k != "out"},
        "time_ratio_whole": spread([c / p for p, c in zip(plain, cadm)])
        | {"of_fastest": min(cadm) / min(plain)},
        "time_ratio_parts": spread([1 + e / statistics.median(plain) for e in extra]),
        "peak_memory_ratio": peaks["cadm"] / peaks["plain"],
        "clock": "wall" if a.device.startswith("cuda") else "CPU time of the process",
        "seconds": {name: spread(times) for name, times in {**whole, **heads}.items()},
        "peak_bytes": peaks,
        "environment": setting(a.device, a.precision, a.threads),
    }
    print(json.dumps(result, indent=1))
    write(result, a.out)


if __name__ == "__main__":
    main()

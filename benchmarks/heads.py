"""Cost of each method's head relative to a plain ResNet: parameters, peak memory, time of a training step and a prediction.

Plain: backbone, global average pooling, one linear layer, Eq. 4. Each method's step alternates with the plain one; ratios are of adjacent steps (median,
quartiles, extremes), because whole steps vary by more than some heads cost. Peak memory as in `head_overhead.py`, which measures CADM's head with
higher precision. Graphs and label orders come from random labels.

    python benchmarks/heads.py                                # ResNet-101, 448 px, batch 2 on a CPU, 16 on a GPU
    python benchmarks/heads.py --backbone narrow_resnet --size 80 --classes 20 --batch 32 --out benchmarks/results/heads-scenes-cpu.json
"""

import argparse
import json

import torch
from measure import in_turn, network_options, peak_bytes, setting, spread, write

from cadm_paper.methods import METHODS, Head, Output
from cadm_paper.methods.base import build_network, method_arguments


class Plain(Head, method="plain"):
    """Average pooling and a linear layer."""

    def __init__(self, shapes, num_classes, args):
        super().__init__()
        self.classifier = torch.nn.Linear(shapes["layer4"][0], num_classes)

    def forward(self, features):
        return Output(self.classifier(features["layer4"].mean((2, 3))))


def make_steps(a: argparse.Namespace, method: str) -> tuple[dict, int]:
    """A training step and a prediction of a method's network, and the parameters of its head."""
    torch.manual_seed(0)
    args = method_arguments(method, {}, {"lam": 0.5 * (method == "cadm")})
    model = build_network(method, a.classes, a.backbone, None, args, image_size=a.size, quiet=True)
    targets = (torch.rand(a.batch, a.classes) < 2.9 / a.classes).long()  # COCO's labels an image
    model.head.start(targets.numpy(), [str(c) for c in range(a.classes)])
    model, targets = model.to(a.device), targets.to(a.device)
    images = torch.randn(a.batch, 3, a.size, a.size, device=a.device)

    def step():
        model.train().zero_grad(set_to_none=True)
        model.head.loss(model(images), targets).total.backward()

    def predict():
        with torch.inference_mode():
            model.eval()(images)

    return {"step": step, "predict": predict}, sum(
        p.numel() for p in model.head.parameters() if p.requires_grad
    )


def main() -> None:
    a = network_options(__doc__, "turns").parse_args()
    a.batch = a.batch or (16 if a.device.startswith("cuda") else 2)
    torch.set_num_threads(a.threads)
    methods, result = [m for m in METHODS if m not in ("plain", "linear_probe")], {}
    plain, few = make_steps(a, "plain")
    plain["step"]()
    base = peak_bytes(plain["step"], a.device)
    for method in methods:
        steps, parameters = make_steps(a, method)
        steps["step"]()  # warms up
        result[method] = {"parameters": parameters, "more_parameters": parameters - few}
        result[method]["peak_memory_ratio"] = peak_bytes(steps["step"], a.device) / base
        for name, run in steps.items():
            times = in_turn({"plain": plain[name], method: run}, a.repeats, a.device)
            result[method][f"{name}_ratio"] = spread([m / p for p, m in zip(times["plain"], times[method])])
        print(method, json.dumps(result[method]), flush=True)
    write(
        {
            "what": "heads of all methods over a plain ResNet: training step and prediction",
            "settings": {k: v for k, v in vars(a).items() if k != "out"},
            "plain_parameters": few,
            "methods": result,
            "environment": setting(a.device, "float32", a.threads),
        },
        a.out,
    )


if __name__ == "__main__":
    main()

"""Write the tables of benchmarks/README.md from results/*.json; `make bench` measures first, `--check` only compares.

python benchmarks/table.py [--run [NAME ...]] [--check]
"""

import argparse
import functools
import json
import operator
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
README, START, END = HERE / "README.md", "<!-- table: make bench -->\n", "<!-- end -->\n"
SCRIPTS = {  # name of the result -> script; `make bench` runs all, train_step only with a GPU
    "photographs": "photographs",
    "loading": "loading",
    "step_ratio": "step_ratio",
    "head_overhead-cpu": "head_overhead",
    "loss_scaling-cpu": "loss_scaling",
    "metrics": "metrics",
    "index": "index",
    "heads-cpu": "heads",
    "train_step-gpu": "train_step",
}
# what, result, path in it, format, aim, reference
step = lambda px, other: ("sizes", px, "step", f"ours_over_{other}", "median")
epoch = lambda px: ("sizes", px, "epoch", "ours_over_usual", "median")
LINES = [
    *(
        line
        for px in ("160", "224")
        for line in (
            (
                f"training step, ResNet-50, {px} px",
                "photographs",
                step(px, "bare"),
                "{:.2f} x",
                "0.95",
                "bare backbone's step",
            ),
            (
                f"training step, ResNet-50, {px} px",
                "photographs",
                step(px, "usual"),
                "{:.2f} x",
                "2.1",
                "the usual loop's step",
            ),
            (
                f"epoch of photographs, ResNet-50, {px} px",
                "photographs",
                epoch(px),
                "{:.2f} x",
                "2.1",
                "the usual loop",
            ),
        )
    ),
    (
        "loading, decoded in each epoch, 448 px",
        "loading",
        ("ways", "files", "wall_ratio", "median"),
        "{:.1f} x",
        "2",
        "PIL, ToTensor, Normalize",
    ),
    (
        "loading, decoded once, 448 px",
        "loading",
        ("ways", "array", "wall_ratio", "median"),
        "{:.1f} x",
        "2",
        "PIL, ToTensor, Normalize",
    ),
    (
        "step of the embedded benchmark, λ = 0.5",
        "step_ratio",
        ("ratios", "cadm lam 0.5", "median"),
        "{:.2f} of its time",
        "1.05",
        "bare backbone's step",
    ),
    (
        "head and loss, ResNet-101, 448 px",
        "head_overhead-cpu",
        ("time_ratio_parts", "median"),
        "{:.3f} of its time",
        "1.02",
        "plain ResNet's step",
    ),
    (
        "loss at 1,000 classes",
        "loss_scaling-cpu",
        ("naive_over_ours", "C=1000", "time", "median"),
        "{:.0f} x",
        "100",
        "all pairs of classes",
    ),
    (
        "all metrics, 40,137 x 80",
        "metrics",
        ("ratios", "multilabel_metrics / argsort (at most 2.5)", "cpu", "median"),
        "{:.2f} of its time",
        "1",
        "argsort of the scores",
    ),
    (
        "bootstrap of 1,000 draws, 40,137 x 80",
        "metrics",
        ("seconds", "bootstrap", "cpu", "median"),
        "{:.1f} CPU s",
        "5",
        "–",
    ),
    (
        "labels of COCO's training split, from the index",
        "index",
        ("coco2014", "pycocotools_over_cached_cpu"),
        "{:.0f} x",
        "10",
        "pycocotools",
    ),
    (
        "training step, ResNet-101, 448 px, GPU",
        "train_step-gpu",
        ("ours_over_plain", "median"),
        "{:.2f} x",
        "0.95",
        "bare compiled step",
    ),
    (
        "training step, ResNet-101, 448 px, GPU",
        "train_step-gpu",
        ("ours_over_usual_tf32", "median"),
        "{:.2f} x",
        "2.5",
        "the usual loop, TF32",
    ),
    (
        "training step, ResNet-101, 448 px, GPU",
        "train_step-gpu",
        ("ours_over_usual_float32", "median"),
        "{:.2f} x",
        "4",
        "the usual loop, float32",
    ),
]


def result(name: str) -> dict:
    """A result; empty if it was not measured."""
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def line(what: str, name: str, place: tuple, form: str, aim: str, peer: str) -> str:
    """A line of the table."""
    found = result(name)
    about = found.get("setting") or found.get("environment") or found
    if not found:
        return f"| {what} | **not measured** | {aim} | {peer} | | | `{SCRIPTS[name]}.py` |"
    measured = form.format(functools.reduce(operator.getitem, place, found))
    cpus, load = about.get("cpus", about.get("cores", "?")), about.get("load_5min", about.get("load_average"))
    busy = f", load {load:.0f}" if load is not None else ""
    numbers = f", {about['precision']}" if "precision" in about else ""
    machine = f"{about.get('device', about.get('machine'))}, {cpus} CPUs{numbers}{busy}"
    return f"| {what} | {measured} | {aim} | {peer} | {machine} | {found.get('date', 'old')} | `{SCRIPTS[name]}.py` |"


def heads() -> str:
    """The table of the cost of each method's head."""
    if not (found := result("heads-cpu")):
        return "\nCost of each method's head relative to a plain ResNet-101: **not measured** (`heads.py`).\n"
    of, about, timed = found["settings"], found["environment"], ("step_ratio", "predict_ratio")
    lowest = min(cost[name]["median"] for cost in found["methods"].values() for name in timed)
    noise = f" No head computes less than the plain one: medians below 1 (down to {lowest:.2f}) are noise, and one as far above 1 may be, too."
    lines = [
        f"\nCost of each method's head relative to pooling and a linear layer on {of['backbone']} at {of['size']} px, batch {of['batch']} "
        f"(`heads.py`, {about['device']}, {found['date']}; medians and, in brackets, extremes of {of['repeats']} rounds of one training step or prediction).{noise * (lowest < 1)}\n",
        "| method | more parameters | training step | prediction | peak memory |",
        "| --- | --: | --: | --: | --: |",
    ]
    for name, cost in found["methods"].items():
        times = [
            f"{cost[ratio]['median']:.2f} x ({' to '.join(f'{end:.2f}' for end in cost[ratio]['extremes'])})"
            for ratio in timed
        ]
        cells = f"{cost['more_parameters']:,}", *times, f"{cost['peak_memory_ratio']:.2f} x"
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def written() -> str:
    """README.md with tables from the current results."""
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    titles = "| what | measured | aim | over or of | machine | date | script |\n| --- | --- | --- | --- | --- | --- | --- |\n"
    return (
        before
        + START
        + titles
        + "".join(f"{line(*entry)}\n" for entry in LINES)
        + heads()
        + END
        + rest.partition(END)[2]
    )


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run", nargs="*", metavar="NAME", help="measure these first, or all")
    p.add_argument("--check", action="store_true", help="only report whether README.md is up to date")
    a = p.parse_args()
    for name in a.run or (SCRIPTS if a.run is not None else ()):
        if (
            name == "train_step-gpu"
            and subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode
        ):
            continue
        out = HERE / "results" / f"{name}.json"
        subprocess.run([sys.executable, HERE / f"{SCRIPTS[name]}.py", "--out", out], check=True)
    if a.check:
        return int(written() != README.read_text(encoding="utf-8"))
    README.write_text(written(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

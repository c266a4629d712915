"""Cost of `multilabel_metrics` against one argsort of the scores and scikit-learn's AP, and of the bootstrap.

One process, one thread, the same arrays, alternating; ratios are of neighbours in the same round (median and extremes).
40,137 x 80 float32 scores, COCO's size. Labels are the last rows of `labels` in an .npz (`--labels`, COCO-2014's validation set) if it
exists; otherwise random, one class with frequency 0.54 and the others decreasing geometrically from 0.13 to 0.0017, which gives COCO's
2.9 labels per image; the result names the source. Scores are the sigmoid of noise plus a gain for present labels. Ratios are of CPU time,
which other load hardly affects, and of wall time.

    python benchmarks/metrics.py --out benchmarks/results/metrics.json
"""

import argparse
import gc
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from measure import setting, write
from sklearn.metrics import average_precision_score

from cadm_paper.files import sha256_file
from cadm_paper.metrics import average_precision, metric_names, multilabel_metrics
from cadm_paper.results.statistics import bootstrap

SHARED = Path(os.environ.get("CADM_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--labels", type=Path, default=SHARED / "coco2014_labels80.npz", help="an .npz with labels, N x C"
    )
    p.add_argument("--images", type=int, default=40_137)
    p.add_argument("--classes", type=int, default=80, help="without a label file")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--replicates", type=int, default=1000, help="of the bootstrap")
    p.add_argument("--bootstrap-rounds", type=int, default=3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="write the result there, as JSON")
    return p.parse_args()


def make_labels(a: argparse.Namespace) -> tuple[np.ndarray, dict]:
    """Labels N x C (int8) and their source."""
    if a.labels.is_file():
        y = np.load(a.labels, allow_pickle=False)["labels"][-a.images :].astype(np.int8)
        origin = {"labels": a.labels.name, "sha256": sha256_file(a.labels)}
    else:
        frequency = np.r_[0.54, np.geomspace(0.13, 0.0017, a.classes - 1)]
        y = (np.random.default_rng(a.seed).random((a.images, a.classes)) < frequency).astype(np.int8)
        origin = {"labels": "drawn with frequencies 0.54 and 0.13 to 0.0017, geometrically"}
    return y, origin | {
        "images": len(y),
        "classes": y.shape[1],
        "labels_per_image": round(float(y.sum(1).mean()), 3),
        "class_frequencies": [
            round(float(f), 5) for f in (y.mean(0).min(), np.median(y.mean(0)), y.mean(0).max())
        ],
    }


def make_scores(y: np.ndarray, seed: int) -> np.ndarray:
    """Scores float32: sigmoid of normal noise of width 1.5 around -3, and 4 more where the label is present."""
    return (1 / (1 + np.exp(3 - 4 * y - 1.5 * np.random.default_rng(seed).normal(size=y.shape)))).astype(
        np.float32
    )


def seconds(work) -> tuple[float, float]:
    """CPU and wall time of one call."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def in_turn(works: dict, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Times of alternating calls, after a warm-up round."""
    times = {name: [] for name in works}
    for round in range(rounds + 1):
        for name, work in works.items():
            measured = seconds(work)
            times[name] += [measured] * (round > 0)
    return times


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 5),
        "min": round(min(values), 5),
        "max": round(max(values), 5),
    }


def ratios(times: dict, name: str, against: str) -> dict[str, dict]:
    """Ratios of neighbouring measurements, CPU and wall."""
    pairs = list(zip(times[name], times[against]))
    return {clock: spread([x[i] / y[i] for x, y in pairs]) for i, clock in enumerate(("cpu", "wall"))}


def main() -> None:
    a = arguments()
    torch.set_num_threads(1)
    y, origin = make_labels(a)
    s = make_scores(y, a.seed)
    sklearn = lambda: [average_precision_score(y[:, c], s[:, c]) for c in range(y.shape[1])]
    agreement = float(
        np.abs(
            average_precision(s.astype(np.float64), y)
            - [average_precision_score(y[:, c], s[:, c].astype(np.float64)) for c in range(y.shape[1])]
        ).max()
    )
    works = {
        "argsort": lambda: np.argsort(s, axis=0),
        "multilabel_metrics": lambda: multilabel_metrics(s, y),
        "scikit-learn AP": sklearn,
    }
    times = in_turn(works, a.rounds)
    long = in_turn(
        {
            "multilabel_metrics": works["multilabel_metrics"],
            "bootstrap": lambda: bootstrap(s, y, a.replicates, a.seed),
        },
        a.bootstrap_rounds,
    )
    result = {
        "data": origin,
        "score_dtype": str(s.dtype),
        "threads": 1,
        "rounds": a.rounds,
        "bootstrap_rounds": a.bootstrap_rounds,
        "replicates": a.replicates,
        "seconds": {
            name: {clock: spread([x[i] for x in measured]) for i, clock in enumerate(("cpu", "wall"))}
            for name, measured in [*times.items(), ("bootstrap", long["bootstrap"])]
        },
        "ratios": {
            "multilabel_metrics / argsort (at most 2.5)": ratios(times, "multilabel_metrics", "argsort"),
            "scikit-learn AP / multilabel_metrics (at least 3)": ratios(
                times, "scikit-learn AP", "multilabel_metrics"
            ),
            f"bootstrap of {a.replicates} / multilabel_metrics (at most 100)": ratios(
                long, "bootstrap", "multilabel_metrics"
            ),
        },
        "largest difference of an AP from scikit-learn's, float64": agreement,
        "numbers": {
            name: value for name, value in multilabel_metrics(s, y).items() if name in metric_names()
        },
        "environment": setting("cpu"),
    }
    for name, value in result["ratios"].items():
        print(
            f"{name}: "
            + "; ".join(
                f"{clock} {v['median']:.2f} ({v['min']:.2f} to {v['max']:.2f})" for clock, v in value.items()
            )
        )
    for name, value in result["seconds"].items():
        print(f"{name}: {value['cpu']['median']:.3f} s of CPU, {value['wall']['median']:.3f} s of wall time")
    print(f"largest difference of an AP from scikit-learn's: {agreement:.1e}")
    write(result, a.out)


if __name__ == "__main__":
    main()

"""The third plan (nbs/experiments/study_plan.ipynb) on one GPU: recipe, learning rates, curve and confirmation.

Every choice is made by the plan's rules from held-out images; `choices.json` in the outputs says what was chosen and why. Runs that are finished
are kept, so a stopped study goes on where it was. With `nvidia-cuda-mps-control -d` the processes share the GPU at the same time and not in turns.

    python tools/photograph_study.py voc2007 --jobs 8          # then: coco40k, resnet50
"""

import argparse
import json
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from cadm_paper.data.loading import Loader
from cadm_paper.engine.config import TrainConfig
from cadm_paper.engine.record import RunRecord
from cadm_paper.engine.splits import prepare_data
from cadm_paper.files import default_folder, read_json, write_json
from cadm_paper.results.claims import GAP, GMP, LOSS, PLAIN
from cadm_paper.results.measures import keep_evidence
from cadm_paper.train import NonFiniteLoss, run_folder, train

BASE = dict(preset="paper", dataset="voc2007", missing="drop", backbone="resnet18_stride16", image_size=224)
BASE |= dict(
    weights=str(default_folder("data") / "resnet18_imagenet_pqf.npz"), head_lr_mult=10, eval_every=1000
)
BASE |= dict(precision="bf16", device="cuda", threads=1, batch_size=32)
HELD_OUT = BASE | dict(holdout=0.2, seed=101)
ABLATION = {v.slug: v.fields for v in (GMP, GAP, PLAIN, LOSS)}
SCLS = PLAIN.fields | dict(method_args={"streams": "scls"})
RATES, EPOCHS, LAMBDAS = (0.0003, 0.001, 0.003), (4, 8, 16), (0.005, 0.05, 0.5, 5, 40)


def one_run(values: dict) -> float:
    """Train one run; returns its mAP in points, 0 if it diverges."""
    try:
        record = train(TrainConfig(**values), resume=True)
    except NonFiniteLoss as error:
        print(error, flush=True)
        return 0.0
    score = 100 * record.metrics["mAP"]
    print(
        f"{time.strftime('%X')}  {record.name}: {record.timing['wall_s']:.0f} s, mAP {score:.2f}", flush=True
    )
    return score


def evidence(values: dict) -> None:
    """Measure the maps of a finished run on its test images."""
    config = TrainConfig(**values)
    folder = run_folder(config)
    if (folder / "run.json").exists():  # it did not diverge
        train_split, test = prepare_data(config)
        keep_evidence(RunRecord.load(folder), test, train_split)


def decoded(values: dict) -> None:
    """Decode the images of a configuration with all cores, so that the runs find them decoded."""
    for split in prepare_data(TrainConfig(**values)):
        Loader(split, values["image_size"], workers=12)


class Study:
    """Processes that share one GPU: `jobs` of them train, others measure maps meanwhile."""

    def __init__(self, jobs: int):
        how = dict(mp_context=get_context("spawn"))
        self.training, self.measuring = ProcessPoolExecutor(jobs, **how), ProcessPoolExecutor(4, **how)

    def measure(self, runs: list[dict]) -> list[float]:
        """The mAP of runs, in their order."""
        return list(self.training.map(one_run, runs))

    def confirm(self, runs: list[dict], maps: bool = False) -> None:
        """Train runs and, with `maps`, measure the maps of each as soon as it is finished."""
        started = {self.training.submit(one_run, run): run for run in runs}
        rest: list[Future] = []
        for future in as_completed(started):
            future.result()
            rest += [self.measuring.submit(evidence, started[future])] * maps
        for future in rest:
            future.result()


def choose_recipe(study: Study) -> dict:
    """The best learning rate of the baseline at 4 epochs; 4 epochs if 8 change it by less than 0.5 points, else 8."""
    runs = [HELD_OUT | GMP.fields | dict(lr=lr, epochs=EPOCHS[0]) for lr in RATES]
    scores = dict(zip(RATES, study.measure(runs)))
    lr = max(scores, key=scores.get)
    longer = study.measure([HELD_OUT | GMP.fields | dict(lr=lr, epochs=e) for e in EPOCHS[1:]])
    length = dict(zip(EPOCHS, [scores[lr], *longer]))
    epochs = EPOCHS[0] if abs(length[EPOCHS[1]] - length[EPOCHS[0]]) < 0.5 else EPOCHS[1]
    return {"lr": lr, "epochs": epochs, "by_rate": scores, "by_epochs": length}


def explore(study: Study, recipe: dict) -> dict:
    """The learning rate times 1/3, 1 and 3 for each variant, and the curve over λ for both hinges."""
    names = ABLATION | {"scls": SCLS}
    rates = {(n, f): v | dict(lr=recipe["lr"] * f) for n, v in names.items() for f in (1, 1 / 3, 3)}
    curve = {
        (h, lam): PLAIN.fields | dict(lr=recipe["lr"], lam=lam, hinge=h)
        for lam in LAMBDAS
        for h in ("inside", "outside")
    }
    curve.pop(("inside", 0.5))  # among the rates
    both = {**rates, **curve}
    runs = [HELD_OUT | v | dict(epochs=recipe["epochs"]) for v in both.values()]
    scores = dict(zip(both, study.measure(runs)))
    points = {key: scores[key] for key in curve} | {("inside", 0.5): scores[LOSS.slug, 1]}
    hinge, lam = max(points, key=points.get)
    factors = {n: max((1, 1 / 3, 3), key=lambda f: scores[n, f]) for n in names}
    said = {"rates": {f"{n} x {f:.2g}": scores[n, f] for n, f in rates}, "factors": factors}
    return said | {
        "curve": {f"{h} {lam:g}": s for (h, lam), s in points.items()},
        "best": {"hinge": hinge, "lam": lam},
    }


def voc2007(study: Study, seeds, say) -> None:
    """Recipe, exploration, and the confirmation on the test images."""
    decoded(HELD_OUT | GMP.fields)
    recipe = choose_recipe(study)
    say(recipe=recipe)
    explored = explore(study, recipe)
    say(explored=explored)
    shared = BASE | dict(lr=recipe["lr"], epochs=recipe["epochs"])
    decoded(shared)
    main = [shared | v | dict(seed=s) for s in seeds for v in ABLATION.values()]
    best = PLAIN.fields | explored["best"]
    more = [
        shared | v | dict(seed=s)
        for s in seeds
        for v in (best, SCLS)
        if v != LOSS.fields | {"hinge": "inside"}
    ]
    tuned = [
        shared | v | dict(seed=s, lr=recipe["lr"] * explored["factors"][n])
        for s in seeds
        for n, v in ABLATION.items()
        if explored["factors"][n] != 1
    ]
    study.confirm([*main, *more, *tuned], maps=True)


def later(study: Study, seeds, **other) -> None:
    """The four variants with the recipe of VOC 2007 on other data or with another network."""
    recipe = read_json(default_folder("outputs") / "choices.json")["recipe"]
    shared = BASE | dict(lr=recipe["lr"], epochs=recipe["epochs"]) | other
    decoded(shared)
    study.confirm([shared | v | dict(seed=s) for s in seeds for v in ABLATION.values()])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["voc2007", "coco40k", "resnet50"])
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument(
        "--small", action="store_true", help="a rehearsal on a CPU: few images, small, one seed"
    )
    given = parser.parse_args()
    if given.small:
        BASE |= dict(device="cpu", precision="fp32", image_size=64, limit=32)
        HELD_OUT |= BASE
        EPOCHS = (1, 2, 3)
    study, chosen = Study(given.jobs), default_folder("outputs") / "choices.json"

    def say(**what):
        write_json(chosen, (read_json(chosen) if chosen.exists() else {}) | what)
        print(json.dumps(what), flush=True)

    if given.part == "voc2007":
        voc2007(study, [1] if given.small else range(1, 9), say)
    elif given.part == "coco40k":
        how = dict(limit=20_000, epochs=4, image_size=160)
        later(study, range(1, 4), dataset="coco40k", missing="error", **how)
    else:
        weights = str(default_folder("data") / "resnet50_imagenet_pqf.npz")
        later(study, (1, 2), backbone="resnet50_stride16", weights=weights)
    print(f"{time.strftime('%X')}  done", flush=True)

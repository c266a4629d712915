"""Train the runs of config files on one GPU, several at a time.

`cadm reproduce` runs one process per GPU. Here several share it: at the same time with CUDA's multi-process service
(`nvidia-cuda-mps-control -d`), else in turns. Finished runs are kept, so an interrupted call can be repeated. Replicates and, if the config
asks for it, evidence are computed as well (tools/store_runs.py).

    python tools/gpu_runs.py voc2007 resnet50-voc coco40k --jobs 14
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from store_runs import keep_replicates

from cadm_paper.app.batch import Run, lacks_evidence, load_batch, plan
from cadm_paper.data.loading import Loader
from cadm_paper.engine.splits import prepare_data
from cadm_paper.results.measures import keep_evidence
from cadm_paper.train import train


def decoded(runs: list[Run]) -> None:
    """Decode the images of runs in 12 processes, once for each data set, size and split."""
    used = {
        (c.dataset, c.image_size, c.holdout, c.holdout and c.seed, c.limit): c
        for c in (run.config for run in runs)
    }
    for config in used.values():
        for split in prepare_data(config):
            Loader(split, config.image_size, workers=12)


def one_run(run: Run) -> str:
    """Train a run, unless it is finished, and store its replicates and, if its config asks for it, evidence; returns a line about it."""
    try:
        record = train(run.config, resume=True)
        if not run.config.holdout:
            keep_replicates(record)
        if lacks_evidence(run):
            train_split, test = prepare_data(run.config)
            keep_evidence(record, test, train_split)
    except Exception as error:  # the other runs go on
        return f"failed: {run.key}: {type(error).__name__}: {error}"
    return f"{run.key}: {record.timing['wall_s']:.0f} s, mAP {100 * record.metrics['mAP']:.2f}"


def train_all(runs: list[Run], jobs: int) -> int:
    """Train runs in order, `jobs` at a time; returns 1 if one failed."""
    decoded(runs)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else each process measures with as many threads as cores
    failed = 0
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for line in pool.map(one_run, runs):
            print(f"{time.strftime('%X')}  {line}", flush=True)
            failed |= line.startswith("failed")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", help="names of files in workflow/config/, or paths")
    parser.add_argument("--jobs", type=int, default=8, help="runs at a time")
    given = parser.parse_args()
    planned = [run for config in given.configs for run in plan(load_batch(config))]
    sys.exit(train_all(planned, given.jobs))

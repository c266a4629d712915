"""Common functions of the benchmarks: time and peak memory of a step, spread over repetitions."""

import argparse
import ctypes
import datetime
import os
import statistics
import time
from pathlib import Path

import torch

from cadm_paper.engine.record import environment
from cadm_paper.files import write_json


def keep_freed_memory() -> bool:
    """Make glibc (if present) keep freed memory; otherwise new pages for each large tensor can dominate the time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    no_mmap, no_trim = mallopt(-4, 0), mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    return bool(no_mmap and no_trim)


def network_options(description: str, repeats: str) -> argparse.ArgumentParser:
    """Options of benchmarks of a whole network; `repeats` describes the repetitions."""
    p = argparse.ArgumentParser(description=description.splitlines()[0])
    p.add_argument("--backbone", default="resnet101")
    p.add_argument("--size", type=int, default=448, help="side of the images, pixels")
    p.add_argument("--classes", type=int, default=80)
    p.add_argument("--batch", type=int, help="images (default: 2 on a CPU, 16 on a GPU)")
    p.add_argument("--repeats", type=int, default=5, help=repeats)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    p.add_argument("--out", type=Path, help="write the result there, as JSON")
    return p


def seconds(step, device: str) -> float:
    """Time of one step: wall-clock time on a GPU, CPU time elsewhere (which excludes other programs)."""
    sync, clock = (
        (torch.cuda.synchronize, time.perf_counter)
        if device.startswith("cuda")
        else (lambda: None, time.process_time)
    )
    sync()
    start = clock()
    step()
    sync()
    return clock() - start


def in_turn(steps: dict, repeats: int, device: str) -> dict[str, list[float]]:
    """Times of alternating steps, in reversed order every other round."""
    times = {name: [] for name in steps}
    for i in range(repeats):
        for name in list(steps) if i % 2 == 0 else reversed(steps):
            times[name].append(seconds(steps[name], device))
    return times


def peak_bytes(step, device: str) -> int:
    """Peak memory of a step beyond the memory in use before: from CUDA's allocator, or the CPU profiler's allocations."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    changes = sorted(
        (e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def spread(values: list[float]) -> dict:
    """Median, quartiles and extremes."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {
        "median": statistics.median(values),
        "quartiles": [low, high],
        "extremes": [min(values), max(values)],
        "n": len(values),
    }


def setting(device: str, precision: str = "float32", threads: int = 1) -> dict:
    """Environment of a measurement, with the machine's five-minute load average."""
    return environment(device) | {
        "precision": precision,
        "threads": threads,
        "cpus": os.cpu_count(),
        "load_5min": round(os.getloadavg()[1], 1),
    }


def write(result: dict, path: Path | None) -> None:
    """Write the result and its date as JSON, atomically."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result | {"date": datetime.date.today().isoformat()})

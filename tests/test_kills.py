"""Writers of files killed at random times and readers of damaged files: short campaigns of the tools."""

import subprocess
import sys
from pathlib import Path

import pytest

from cadm_paper.data.scenes import MARKER, build_scenes

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("tool, given", [("kills", "30"), ("kills", "20 training"), ("fuzz", "80")])
def test_a_short_campaign_finds_no_fault(tool, given):
    """Kills: writers lose nothing and leave no temporary file. Fuzz: 80 damaged files per reader."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / f"{tool}.py", *given.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("suffix", ("lock", "part"))
def test_an_unfinished_benchmark_is_built_again(tmp_path, suffix):
    """Killed while its first marker was written."""
    left = tmp_path / f".{MARKER}.0123abcd.{suffix}"
    left.write_text('{"schema')
    (left.with_suffix(".lock")).touch()
    build_scenes(tmp_path, train=4, test=2)
    assert not list(tmp_path.glob(f".{MARKER}.*"))

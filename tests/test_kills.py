"""Writers of files killed at random times and readers of damaged files: short campaigns of the tools."""

import subprocess
import sys
from pathlib import Path

import pytest

from cadm_paper.data.scenes import STARTED, build_scenes

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("tool, given", [("kills", "30"), ("kills", "20 training"), ("fuzz", "80")])
def test_a_short_campaign_finds_no_fault(tool, given):
    """Kills: writers lose nothing and leave no temporary file. Fuzz: 80 damaged files per reader."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / f"{tool}.py", *given.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


TEMPORARY = [f".{STARTED}.0123abcd.{suffix}" for suffix in ("lock", "part")]


@pytest.mark.parametrize("left", [TEMPORARY, [STARTED]])
def test_an_unfinished_benchmark_is_built_again(tmp_path, left):
    """Killed while or just after its first marker was written."""
    for name in left:
        (tmp_path / name).write_text('{"form')
    build_scenes(tmp_path, train=4, test=2)
    assert not [p for p in tmp_path.rglob("*") if STARTED in p.name]

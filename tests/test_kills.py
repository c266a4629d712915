"""Every writer of files killed at random moments, every reader given damaged ones; the tools do more of both."""

import subprocess
import sys
from pathlib import Path

import pytest

from cadm_paper.data.scenes import STARTED, build_scenes

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("tool, times", [("kills", "30"), ("fuzz", "80")])
def test_a_short_campaign_finds_nothing(tool, times):
    """Kills: two of each writer lose nothing and leave no litter. Fuzz: 80 damaged files for each reader."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / f"{tool}.py", times], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


TEMPORARY = [f".{STARTED}.0123abcd.{suffix}" for suffix in ("lock", "part")]


@pytest.mark.parametrize("left", [TEMPORARY, [STARTED]])
def test_an_unfinished_benchmark_is_built_again(tmp_path, left):
    """Killed while its first marker was written, or just after."""
    for name in left:
        (tmp_path / name).write_text('{"form')
    build_scenes(tmp_path, train=4, test=2)
    assert not [p for p in tmp_path.rglob("*") if STARTED in p.name]

"""Every notebook runs from its folder, as in nbdev, and is committed executed and clean."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from nbdev.test import test_nb as run_notebook

from cadm_paper.figures import Picture

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    p
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts)
)


@pytest.fixture
def undisturbed(monkeypatch, tmp_path):
    """Notebooks share this process: restore settings, and keep them out of data/ and outputs/."""
    threads, state = torch.get_num_threads(), np.random.get_state()
    monkeypatch.chdir(Path.cwd())  # restored at the end
    monkeypatch.setenv("CADM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("CADM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("IN_TEST", "1")  # nbdev sets it permanently
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)
    np.random.set_state(state)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_runs(path, undisturbed, monkeypatch):
    # figures are drawn here; test_figures writes them as files
    monkeypatch.setattr(Picture, "_repr_png_", lambda picture: b"")
    if path.parent.name == "experiments":
        monkeypatch.setattr(Picture, "save", lambda picture, folder: {"svg": Path(folder, picture.name)})
    ok, seconds = run_notebook(path)
    assert ok, f"{path.relative_to(ROOT)} failed; the traceback is above"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_is_committed_clean(path):
    """Executed without errors or warnings, small, without paths of a machine."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert path.stat().st_size < 1_500_000
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags"}
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error" and output.get("name") != "stderr", "".join(
                cell["source"]
            )
            text = json.dumps(
                {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/png")}
            ) + "".join(output.get("text", []))
            assert not re.search(r"((?<![\w.])/(home|root|tmp|work|Users)/|site-packages)", text), text[:500]
            # the site turns links between notebooks into links between pages in Markdown cells only
            assert not re.search(r"\.ipynb(#[^)\s]*)?\)", text), text[:500]
        assert cell.get("execution_count") is None

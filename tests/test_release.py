"""What a release promises: badges and citation are true, workflow files are what GitHub reads, the wheel works where nothing else is."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import cadm_paper

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, cwd=ROOT, **kwargs):
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, **kwargs)


def test_badges_say_what_the_repository_says():
    done = run(sys.executable, "tools/badges.py", "--check")
    assert done.returncode == 0, done.stdout
    text = {
        p.stem: "".join(ElementTree.parse(p).getroot().itertext())
        for p in (ROOT / "assets" / "badges").glob("*.svg")
    }
    assert (
        cadm_paper.__version__ in text["version"]
        and "3.11 | 3.12 | 3.13" in text["python"]
        and "Apache-2.0" in text["licence"]
    )


def test_the_citation_has_what_its_format_requires():
    """Citation File Format 1.2.0: required keys, known keys, authors with names, in the citation of the paper too."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        {"cff-version", "message", "title", "authors"} <= cff.keys()
        and cff["cff-version"] == "1.2.0"
        and cff["type"] in ("software", "dataset")
    )
    assert cff["license"] == PROJECT["license"]
    paper = cff["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys() and paper["year"] == 2019
    assert [a["family-names"] for a in paper["authors"]] == ["Chen", "Wei", "Jin", "Guo"]
    assert all(
        {"name"} <= a.keys() or {"family-names", "given-names"} <= a.keys()
        for a in [*cff["authors"], *paper["authors"]]
    )


def test_the_changelog_knows_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## (Unreleased|\[?{re.escape(cadm_paper.__version__)})", text, re.M)


def test_workflow_files_run_what_the_makefile_has():
    """They are YAML with jobs and steps, test every Python that pyproject.toml names, and call targets that exist."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    found = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert set(found) == {"tests", "docs", "release"}
    for name, flow in found.items():
        assert True in flow, f"{name}: no trigger"  # YAML 1.1 reads the key `on` as true
        for job in flow["jobs"].values():
            assert job["runs-on"] and all("uses" in s or "run" in s for s in job["steps"])
            made = [m for s in job["steps"] for m in re.findall(r"^make ([\w-]+)", s.get("run", ""), re.M)]
            assert set(made) <= targets, (name, made)
    named = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert found["tests"]["jobs"]["test"]["strategy"]["matrix"]["python"] == named
    assert found["release"]["jobs"]["publish"]["permissions"] == {"id-token": "write"}


def test_binder_gets_what_it_needs():
    """Binder reads environment.yml at the root unless there is a folder binder/; links are made for the repository of settings.ini."""
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    assert pip == ["-e .[repro,dev]"] and not (ROOT / "binder").exists()
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert settings["DEFAULT"]["git_url"].startswith("https://github.com/")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of what git would release."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT / "cadm_paper", source / "cadm_paper", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out
    )
    if done.returncode and "No module named" in done.stderr + done.stdout:
        pytest.skip("setuptools and wheel are not in this environment, and an isolated build needs a network")
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    ours = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "cadm_paper").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert {n for n in names if ".dist-info/" not in n} == ours
    about = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    needed = re.findall(r"^Requires-Dist: (.+)$", about, re.M)
    assert not [
        r for r in needed if re.match(r"(nbdev|papermill|pytest|sphinx|jupyter)", r) and "extra ==" not in r
    ]


@pytest.mark.slow
def test_the_wheel_works_where_nothing_of_the_checkout_is(wheel, tmp_path):
    """Installed into a folder of its own; a bare interpreter sees that and the dependencies, but neither the checkout nor notebooks' tools."""
    done = run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "lib", wheel, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = (
        Path(yaml.__file__).resolve().parents[1]
    )  # a plain path: .pth files in it, editable installs among them, are not read
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))} | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "lib"), str(site)])
    }
    code = """
import sys
for name in ("nbdev", "fastcore", "execnb", "papermill", "IPython", "ipykernel", "nbformat", "nbconvert", "snakemake", "pytest"): sys.modules[name] = None
import torch, cadm_paper
from cadm_paper.model import CADM
from cadm_paper.loss import CADMLoss
from cadm_paper.metrics import multilabel_metrics
model = CADM(5, "narrow_resnet", None, image_size=64, quiet=True)
targets = (torch.rand(4, 5) < 0.5).float()
output = model(torch.rand(4, 3, 64, 64))
CADMLoss(lam=0.5)(output, targets).backward()
print(cadm_paper.__file__, cadm_paper.__version__, sorted(multilabel_metrics(output.scores.detach(), targets))[:1])
"""
    done = run(base if base.exists() else sys.executable, "-c", code, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(str(tmp_path / "lib")), done.stdout
    done = run(
        base if base.exists() else sys.executable, "-m", "cadm_paper.app.cli", "--help", cwd=tmp_path, env=env
    )
    assert done.returncode == 0 and "reproduce" in done.stdout, done.stderr[-2000:]

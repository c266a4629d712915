"""The lock file pins what pyproject.toml asks for, with hashes, from nowhere in particular."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXT = (ROOT / "requirements.lock").read_text()
EXTRAS = re.findall(r"--extra (\S+)", (ROOT / "Makefile").read_text())
ASKED = {
    r.name: r
    for r in map(
        Requirement,
        [*PROJECT["dependencies"], *(p for extra in EXTRAS for p in PROJECT["optional-dependencies"][extra])],
    )
}.values()


def locked():
    """Pinned requirement and number of hashes of each entry."""
    entries = re.split(r"\n(?=[A-Za-z0-9])", re.sub(r"(?m)^\s*#.*\n?", "", TEXT).strip())
    return [(Requirement(e.split("\\\n")[0].strip()), e.count("--hash=sha256:")) for e in entries]


def test_it_covers_what_reproducing_and_developing_take():
    assert {"repro", "dev", "docs"} <= set(EXTRAS)
    said = re.search(r"the extras ([^\n]*) install", TEXT)[1]
    assert set(re.findall(r"\w+", said)) - {"and"} == set(EXTRAS)


def test_every_entry_has_one_version_and_hashes():
    entries = locked()
    assert len(entries) > 50
    for requirement, hashes in entries:
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)) and hashes >= 1, requirement


def test_it_names_no_host():
    assert "://" not in TEXT and "index-url" not in re.sub(r"(?m)^#.*", "", TEXT)


@pytest.mark.parametrize("asked", ASKED, ids=lambda r: r.name)
def test_it_holds_what_the_project_asks_for(asked):
    norm = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    pins = [r for r, _ in locked() if norm(r.name) == norm(asked.name)]
    assert pins, f"{asked.name} is not in requirements.lock: see its first lines"
    assert all(asked.specifier.contains(str(p.specifier)[2:], prereleases=True) for p in pins)

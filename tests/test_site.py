"""The documentation: every part of the paper has its place, links resolve, and site, report and explorer work in a real browser."""

import configparser
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    p
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)
)
LINK = re.compile(r"\[[^\]\n]*\]\(((?:[^()\s]|\([^()\s]*\))+)\)")


def markdown(path):
    return "\n\n".join(
        "".join(c["source"])
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "markdown"
    )


def anchors(path):
    """JupyterLab's and GitHub's anchors of a notebook's headings."""
    return {m.strip().replace(" ", "-") for m in re.findall(r"^#+ (.+)$", markdown(path), re.M)}


def broken(text, home):
    """Links of a Markdown text in folder `home` that lead to no file, or to no heading of a notebook."""
    bad = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`|```.*?```", "", text, flags=re.S)):
        name, _, anchor = target.partition("#")
        if re.match(r"\w+:", target) or (not name and not home.suffix):
            continue
        path = (home if home.is_dir() else home.parent) / name if name else home
        if not path.exists() or (
            anchor and path.suffix == ".ipynb" and urllib.parse.unquote(anchor) not in anchors(path)
        ):
            bad.append(target)
    return bad


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_links_of_notebooks_work_where_they_are_read(path):
    """On GitHub and in JupyterLab a link is a path from the notebook's own folder."""
    assert broken(markdown(path), path) == []


def test_links_of_the_root_work():
    pages = [p for p in ROOT.glob("*.md")]
    assert {p.name: b for p in pages if (b := broken(p.read_text(encoding="utf-8"), ROOT))} == {}


def test_binder_and_colab_open_notebooks_of_the_repository_in_the_settings():
    """One setting names the public address; what the README links there is in this repository."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    url, branch = settings["DEFAULT"]["git_url"], settings["DEFAULT"]["branch"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    repository = url.removeprefix("https://github.com/")
    found = re.findall(
        r"https://mybinder\.org/v2/gh/([\w-]+/[\w.-]+)/([\w-]+)\?urlpath=lab/tree/([\w/.]+)", text
    ) + re.findall(
        r"https://colab\.research\.google\.com/github/([\w-]+/[\w.-]+)/blob/([\w-]+)/([\w/.]+)", text
    )
    assert (
        len(found) == 2
        and {f[:2] for f in found} == {(repository, branch)}
        and all((ROOT / f[2]).is_file() for f in found)
    )
    assert f"git+{url}" in text and "once the repository is public" in text and "environment.yml" in text


def test_every_part_of_the_paper_has_its_place():
    text = (ROOT / "docs" / "paper-to-here.md").read_text(encoding="utf-8")
    assert broken(text, ROOT) == []
    equations = [int(n) for row in re.findall(r"^\| Eq\. ([\d, ]+):", text, re.M) for n in row.split(",")]
    assert sorted(equations) == list(range(1, 13))
    assert all(
        re.search(rf"^\| (3\.3 in small|{re.escape(s)}) ", text, re.M)
        for s in ("1", "2.1", "2.2", "2.3", "2.4", "3.1", "3.2", "3.3.1", "3.3.2", "3.4", "4")
    )
    assert all(
        re.search(rf"^\| {part}\b", text, re.M)
        for part in ("Table 1", "Table 2", "Fig. 1", "Fig. 2", "Fig. 3", "Fig. 4")
    )


def test_its_commands_names_and_files_exist():
    from cadm_paper.app.cli import COMMANDS, GROUPS

    text = (ROOT / "docs" / "paper-to-here.md").read_text(encoding="utf-8")
    commands = [c.split()[1:3] for c in re.findall(r"`(cadm [^`]+)`", text)]
    assert len(commands) > 5 and all(c[0] in COMMANDS or c[1] in GROUPS[c[0]] for c in commands)
    for file in re.findall(r"`(cadm_paper/[\w/]+\.py|nbs/[\w/]+\.ipynb)`", text):
        assert (ROOT / file).is_file(), file
    module = {"01_model": "cadm_paper.model", "02_loss": "cadm_paper.loss"}
    for notebook, names in re.findall(r"^\| Eq\.[^\n]*\[(0\d_\w+)\][^\n|]*\| ([^\n|]+) \|$", text, re.M):
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(importlib.import_module(module[notebook]), name), name


# ---------------------------------------------------------------- the built site


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site, built from the notebooks as they are and from made-up records of all rows, so that report and explorers are in it."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_nb")
    pytest.importorskip("furo")
    from cadm_paper.engine.synthetic import synthetic_runs

    folder = tmp_path_factory.mktemp("site")
    synthetic_runs(folder / "runs", preset="mini", drawn=5)
    done = subprocess.run(
        [
            sys.executable,
            "tools/docs.py",
            "--runs",
            str(folder / "runs"),
            "--work",
            str(folder / "work"),
            "--out",
            str(folder / "site"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder / "site"


class Page(HTMLParser):
    """Ids, links and loaded resources of a page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if attrs.get("src"):
            self.loaded.append(attrs["src"])
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon", "preload", "shortcut icon"):
            self.loaded.append(attrs["href"])


@pytest.fixture(scope="session")
def pages(site):
    return {p: Page(p) for p in sorted(site.rglob("*.html")) if "_static" not in p.parts}


@pytest.mark.slow
def test_every_internal_link_resolves(site, pages):
    assert len(pages) > len(NOTEBOOKS)
    bad = []
    for path, page in pages.items():
        for target in page.links:
            where = urllib.parse.urlsplit(target)
            if where.scheme or where.netloc:
                continue
            to = (path.parent / urllib.parse.unquote(where.path)).resolve() if where.path else path
            to = to / "index.html" if to.is_dir() else to
            if not to.is_file() or (
                where.fragment
                and to in pages
                and urllib.parse.unquote(where.fragment) not in pages[to].ids
                and not to.name.startswith("explorer")
            ):
                bad.append(f"{path.relative_to(site)}: {target}")
    assert bad == []


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert [
        f"{p.relative_to(site)}: {u}"
        for p, page in pages.items()
        for u in page.loaded
        if re.match(r"(https?:)?//", u)
    ] == []


@pytest.mark.slow
def test_every_notebook_and_module_has_its_page_and_outputs(site):
    for path in NOTEBOOKS:
        page = site / path.relative_to(ROOT).with_suffix(".html")
        outputs = sum(
            bool(c.get("outputs")) and not re.search(r"^#\|\s*hide", "".join(c["source"]), re.M)
            for c in json.loads(path.read_text())["cells"]
            if c["cell_type"] == "code"
        )
        assert page.read_text(encoding="utf-8").count('class="cell_output') >= outputs, path
    api = (site / "api" / "cadm_paper.model.html").read_text(encoding="utf-8")
    assert "batch d h w" in re.sub(r"<[^>]+>", "", api)  # shapes as they were written
    loss = (site / "nbs" / "00_paper.html").read_text(encoding="utf-8")
    assert "api/cadm_paper.metrics.html#cadm_paper.metrics.multilabel_metrics" in loss


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install '.[browser]'")
    program = os.environ.get("CADM_CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not program:
        pytest.skip("no Chromium on this machine (CADM_CHROMIUM names one)")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """A function that opens a file at a width; what the console said and what was asked for from elsewhere is checked at the end."""
    complaints, contexts = [], []

    def open_(path, width=1280, height=860, dark=False, fragment=""):
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(f"{m.type}: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda e: complaints.append(f"error: {e}"))
        page.on(
            "request",
            lambda r: (
                complaints.append(f"asked {r.url}")
                if not r.url.startswith(("file:", "data:", "blob:"))
                else None
            ),
        )
        page.on("requestfailed", lambda r: complaints.append(f"failed {r.url}"))
        page.goto(path.as_uri() + fragment, wait_until="load")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


OVERFLOW = "() => document.documentElement.scrollWidth - innerWidth"
MATHEMATICS = """() => new Promise(done => { const wait = n => {
  const all = [...document.querySelectorAll('.math.notranslate')], set = all.filter(e => e.querySelector('mjx-container'));
  if (set.length === all.length || !n) done([all.length, set.length, document.querySelectorAll('mjx-merror, [data-mjx-error]').length]); else setTimeout(() => wait(n - 1), 100);
}; wait(300); })"""


@pytest.mark.slow
def test_every_page_opens_on_a_phone_with_its_mathematics(site, pages, opened):
    """At 390 px: nothing in the console, nothing asked for elsewhere, nothing wider than the screen, every formula typeset without an error."""
    formulas, wide, wrong = 0, {}, {}
    for path in pages:
        page = opened(path, 390, 844)
        there, done, errors = page.evaluate(MATHEMATICS)
        formulas += there
        if there != done or errors:
            wrong[path.relative_to(site).as_posix()] = (there, done, errors)
        if (over := page.evaluate(OVERFLOW)) > 0:
            wide[path.relative_to(site).as_posix()] = over
        page.context.close()
    assert formulas > 300 and wrong == {} and wide == {}


@pytest.mark.slow
def test_light_and_dark(site, opened):
    for name in ("index.html", "nbs/02_loss.html", "report/index.html", "report/explorer.html"):
        light, dark = (
            opened(site / name, dark=d).evaluate(
                "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
            )
            for d in (False, True)
        )
        assert sum(light) > 600 and sum(dark) < 200, (name, light, dark)


@pytest.mark.slow
def test_search_finds(site, opened):
    page = opened(site / "search.html", fragment="?q=hinge")
    page.wait_for_selector('ul.search li a[href*="02_loss"]')  # results come one after another


@pytest.mark.slow
def test_the_landing_page_says_what_was_measured_in_one_screen(site, opened):
    page = opened(site / "index.html", 1280, 860)
    box = page.locator(".cards").bounding_box()
    assert box["y"] + box["height"] <= 860
    text = page.locator(".cards").inner_text()
    assert "82.3" in text and "make reproduce" in text and "make test" in text and "scenes-coco" in text
    page.locator('.cards a[href="report/index.html"]').click()
    assert "Synthetic records" in page.locator("body").inner_text()


@pytest.mark.slow
def test_the_report_leads_to_the_explorers_of_its_records(site, opened):
    """One for each data set, from the top of the report and from its figures; the page that opens shows that data set."""
    addresses = ["explorer.html", "explorer-scenes-nus.html"]
    for dataset, address in zip(("scenes-coco", "scenes-nus"), addresses):
        page = opened(site / "report" / "index.html")
        assert page.locator(f'a[href="{address}"]').count() == 2
        page.locator(f'a[href="{address}"]').first.click()
        page.wait_for_selector("body[data-ready]")
        assert page.locator("#about").inner_text().startswith(f"{dataset}:")


CANVASES = "() => [...document.querySelectorAll('canvas.map')].map(c => c.toDataURL())"


@pytest.mark.slow
def test_the_explorer_changes_its_picture_on_a_choice(site, opened):
    """By pointer and by keyboard; both maps are drawn; the text beside them says what the records say."""
    page = opened(site / "report" / "explorer.html")
    page.wait_for_selector("body[data-ready]")
    seen = [page.evaluate(CANVASES)]
    assert len(seen[0]) == 2 and seen[0][0] != seen[0][1]

    def changed(action):
        action()
        seen.append(page.evaluate(CANVASES))
        assert seen[-1] != seen[-2]

    changed(lambda: page.locator("#labels button").nth(1).click())
    changed(lambda: page.locator("#images button").nth(2).click())
    changed(lambda: page.keyboard.press("ArrowRight"))
    changed(lambda: page.keyboard.press("ArrowDown"))
    changed(lambda: page.locator("#boxes").uncheck())
    changed(lambda: page.locator("#signed").check())
    changed(lambda: page.locator("#strength").fill("0"))
    assert seen[-1][0] == seen[-1][1]  # no map left: the same photograph twice
    data = json.loads(page.locator("#data").text_content())
    place = urllib.parse.parse_qs(urllib.parse.urlsplit(page.url).fragment)
    image, label = int(place["image"][0]), int(place["label"][0])
    shown = page.locator("#pair").inner_text()
    for run in data["images"][image]["runs"]:
        assert (
            all(f"{value:.2f}" in shown for value in run["scores"][label])
            and f"ranks {run['ranks'][label]} of" in shown
        )
    assert page.locator("#synthetic").is_visible()


@pytest.mark.slow
def test_an_address_leads_to_a_case_and_pointing_tells_the_value(site, opened):
    page = opened(site / "report" / "explorer.html", 390, 844, fragment="#image=3&label=7")
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate("[state.image, state.label]") == [3, 7]
    page.locator("canvas.map").first.hover(position={"x": 60, "y": 60})
    value = page.evaluate(
        "value(0, 60 / document.querySelector('canvas.map').getBoundingClientRect().height, 60 / document.querySelector('canvas.map').getBoundingClientRect().width)"
    )
    said = page.locator("#said").inner_text()
    assert "without" in said and abs(float(re.search(r": (-?[\d.]+) without", said)[1]) - value) < 0.15


@pytest.mark.slow
def test_class_names_are_only_text(tmp_path, opened):
    """A class called like a script is shown, not run."""
    from cadm_paper.app.explorer import explorer_data, explorer_html
    from cadm_paper.engine.synthetic import synthetic_run

    data = explorer_data(*(synthetic_run(tmp_path / str(lam), method="cadm", lam=lam) for lam in (0.0, 0.5)))
    name = "</script><img src=x onerror=\"document.title='run'\">"
    (tmp_path / "odd.html").write_text(
        explorer_html({**data, "classes": [name] * len(data["classes"])}), encoding="utf-8"
    )
    page = opened(tmp_path / "odd.html")
    page.wait_for_selector("body[data-ready]")
    assert name in page.locator("#labels button").first.inner_text() and page.title() != "run"

"""The documentation covers every part of the paper, links resolve, and site, report and explorer work in a
browser.
"""

import functools
import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import pytest

from cadm_paper.app import cli, commands
from cadm_paper.engine.synthetic import synthetic_runs
from cadm_paper.engine.variants import Variant
from cadm_paper.results.claims import OUTCOMES, study_records

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
FOLDERS = ("benchmarks", "data", "outputs", "outputs/reference/studies", "cadm_paper/pretrained")
READMES = [ROOT / folder / "README.md" for folder in FOLDERS]
PAPER = (ROOT / "docs" / "paper-to-here.md").read_text(encoding="utf-8")


def markdown(path: Path) -> str:
    """The text of a notebook or of a Markdown file."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")


@pytest.mark.parametrize(
    "path",
    [*NOTEBOOKS, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *READMES],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_links_resolve(path):
    """Relative links lead to existing files, and to existing headings of notebooks."""
    prose = re.sub(r"`[^`\n]*`|```.*?```", "", markdown(path), flags=re.S)
    for target in re.findall(r"\]\((?!\w+:)((?:[^()\s]|\([^()\s]*\))+)\)", prose):
        name, _, anchor = unquote(target).partition("#")
        to = path.parent / name if name else path
        assert to.exists(), target
        if anchor and to.suffix == ".ipynb":
            headings = re.findall(r"^#+ (.+)$", markdown(to), re.M)
            assert anchor in [heading.strip().replace(" ", "-") for heading in headings], target


def test_binder_and_colab_open_notebooks_of_the_repository():
    text = markdown(ROOT / "docs" / "install.md")
    found = re.findall(r"(?:mybinder\.org|colab\.research)[^\s)]+?/(nbs/[\w/]+\.ipynb)", text)
    assert len(found) == 2 and all((ROOT / name).is_file() for name in found)


SHELL = [
    pytest.param(line, id=line)
    for name in ("README.md", "docs/install.md")
    for block in re.findall(r"```sh\n(.*?)```", markdown(ROOT / name), re.S)
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", SHELL)
def test_documented_commands_are_valid(line, monkeypatch):
    """Commands of README and install page: `make` has the target, `cadm` parses the words, other files exist."""
    program, *words = shlex.split(line, comments=True)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    elif program == ".venv/bin/cadm":
        for name in [n for n in vars(commands) if n in cli.COMMANDS or n.startswith(("data_", "runs_"))]:
            idle = functools.wraps(getattr(commands, name))(lambda *given, **named: None)
            monkeypatch.setattr(commands, name, idle)
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 0
    else:
        assert Path(program).name in ("python3", "python", "papermill", "conda")
        named = [word for word in words if re.search(r"\.(ipynb|yml)$", word) and word != "out.ipynb"]
        assert all((ROOT / name).is_file() for name in named)


def test_every_part_of_the_paper_is_listed():
    equations = [int(n) for row in re.findall(r"^\| Eq\. ([\d, ]+):", PAPER, re.M) for n in row.split(",")]
    assert sorted(equations) == list(range(1, 13))
    sections = ("1", "2.1", "2.2", "2.3", "2.4", "3.1", "3.2", "3.3.1", "3.3.2", "3.4", "4")
    parts = (*sections, "Table 1", "Table 2", "Fig. 1", "Fig. 2", "Fig. 3", "Fig. 4")
    assert [part for part in parts if not re.search(rf"^\| {re.escape(part)}\b", PAPER, re.M)] == []


def test_listed_commands_names_and_files_exist():
    named = [c.split()[1:3] for c in re.findall(r"`(cadm [^`]+)`", PAPER)]
    assert len(named) > 5 and all(c[0] in cli.COMMANDS or c[1] in cli.GROUPS[c[0]][1] for c in named)
    files = re.findall(r"`(cadm_paper/[\w/]+\.py|nbs/[\w/]+\.ipynb)`", PAPER)
    assert all((ROOT / file).is_file() for file in files)
    for module, cell in re.findall(r"^\| Eq\.[^\n]*\[0\d_(\w+)\][^\n|]*\| ([^\n|]+) \|$", PAPER, re.M):
        names = re.findall(r"`(\w+)`", cell)
        assert set(names) <= set(dir(importlib.import_module(f"cadm_paper.{module}")))


def test_headline_numbers_match_the_committed_records():
    """Numbers in README and article are means over the records that the article lists by seed."""
    article = nbformat.read(ROOT / "nbs" / "experiments" / "report.ipynb", 4)
    outputs = [o.get("data", {}) for c in article.cells for o in c.get("outputs", ())]
    text, readme = "\n".join(o.get("text/markdown", "") for o in outputs), markdown(ROOT / "README.md")
    named = dict(re.findall(r'<a id="([^"]+)"></a>[^|]*\|[^|]*\|[^|]*\| (.*) \|', text))
    groups = {}
    for part in ("confirm", "photographs"):
        for r in study_records()[part]:
            groups.setdefault(f"{r.dataset['name']}-{Variant.of(r).slug}", []).append(r)
    cells = re.findall(r'<a href="#([^"]+)">([\d.]+ ± [\d.]+) (\(\d+\))</a>', text)
    assert len(cells) == len(named) == 16  # four variants on four data sets
    for place, number, n in cells:
        runs = sorted(groups[place], key=lambda r: r.config.seed)
        values = 100 * np.array([r.metrics["mAP"] for r in runs])
        assert (number, n) == (f"{values.mean():.1f} ± {values.std(ddof=1):.1f}", f"({len(runs)})")
        assert named[place] == ", ".join(f"{r.config.seed}: {r.digest[:8]}" for r in runs)
        assert f"{number} {n}" in readme


RUN = r"[\w.=-]+-seed\d+-[0-9a-f]{8}"


def test_runs_named_in_outputs_are_committed():
    """An output that names another run is older than the committed records."""
    records = [*(ROOT / "outputs" / "reference").rglob("runs.jsonl"), *ROOT.glob("cadm_paper/*/record.json")]
    content = "".join(file.read_text(encoding="utf-8") for file in records)
    committed, count = set(re.findall(rf'"name": "({RUN})"', content)), 0
    for path in (p for p in NOTEBOOKS if p.parent.name in ("nbs", "experiments", "tutorials")):
        outputs = [o for c in nbformat.read(path, 4).cells for o in c.get("outputs", ())]
        text = "\n".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
        named = set(re.findall(rf"({RUN})(?! \(SYNTHETIC)", text))
        assert named <= committed, path
        count += len(named)
    assert count > 10


def test_a_listed_page_without_a_figure_is_named():
    first_figure = runpy.run_path(str(ROOT / "tools" / "docs.py"))["first_figure"]
    with pytest.raises(SystemExit, match="nbs/files.ipynb has no figure"):
        first_figure("nbs/files")


# ---------------------------------------------------------------- the built site


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site, built offline from the notebooks and from synthetic records, with report and explorers."""
    [pytest.importorskip(package) for package in ("sphinx", "myst_nb", "furo")]
    folder = tmp_path_factory.mktemp("site")
    synthetic_runs(folder / "runs", preset="mini", drawn=5)
    places = [word for name in ("runs", "work", "out") for word in (f"--{name}", str(folder / name))]
    env = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    subprocess.run([sys.executable, "tools/docs.py", *places], cwd=ROOT, check=True, env=env)
    return folder / "out"


@pytest.mark.slow
def test_every_notebook_and_module_has_a_page(site):
    for path in NOTEBOOKS:
        page = (site / path.relative_to(ROOT).with_suffix(".html")).read_text(encoding="utf-8")
        cells = nbformat.read(path, 4).cells
        shown = [c for c in cells if c.get("outputs") and not re.search(r"^#\|\s*hide", c.source, re.M)]
        assert page.count('class="cell_output') >= len(shown), path
    assert "api/cadm_paper.metrics.html#cadm_paper.metrics.multilabel_metrics" in (
        site / "nbs" / "00_paper.html"
    ).read_text(encoding="utf-8")
    api = {p.name: p.read_text(encoding="utf-8") for p in (site / "api").glob("cadm_paper*.html")}
    assert not [n for n, page in api.items() if re.search(r"Alias for field|Return type|>Type<|\\_", page)]
    assert "batch classes h w" in re.sub(r"<[^>]+>", "", api["cadm_paper.model.html"])  # shapes as written


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install '.[browser]'")
    program = runpy.run_path(str(ROOT / "tools" / "article.py"))["chromium"]()
    if not program:
        pytest.skip("Chromium not found (set CADM_CHROMIUM to its path)")
    with (
        playwright.sync_playwright() as p,
        p.chromium.launch(executable_path=program, args=["--no-sandbox"]) as browser,
    ):
        yield browser


@pytest.fixture
def opened(chromium):
    """A function that opens a file; afterwards there must be no console error and no external request."""
    complaints, contexts = [], []
    outside = lambda r: [r.url] if not re.match("file:|data:|blob:", r.url) else []

    def open_(path, width=1280, height=860, dark=False, fragment=""):
        size, scheme = {"width": width, "height": height}, "dark" if dark else "light"
        contexts.append(chromium.new_context(viewport=size, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda m: complaints.extend([m.text] if m.type == "error" else []))
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("request", lambda r: complaints.extend(outside(r)))
        page.on("requestfailed", lambda r: complaints.append(f"failed {r.url}"))
        page.goto(path.as_uri() + fragment, wait_until="load")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


def follow(page, link):
    """Click the first of these links and wait for its page."""
    before = page.url
    page.locator(link).first.click()
    page.wait_for_url(lambda url: url != before)


FACTS = """() => new Promise(done => { const wait = n => {
  const all = [...document.querySelectorAll('.math.notranslate')], set = all.filter(e => e.querySelector('mjx-container'));
  if (set.length !== all.length && n) return setTimeout(() => wait(n - 1), 100);
  done({formulas: all.length, wrong: all.length - set.length + document.querySelectorAll('mjx-merror, [data-mjx-error]').length,
        small: [...document.images].filter(i => i.closest('.cell_output, .output_png') && i.width < Math.min(i.naturalWidth, 640)).length,
        over: document.documentElement.scrollWidth - innerWidth, ids: [...document.querySelectorAll('[id]')].map(e => e.id),
        links: [...document.links].map(a => a.href).filter(a => a.startsWith('file:'))});
}; wait(300); })"""


@pytest.mark.slow
def test_every_page_fits_a_phone_renders_formulas_and_has_valid_links(site, opened):
    """On a phone only boxes inside a page scroll sideways; a wide figure does, because its text is small."""
    found = {}
    for path in sorted(p for p in site.rglob("*.html") if "_static" not in p.parts):
        page = opened(path, 390, 844)
        found[path] = page.evaluate(FACTS)
        page.context.close()
    assert len(found) > len(NOTEBOOKS) and sum(facts["formulas"] for facts in found.values()) > 300
    for path, facts in found.items():
        assert not facts["wrong"] and not facts["small"] and facts["over"] <= 0, path
        for link in map(urlsplit, facts["links"]):
            to, fragment = Path(unquote(link.path)), unquote(link.fragment)
            known = not fragment or to not in found or fragment in found[to]["ids"]
            assert to.is_file() and known, (path, to, fragment)


LEGIBLE = """() => {
  const shown = e => e.offsetParent !== null && getComputedStyle(e).visibility === 'visible';
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = c => c.slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > .99) return c;
    }
    return [255, 255, 255];
  };
  const ratio = e => {
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => x - y);
    return (b + .05) / (a + .05);
  };
  const text = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  const pale = [...document.querySelectorAll('p, a, td, th, li, h1, h2, h3, b, small, dt, dd, figcaption, summary')]
    .filter(e => shown(e) && text(e) && ratio(e) < 4.5).map(e => `${ratio(e).toFixed(1)}: ${e.textContent.trim().slice(0, 40)}`);
  const levels = [...document.querySelectorAll('h1, h2, h3, h4')].filter(shown).map(h => +h.tagName[1]);
  return {
    pale, headings: levels[0] === 1 && levels.every((n, i) => !i || n <= levels[i - 1] + 1),
    images: [...document.images].filter(i => !i.closest('button, [role=option]') && !i.alt.trim()).length,
    over: document.documentElement.scrollWidth - innerWidth, dark: light(ground(document.body)) < .2,
  };
}"""


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(
    "name",
    ["index.html", "results.html", "nbs/00_paper.html", "nbs/experiments/report.html"]
    + [f"report/{page}.html" for page in ("index", "article", "explorer")],
)
def test_pages_have_contrast_ordered_headings_and_alt_texts(site, opened, name, dark):
    page = opened(site / name, 1280, 860, dark=dark)
    if name.endswith("explorer.html"):
        page.wait_for_selector("body[data-ready]")
    assert page.evaluate(LEGIBLE) == {"pale": [], "headings": True, "images": 0, "over": 0, "dark": dark}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, found",
    [("hinge", "li a[href*='02_loss']"), ("install", "li:first-child a[href*='docs/install']")],
)
def test_search_finds(site, opened, words, found):
    page = opened(site / "search.html", fragment=f"?q={words}")
    page.wait_for_selector(f"ul.search {found}")  # results come one after another


@pytest.mark.slow
def test_a_number_is_three_clicks_from_its_record_verdict_and_maps(site, opened):
    def after(*clicks):
        page = opened(site / "index.html")
        for click in clicks:
            follow(page, click)
        return page

    cards = after().locator(".cards").inner_text()
    assert all(text in cards for text in ("82.3", "make reproduce", "DigitScenes-C"))
    assert "82.3" in after('.cards a[href$="00_paper.html#Tables-1-and-2"]').locator("body").inner_text()
    verdicts = after('.cards a[href$="study_claims.html"]').locator("body").inner_text()
    assert "Table 1, MS-COCO" in verdicts and any(outcome in verdicts for outcome in OUTCOMES[:4])
    record = after(".cards td a[href^='report/']", "tr.measured td a").locator("tbody:target code a").first
    assert record.is_visible() and len(record.inner_text()) == 12
    for title, address in (("DigitScenes-C", "explorer.html"), ("DigitScenes-N", "explorer-scenes-nus.html")):
        page = after('.cards a[href="report/index.html"]', f'a[href="{address}"]')
        page.wait_for_selector("body[data-ready]")
        assert page.locator("#about").inner_text().startswith(f"{title}:")


@pytest.mark.slow
@pytest.mark.parametrize("width, most", [(1280, 5200), (390, 7500)])
def test_the_report_is_short_links_records_and_prints_unfolded(site, opened, width, most):
    page = opened(site / "report" / "index.html", width)
    assert page.evaluate("document.documentElement.scrollHeight") < most
    hidden = """[...document.querySelectorAll('details > :not(summary)')]
        .filter(e => !e.checkVisibility({contentVisibilityAuto: true})).length"""
    unfolded, number = page.evaluate(hidden), page.locator("tr.measured td a").first
    number.click()
    record = page.locator(f"tbody[id='{number.get_attribute('href')[1:]}'] code a").first
    assert record.is_visible() and page.evaluate(hidden) < unfolded
    record.click()
    assert page.locator(f"[id='{record.get_attribute('href')[1:]}']").is_visible()
    page.emulate_media(media="print")
    assert page.evaluate(hidden) == 0


@pytest.mark.slow
def test_the_explorer_reacts_and_shows_the_values_of_the_records(site, opened):
    page = opened(site / "report" / "explorer.html")
    page.wait_for_selector("body[data-ready]")
    maps = "() => [...document.querySelectorAll('canvas.map')].map(c => c.toDataURL())"
    seen = [page.evaluate(maps)]
    assert seen[0][0] != seen[0][1]
    for act in (
        page.locator("#labels button").nth(1).click,
        page.locator("#images button").nth(2).click,
        lambda: page.keyboard.press("ArrowRight"),
        lambda: page.keyboard.press("ArrowDown"),
        page.locator("#boxes").uncheck,
        page.locator("#signed").check,
        lambda: page.locator("#strength").fill("0"),
    ):
        act()
        seen.append(page.evaluate(maps))
        assert seen[-1] != seen[-2]
    image, label = page.evaluate("[state.image, state.label]")
    shown, data = page.locator("#runs").inner_text(), json.loads(page.locator("#data").text_content())
    for run in data["images"][image]["runs"]:
        expected = [f"{value:.2f}" for value in run["scores"][label]]
        assert all(text in shown for text in [*expected, f"ranks {run['ranks'][label]} of"])


@pytest.mark.slow
def test_explorer_addresses_and_values_under_the_pointer(site, opened):
    page = opened(site / "report" / "explorer.html", 390, 844, fragment="#image=3&label=7")
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate("[state.image, state.label]") == [3, 7]
    side = page.locator("canvas.map").first.bounding_box()["width"]
    page.locator("canvas.map").first.hover(position={"x": 60, "y": 60})
    shown = float(re.search(r": (-?[\d.]+) without", page.locator("#status").inner_text())[1])
    assert abs(shown - page.evaluate(f"value(0, {60 / side}, {60 / side})")) < 0.15

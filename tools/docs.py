"""The documentation site from the committed notebooks: `python tools/docs.py [--out site] [--runs DIR]`.

Nothing is executed or fetched. The sources go to _proc/ (notebooks without hidden cells and directives, one API page for each
module, the landing page with results from the committed run records), then Sphinx builds them with the settings in docs/.
nbdev's `proc_nbs` is not used, because it omits exported cells and the site shows the code."""

import argparse
import ast
import fnmatch
import functools
import html
import importlib
import json
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jinja2
import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from article import chromium, print_pdf  # noqa: E402
from readme import readable  # noqa: E402

from cadm_paper import __version__  # noqa: E402
from cadm_paper.data.datasets import displayed  # noqa: E402

PAGES = ("docs/install.md", "docs/paper-to-here.md", "CONTRIBUTING.md", "DEPENDENCIES.md", "CHANGELOG.md")


@functools.cache
def notebooks() -> list[Path]:
    """All notebooks, in reading order."""
    return sorted(
        p
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)
    )


def module_of(path: Path) -> str | None:
    """The module that a notebook exports."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M)
    return found and "cadm_paper." + found[1].removesuffix(".__init__")


def linked(text: str, folder: str) -> str:
    """Rewrite the links of a page in `folder`: modules link to the API, files outside the site become plain
    text.
    """

    def link(found):
        label, target = found[1], found[2]
        name = posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))
        module = re.fullmatch(r"cadm_paper/([\w/]+)\.py", name)
        if module:
            up = posixpath.relpath("api", folder or ".")
            return f"[{label}]({up}/cadm_paper.{module[1].replace('/', '.')}.rst)"
        if re.match(r"https?:|#", target) or name.endswith(".ipynb") or name in PAGES:
            return found[0]
        return f"`{name}`" if label == target else label

    return re.sub(r"(?<!!)\[([^\]\n]*)\]\(([^)\s]+)\)", link, text)


def only_imports(source: str) -> bool:
    """Whether a cell only imports; such cells are folded."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    # names before the parameters, which `TableParameters.read` takes
    names = lambda node: ast.unparse(node) == "before = set(globals())"
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) or names(n) for n in body)


def checks(cell) -> bool:
    """Whether a code cell only checks, without export or output; such cells are folded."""
    code = (
        cell.cell_type == "code" and not cell.outputs and not re.search(r"^#\|\s*export", cell.source, re.M)
    )
    return bool(code and re.search(r"^\s*assert |^\s*test_\w+\(", cell.source, re.M))


def page(path: Path) -> nbformat.NotebookNode:
    """A notebook as a page: without hidden cells and directives, checks folded, a link to the API below the
    title.
    """
    read = nbformat.read(path, as_version=4)
    for cell in filter(checks, read.cells):
        cell.metadata.tags = [*cell.metadata.get("tags", []), "hide-input"]
        cell.metadata.mystnb = {"code_prompt_show": "checks", "code_prompt_hide": "checks"}
    notebook = readable(read)
    depth, module = len(path.relative_to(ROOT).parts) - 1, module_of(path)
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and not cell.source.strip():
            if not cell.outputs:
                continue
            cell.source, cell.metadata.tags = (
                "# hidden",
                [*cell.metadata.get("tags", []), "remove-input"],
            )  # myst-nb drops a cell without code
        if cell.cell_type == "code" and only_imports(cell.source):
            cell.metadata.tags = [*cell.metadata.get("tags", []), "hide-input"]
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source, path.relative_to(ROOT).parent.as_posix())
        cells.append(cell)
    if module and cells and cells[0].cell_type == "markdown":
        note = f"Exports `{module}`: [API]({'../' * depth}api/{module}.rst)."
        lines = cells[0].source.split("\n")
        after = max([i for i, line in enumerate(lines[:6]) if line.startswith("> ")] or [0])
        cells[0].source = "\n".join([*lines[: after + 1], "", note, *lines[after + 1 :]])
    notebook.cells = cells
    return notebook


def api_page(module: str, notebook: Path) -> str:
    """One module: its purpose, its notebook, every public name."""
    title, where = f"``{module}``", notebook.relative_to(ROOT).with_suffix("").as_posix()
    return "\n".join(
        [
            title,
            "=" * len(title),
            "",
            f"Exported from the notebook :doc:`/{where}`, which explains and checks each name.",
            "",
            f".. automodule:: {module}",
            "",
        ]
    )


def api_index(modules: dict[str, Path]) -> str:
    """All modules in the order of the notebooks, with their purpose."""
    rows = []
    for module, notebook in modules.items():
        about = (importlib.import_module(module).__doc__ or "").strip().split("\n")[0]
        about = re.sub(r"`([^`]+)`", r"``\1``", about)
        rows += [f"   * - :doc:`{module}`", f"     - {about}"]
    return "\n".join(
        [
            "API",
            "===",
            "",
            "Public functions and classes by module; signatures include shapes, as in jaxtyping. Alphabetical list: :ref:`genindex`.",
            "",
            ".. list-table::",
            "   :widths: 30 70",
            "",
            *rows,
            "",
            ".. toctree::",
            "   :hidden:",
            "",
            *(f"   {module}" for module in modules),
            "",
        ]
    )


def measured(runs) -> dict | None:
    """mAP by variant from run records, for the landing page; None without records."""
    from cadm_paper.engine.variants import MAIN
    from cadm_paper.tables import dataset_blocks, table

    if not runs:
        return None
    tables = [table("table1", runs, datasets=["scenes-coco"]), table("table2", runs, datasets=["scenes-nus"])]
    blocks = [block for t in tables for block in t.blocks] + [
        b for d in ("voc2007", "coco40k") for b in dataset_blocks(d, runs, {})
    ]
    synthetic = any(r.extra.get("synthetic") for r in runs)

    def cell(block, line) -> str:
        """A number that links to its records in the article, or in the report if they are synthetic."""
        place = f"nbs/experiments/report.html#{block.dataset}-{line.variant.slug}"
        address = "report/index.html#tables" if synthetic else place
        return f'<a href="{address}">{line.cell("mAP")}</a> ({len(line.runs)})'

    found = [{line.variant: cell(b, line) for line in b.lines if line.state == "measured"} for b in blocks]
    return {
        "heads": [displayed(block.dataset).removeprefix("PASCAL ") for block in blocks],
        "rows": [
            (v.label, [of.get(v, "not run") for of in found]) for v in MAIN if any(v in of for of in found)
        ],
        "gains": "; ".join(short(gain) for t in tables for gain in t.gains),
        "synthetic": synthetic,
    }


def short(gain) -> str:
    """The effect of the embedding loss on mAP and its uncertainty, in short."""
    from cadm_paper.paper import signed

    d = gain.differences["mAP"]
    seeds = f"{d.n} seeds" if d.n > 1 else "one seed"
    if d.n == 1 and d.se_images:
        seeds += f", standard error over test images {100 * d.se_images:.1f}"
    printed = f"printed {signed(gain.printed['mAP'])} on {gain.printed_on}"
    return f"{displayed(gain.dataset)} {signed(100 * d.mean)} ({seeds}; {printed})"


def verdict_counts() -> str:
    """The committed verdicts in a line: their counts and the gains of the embedding loss; empty without
    verdicts.
    """
    from cadm_paper.paper import signed
    from cadm_paper.results.claims import read_verdicts

    found = read_verdicts()
    if not found["claims"]:
        return ""
    counts = ", ".join(f"{verdict} {n}" for verdict, n in found["counts"].items())
    gains = "; ".join(
        f"{displayed(e['dataset'])} {signed(e['mean'])} points [{signed(e['low'])}, {signed(e['high'])}] (n = {e['n']})"
        for e in found["claims"]
        if e["id"].startswith("loss-") and e["n"] > 1
    )
    claims = len({e["claim"] for e in found["claims"]})
    text = f"{claims} claims, each on the data sets that can test it: {counts}."
    return text + (f" The embedding loss (λ = 0.5 minus 0), over all seeds: {gains}." if gains else "")


def claims() -> list[tuple[str, list[float]]]:
    """The paper's mAP of baseline, lambda 0 and lambda 0.5, as printed."""
    from cadm_paper.paper import TABLE1, TABLE2

    mine = lambda rows: [row.values["mAP"] for row in rows if row.variant]
    return [("MS-COCO (Table 1)", mine(TABLE1)), ("NUS-WIDE (Table 2)", mine(TABLE2))]


def sources(runs, explorers: dict[str, str]) -> dict[str, str]:
    """All sources for Sphinx: name -> text."""
    files: dict[str, str] = {}
    modules = {module: path for path in notebooks() if (module := module_of(path))}
    for path in notebooks():
        files[path.relative_to(ROOT).as_posix()] = nbformat.writes(page(path))
    files |= {f"api/{module}.rst": api_page(module, notebook) for module, notebook in modules.items()}
    files["api/index.rst"] = api_index(modules)
    for name in PAGES:
        if (ROOT / name).is_file():
            files[name] = linked((ROOT / name).read_text(encoding="utf-8"), posixpath.dirname(name))
    files |= {
        p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8")
        for p in sorted((ROOT / "assets" / "badges").glob("*.svg"))
    }
    pages = [p.relative_to(ROOT).with_suffix("").as_posix() for p in notebooks()]
    landing = jinja2.Template((ROOT / "docs" / "index.md.j2").read_text(encoding="utf-8"), trim_blocks=False)
    files["index.md"] = landing.render(
        claims=claims(),
        figure=first_figure("nbs/index"),
        verdicts=verdict_counts(),
        measured=measured(runs),
        explorers=[(displayed(name), address) for name, address in explorers.items()],
        sections=[title.lower().replace(" ", "-") for title in SECTIONS],
        version=__version__,
    )
    files |= section_pages(pages)
    return files


def write_sources(folder: Path, files: dict[str, str]) -> None:
    """Write changed files and delete obsolete ones, so that Sphinx rereads only those."""
    for path in [
        p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in files
    ]:
        path.unlink()
    for name, text in files.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


SECTIONS = {
    "The paper": [
        ("The paper equation by equation, with code and checks", ["docs/paper-to-here", "nbs/0[0-3]_*"])
    ],
    "Results": [
        (
            "The article, and the plan that preceded the runs",
            ["nbs/experiments/report", "nbs/experiments/study_plan"],
        ),
        ("Tables and figures", [f"nbs/experiments/{name}" for name in ("table?", "fig?", "gallery")]),
        ("Studies", [f"nbs/experiments/study_{name}" for name in ("claims", "digitscenes", "maps", "*")]),
    ],
    "Use it": [
        (
            "Install, train, predict",
            ["docs/install", "nbs/experiments/train", "nbs/app/cli", "nbs/app/predict"],
        ),
        ("Data sets", ["nbs/04_data", "nbs/data/*"]),
        ("Reference", ["api/index", "genindex", "nbs/index"]),
    ],
    "Tutorials": [
        (
            "Notebooks that the test suite runs",
            [
                f"nbs/tutorials/{name}"
                for name in (
                    "reproduce*",
                    "predict",
                    "own*",
                    "loss*",
                    "evaluate*",
                    "add*",
                    "on_a_cluster",
                    "*",
                )
            ],
        )
    ],
    "Internals": [
        ("Training, figures, tables", ["nbs/0*", "nbs/weights", "nbs/files"]),
        (
            "Methods, engine, results, app",
            [f"nbs/{room}/*" for room in ("methods", "engine", "results", "app", "*")],
        ),
        ("The project", ["CONTRIBUTING", "DEPENDENCIES", "CHANGELOG"]),
    ],
}


def about(name: str) -> tuple[str, str]:
    """Title and subtitle of a page, from its first lines."""
    path = next((p for p in (ROOT / f"{name}.ipynb", ROOT / f"{name}.md") if p.is_file()), None)
    if path is None:
        return {"api/index": ("API", "Every public name"), "genindex": ("Index", "All names")}[name]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = nbformat.reads(text, as_version=4).cells[0].source
    title = re.search(r"^# (.+)$", text, re.M)[1]
    return title, next(iter(re.findall(r"^> (.+)$", text, re.M)), "")


def section_pages(pages: list[str]) -> dict[str, str]:
    """The five section pages; each page of the site is in the first section that matches it."""
    files, left = (
        {},
        dict.fromkeys([*(p.removesuffix(".md") for p in PAGES), *pages, "api/index", "genindex"]),
    )
    for title, groups in SECTIONS.items():
        lines, slug = [f"# {title}", ""], title.lower().replace(" ", "-")
        if title == "Results":
            lines += [thumbnails(), ""]
        for caption, patterns in groups:
            here = list(dict.fromkeys(p for pattern in patterns for p in fnmatch.filter(left, pattern)))
            left = {p: None for p in left if p not in here}
            lines += [f"## {caption}", ""]
            for name in here:
                head, subtitle = about(name)
                target = f"{name}.html" if name == "genindex" else f"/{name}"
                link = f"[{head}]({target})" if name != "genindex" else f"<a href='{target}'>{head}</a>"
                lines.append(f"- {link}{': ' * bool(subtitle)}{linked(subtitle, posixpath.dirname(name))}")
            lines += ["", "```{toctree}", ":hidden:", "", *here, "```", ""]
        files[f"{slug}.md"] = "\n".join(lines)
    if left:
        raise SystemExit(f"not in any section of the site: {', '.join(left)}")
    return files


def first_figure(name: str) -> tuple[str, str]:
    """The first figure among a notebook's outputs: its data as an address, and its caption's first sentence.

    Exits for a notebook without figures.
    """
    for cell in nbformat.read(ROOT / f"{name}.ipynb", as_version=4).cells:
        for data in (o.get("data", {}) for o in cell.get("outputs", ())):
            if "image/png" in data:
                png, caption = "".join(data["image/png"].split()), data["text/plain"].partition(". ")[0]
                caption = about(name)[0] if caption.startswith("<Figure") else caption  # has none
                return f"data:image/png;base64,{png}", html.escape(caption)
    raise SystemExit(
        f"{name}.ipynb has no figure among its outputs: execute it, or do not list it in tools/docs.py"
    )


def thumbnails() -> str:
    """Figures that link to the pages with their code."""
    names = [f"experiments/{name}" for name in ("fig2", "fig4", "gallery", "study_claims", "study_recipe")]
    shown = [(f"nbs/{name}", first_figure(f"nbs/{name}")) for name in [*names, "data/scenes"]]
    links = [
        f'<a href="{name}.html"><img src="{uri}" alt="{caption}"><span>{about(name)[0]}</span></a>'
        for name, (uri, caption) in shown
    ]
    return f'<div class="thumbs">{"".join(links)}</div>'


def records(folder: Path | None) -> list:
    """The committed records, or those in `folder`."""
    from cadm_paper.engine.record import load_runs

    place = folder or ROOT / "outputs" / "reference" / "mini"
    return load_runs(place) if place.is_dir() else []


def study_runs() -> list:
    """The committed records of the planned studies, as in the README."""
    from cadm_paper.results.claims import study_records

    studies = study_records()
    return [*studies["confirm"], *studies["photographs"]]


def report_pages(folder: Path | None, runs, out: Path) -> dict[str, str]:
    """Write report and explorers to `out`; the explorers' addresses by data set. Without records the explorer
    shows synthetic ones and says so.
    """
    from cadm_paper.app.explorer import build_explorers, explore
    from cadm_paper.app.report import build_article, build_report
    from cadm_paper.engine.synthetic import synthetic_run

    if not runs:
        with tempfile.TemporaryDirectory() as tmp:
            pair = (synthetic_run(f"{tmp}/{lam}", method="cadm", lam=lam, drawn=12) for lam in (0.0, 0.5))
            explore(*pair).save(out / "explorer.html")
        return {}
    names = build_explorers(runs, out)
    article = build_article(ROOT / "nbs" / "experiments" / "report.ipynb", out)
    if chromium():
        print_pdf(article)
    build_report(folder or ROOT / "outputs" / "reference" / "mini", out, names, article.name)
    return {dataset: f"report/{name}" for dataset, name in names.items()}


MATHJAX = ("tex-chtml.js", "input", "tex", "tex.js", "extensions", "output", "chtml", "fonts", "woff-v2")


def superfluous(folder: str, names: list[str]) -> list[str]:
    """Files that the site does not need: other builds of MathJax, Sphinx's internal files."""
    if "mathjax" in Path(folder).parts:
        return [
            name
            for name in names
            if name not in MATHJAX and not name.endswith(".woff") and "extensions" not in Path(folder).parts
        ]
    return [name for name in names if name in (".buildinfo", "objects.inv.bak", "jupyter_execute")]


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the documentation site.")
    parser.add_argument("--out", type=Path, default=ROOT / "site")
    parser.add_argument(
        "--runs", type=Path, help="folder of run records to show instead of the committed ones"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "_proc", help="folder for the Sphinx sources")
    given = parser.parse_args()
    runs = records(given.runs)
    shutil.rmtree(given.work / "report", ignore_errors=True)
    explorers = report_pages(given.runs, runs, given.work / "report")
    headline = runs if given.runs else study_runs() or runs  # all seeds, not one
    write_sources(given.work / "source", sources(headline, explorers))
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-b",
            "html",
            "-q",
            "-W",
            "--keep-going",
            "-c",
            str(ROOT / "docs"),
            "-d",
            str(given.work / "doctrees"),
            str(given.work / "source"),
            str(given.work / "html"),
        ]
    )
    if built.returncode:
        return built.returncode
    shutil.rmtree(given.out, ignore_errors=True)
    shutil.copytree(given.work / "html", given.out, ignore=superfluous)
    shutil.copytree(given.work / "report", given.out / "report")
    (given.out / ".nojekyll").touch()
    print(f"site: {given.out}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())

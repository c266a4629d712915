"""README.md from nbs/index.ipynb, through nbconvert: `python tools/readme.py [--check]`.

Figures of the notebook go to assets/readme/; links between notebooks become relative to the root. With --check nothing is
written; the exit code is 1 if README.md or its figures are out of date."""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written from nbs/index.ipynb by `make sync`; edit that. -->\n\n"


def readable(notebook):
    """The notebook without hidden cells and without nbdev's directives."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and re.search(r"^#\|\s*(hide|default_exp)\b", cell.source, re.M):
            continue
        if cell.cell_type == "code" and re.search(r"^#\|\s*echo:\s*false", cell.source, re.M):
            cell.source = ""
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        cells.append(cell)
    notebook.cells = cells
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def build() -> dict[str, bytes]:
    """Path below the root -> content."""
    notebook = readable(nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4))
    text, resources = MarkdownExporter().from_notebook_node(
        notebook, {"output_files_dir": "assets/readme", "unique_key": "index"}
    )
    shown = [o for c in notebook.cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    captions = iter(o.data["text/plain"].replace("\n", " ").partition(". ")[0] for o in shown)
    text = re.sub(r"!\[png\]", lambda _: f"![{next(captions)}]", text)
    text = re.sub(r"```python\n\s*```\n", "", text)  # cells whose code is hidden
    text = re.sub(r"\]\((?!https?:|#|assets/)([\w./-]+\.ipynb)", r"](nbs/\1", text)  # links between notebooks
    text = text.replace("](../", "](")
    text = re.sub(
        r"\]\(#([^)]+)\)", lambda m: f"](#{re.sub(r'[^a-z0-9 -]', '', m[1].lower())})", text
    )  # GitHub's anchors; JupyterLab's keep case and commas
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return {
        "README.md": (NOTE + text).encode(),
        **{str(name): content for name, content in resources["outputs"].items()},
    }


def main() -> int:
    files = build()
    stale = [
        name
        for name, content in files.items()
        if not (ROOT / name).is_file() or (ROOT / name).read_bytes() != content
    ]
    extra = [p for p in (ROOT / "assets" / "readme").glob("*") if str(p.relative_to(ROOT)) not in files]
    if "--check" in sys.argv:
        print(
            "\n".join(f"differs from nbs/index.ipynb: {name}" for name in [*stale, *map(str, extra)])
            or "README.md is up to date"
        )
        return 1 if stale or extra else 0
    for path in extra:
        path.unlink()
    for name in stale:
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(files[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Badges from the metadata of the repository: `python tools/badges.py [--check]` writes assets/badges/*.svg."""

import re
import sys
import tomllib
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]


def facts() -> dict[str, tuple[str, str]]:
    """File name -> (left, right), read from pyproject.toml and the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = re.search(
        r'__version__ = "(.+)"', (ROOT / "cadm_paper" / "__init__.py").read_text(encoding="utf-8")
    )[1]
    pythons = re.findall(r"Python :: (3\.\d+)$", "\n".join(project["classifiers"]), re.M)
    return {
        "python": ("python", " | ".join(pythons)),
        "licence": ("licence", project["license"]),
        "version": ("version", version),
        "paper": ("paper", "ICME 2019"),
    }


def width(text: str) -> int:
    """The width of text of 11 px, rounded up."""
    return round(6.7 * len(text)) + 12


def badge(left: str, right: str) -> str:
    """One badge as SVG."""
    a, b = width(left), width(right)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{a + b}" height="20" role="img" aria-label="{escape(left)}: {escape(right)}"><title>{escape(left)}: {escape(right)}</title>'
        f'<clipPath id="r"><rect width="{a + b}" height="20" rx="3"/></clipPath><g clip-path="url(#r)"><rect width="{a}" height="20" fill="#444"/><rect x="{a}" width="{b}" height="20" fill="#0550ae"/></g>'
        f'<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle"><text x="{a / 2:g}" y="14">{escape(left)}</text><text x="{a + b / 2:g}" y="14">{escape(right)}</text></g></svg>\n'
    )


def main() -> int:
    files = {ROOT / "assets" / "badges" / f"{name}.svg": badge(*pair) for name, pair in facts().items()}
    stale = [
        path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        print(
            "\n".join(f"out of date: {path.relative_to(ROOT)}" for path in stale) or "badges are up to date"
        )
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

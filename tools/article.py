"""The article as a page and as a PDF of A4 pages: `python tools/article.py [--out outputs/report]`.

The PDF is printed by Chromium (on the path, or as CADM_CHROMIUM names it) through playwright."""

import argparse
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def chromium() -> str | None:
    """The machine's Chromium, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CADM_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def print_pdf(page: Path) -> Path:
    """Print a page to A4, with page numbers."""
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as p,
        p.chromium.launch(executable_path=chromium(), args=["--no-sandbox"]) as browser,
    ):
        opened = browser.new_page()
        opened.goto(page.resolve().as_uri())
        footer = '<div style="font-size: 7pt; width: 100%; text-align: center"><span class="pageNumber"></span></div>'
        how = dict(prefer_css_page_size=True, display_header_footer=True, header_template="<i></i>")
        opened.pdf(path=page.with_suffix(".pdf"), footer_template=footer, **how)
    return page.with_suffix(".pdf")


def main() -> int:
    from cadm_paper.app.report import build_article

    parser = argparse.ArgumentParser(description="Write the article as a page and as a PDF.")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "report")
    page = build_article(ROOT / "nbs" / "experiments" / "report.ipynb", parser.parse_args().out)
    print(page)
    if not chromium():
        print("no PDF: Chromium not found (set CADM_CHROMIUM to its path)")
        return 1
    print(print_pdf(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The size of the code now and before the rebuild (commit 5f0a1ff): python tools/count.py."""

import ast
import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEFORE = (7785, 3453, 983, 72, 7, 21, 9)  # cells of the formatted notebooks, commit ccf0a88
LIMITS = (5200, 2200, 150, 55, 5, 14, 6)


def trees(folder: str) -> dict[Path, ast.Module]:
    """Every module below a folder, parsed."""
    files = [p for p in sorted((ROOT / folder).rglob("*.py")) if p.name != "_modidx.py"]
    return {p: ast.parse(p.read_text(encoding="utf-8")) for p in files}


def statements(modules: dict[Path, ast.Module]) -> int:
    """The number of statements of all kinds in the syntax trees."""
    return sum(isinstance(node, ast.stmt) for tree in modules.values() for node in ast.walk(tree))


def public(modules: dict[Path, ast.Module]) -> int:
    """The number of names in all `__all__`."""
    lists = [
        node.value
        for tree in modules.values()
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    ]
    return sum(len(names.elts) for names in lists if isinstance(names, ast.List))


def cell_lines() -> list[int]:
    """Lines of each code cell of the notebooks, without blank ones and directives."""
    notebooks = [json.loads(p.read_text(encoding="utf-8")) for p in (ROOT / "nbs").rglob("*.ipynb")]
    cells = [c["source"] for n in notebooks for c in n["cells"] if c["cell_type"] == "code"]
    counts = [sum(bool(line.strip()) and not line.startswith("#|") for line in source) for source in cells]
    return [count for count in counts if count]


def counts() -> dict[str, float]:
    """All counts by name."""
    from cadm_paper.engine.config import TrainConfig

    library, cells = trees("cadm_paper"), cell_lines()
    return {
        "statements of the library": statements(library),
        "statements of the tests": statements(trees("tests")),
        "names in __all__": public(library),
        "fields of TrainConfig": len(TrainConfig.model_fields),
        "lines of a cell, median": statistics.median(cells),
        "lines of a cell, ninth decile": statistics.quantiles(cells, n=10)[-1],
        "modules with the word lam": sum(bool(re.search(r"\blam\b", p.read_text())) for p in library),
    }


if __name__ == "__main__":
    print(f"{'':32}{'before':>8}{'now':>8}{'at most':>9}")
    for (name, now), before, limit in zip(counts().items(), BEFORE, LIMITS):
        print(f"{name:32}{before:8g}{now:8g}{limit:9g}")

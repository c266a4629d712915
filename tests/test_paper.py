"""What the notebook 00_paper cannot show in a cell: the transcription against the paper's own text, and the register against the code."""
import os, re
from pathlib import Path

import pytest

from cadm_paper.paper import COLUMNS, TABLE1, TABLE2, printed_rows

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CADM_SHARED_DATA", ROOT.parent / "shared" / "data"))
TEXT = SHARED.parent / "paper" / "cadm-icme2019.txt"


# ---- the transcription -----------------------------------------------------------------------------------------

def tables_in_text():
    """The lines of the paper's text that are table rows: (name, thirteen cells), in order."""
    lines = []
    for line in TEXT.read_text(encoding="utf-8").splitlines():
        name, *cells = re.split(r"\s*\t\s*", line.strip())
        if len(cells) == 13 and re.fullmatch(r"[\d.]+|[-_]", cells[-1]):
            lines.append((re.sub(r"\$\(\\lambda = ([\d.]+)\)\$|\(\$\\lambda = ([\d.]+)\$\)", lambda m: f"(λ = {m[1] or m[2]})", name),
                          [None if cell in "-_" else float(cell) for cell in cells]))
    return lines


@pytest.mark.skipif(not TEXT.is_file(), reason="the paper's text is not here")
def test_every_cell_is_the_texts():
    ours = [(r.label, list(r.values.values())) for r in (*TABLE1, *TABLE2)]
    assert ours == tables_in_text()


@pytest.mark.parametrize("table", [TABLE1, TABLE2])
def test_rows_for_a_renderer(table):
    frame = printed_rows(table)
    assert list(frame.columns) == ["row", "reference", "method", "lam", *COLUMNS] and frame.row.is_unique
    for r, (_, line) in zip(table, frame.iterrows()):
        for column in COLUMNS:  # a dash stays a dash, a number keeps its one decimal
            assert (line[column] != line[column]) if r.values[column] is None else line[column] == r.values[column] == round(line[column], 1)


def test_the_companions_rows_are_named():
    from cadm_paper.model import METHODS

    for table in (TABLE1, TABLE2):
        assert [(r.method, r.lam) for r in table if r.method] == [("baseline", None), ("cadm", 0.0), ("cadm", 0.5)]
        assert {r.method for r in table} - {None} <= set(METHODS)

"""Run notebooks of nbs/experiments in this process, with parameters as papermill injects them."""

from pathlib import Path

import nbformat

EXPERIMENTS = Path(__file__).resolve().parents[1] / "nbs" / "experiments"


def run_cells(notebook: str, until: str = "", **parameters) -> dict:
    """Run the code cells in order, up to the first that contains `until`; parameters follow the tagged cell.

    Returns the variables.
    """
    cells = [c for c in nbformat.read(EXPERIMENTS / f"{notebook}.ipynb", 4).cells if c.cell_type == "code"]
    (tagged,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    tagged.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    last = [until in cell.source for cell in cells].index(True) if until else len(cells)
    namespace = {"__name__": "__main__", "display": str}
    exec(compile("\n".join(cell.source for cell in cells[: last + 1]), notebook, "exec"), namespace)
    return namespace

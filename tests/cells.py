"""A notebook of nbs/experiments in this process, with parameters where papermill puts them."""

from pathlib import Path

import nbformat

EXPERIMENTS = Path(__file__).resolve().parents[1] / "nbs" / "experiments"


def run_cells(notebook: str, **parameters) -> None:
    """Run its code cells in order; the parameters (as text, as from a command line) follow the tagged cell."""
    cells = [cell for cell in nbformat.read(EXPERIMENTS / f"{notebook}.ipynb", 4).cells]
    (tagged,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    tagged.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    exec(compile(code, notebook, "exec"), {"__name__": "__main__", "display": str})

"""Write the parameters cell of nbs/experiments/train.ipynb from the fields of TrainConfig; --check only
compares.
"""

import json
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

from cadm_paper.app.commands import usual
from cadm_paper.engine.config import TrainConfig

NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs" / "experiments" / "train.ipynb"


def line(name: str) -> str:
    """A field as a typed, commented parameter without a value."""
    field = TrainConfig.model_fields[name]
    kind = field.annotation.__name__ if field.annotation in (bool, int, float) else "str"
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    about = field.description.replace("=", "is")  # papermill reads no line with a second equals sign
    return f"{name}: {kind} = ...  # {about}{': ' if choices else ''}{', '.join(choices)} {usual(name)}\n"


def cell() -> str:
    """The source of the cell."""
    text = (
        "# fmt: off\n"
        + line("preset")
        + "resume: bool = ...  # continue from the run's checkpoint if there is one\n"
    )
    for group in reversed(TrainConfig.__bases__):
        text += f"# {group.__doc__}\n" + "".join(map(line, group.model_fields))
    return text.rstrip("\n")


def found(notebook: dict) -> dict:
    """The cell that papermill reads the parameters from."""
    (tagged,) = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
    return tagged


if __name__ == "__main__":
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    parameters, source = found(notebook), cell().splitlines(keepends=True)
    if "--check" in sys.argv[1:]:
        sys.exit(parameters["source"] != source and f"{NOTEBOOK.name}: run python tools/parameters.py")
    parameters["source"] = source
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

"""Leaves pictures in place of widgets in the outputs of notebooks: `python tests/still.py
nbs/09_lab/03_explorers.ipynb ...`

A widget lives as long as its kernel; committed, it is an empty box, and its state is large. What the panels
of `musekit.lab` show beside it stays.
"""
import sys

import nbformat

VIEW = "application/vnd.jupyter.widget-view+json"


def still(notebook) -> int:
    "Takes the widgets out, in place; gives their number."
    outputs = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if VIEW in output.get("data", {})
    ]
    for output in outputs:
        output["data"] = {
            kind: data for kind, data in output["data"].items() if kind.startswith(("image/", "text/html"))
        }
    for cell in notebook.cells:
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if output.get("data") != {}]
    notebook.metadata.pop("widgets", None)
    return len(outputs)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        notebook = nbformat.read(name, 4)
        print(f"{name}: {still(notebook)} widgets became pictures")
        nbformat.write(notebook, name)

"""Makes README.md from nbs/index.ipynb: `python tests/readme.py --write`."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def render() -> str:
    """The index notebook as Markdown, its pictures found from the project's root; hidden cells are left
    out."""
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not re.match(r"#\|\s*hide", cell.source)]
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r"(\]\(|src=\")(images/|[0-9]{2}_\w+/)", r"\1nbs/\2", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        (ROOT / "README.md").write_text(render(), encoding="utf-8")
    else:
        print(render())

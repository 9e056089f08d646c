"""Keeps the figures in the notebooks in step with the code that draws them.

A cell whose output holds an image carries a digest in its metadata: of its code, of the functions and classes
that the notebook defines for it, and of those of musekit that they name, with the functions of the same
module that these call, in turn. Comments, docstrings and layout do not count. A figure whose digest no longer
fits is stale, and its notebook is to be executed again:

    python tests/figures.py                                      lists stale figures; exits 1 if there are any
    python tests/figures.py --write                                executes the notebooks that have one
    python tests/figures.py --write nbs/09_lab/05_live.ipynb ...   executes these notebooks
    python tests/figures.py --stamp nbs/00_start/02_classes.ipynb  only writes the digests, after an execution

Both leave images in place of widgets and PNGs of at most 256 colours, since notebooks are kept small.
"""
import argparse
import ast
import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
from PIL import Image

from still import still

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
KEY = "figure"  # in the cell's metadata, which nbdev_clean keeps: allowed_cell_metadata_keys in settings.ini
LOWEST_DPI = 100
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
DRAWING = ("data.grids", "data.masks", "training.log")  # draw for other modules, and are followed from there


def notebooks() -> list[Path]:
    return sorted(ROOT.joinpath("nbs").rglob("*.ipynb"))


def images_of(cell) -> list[tuple[str, str]]:
    """The images in the outputs of a cell: MIME type and data."""
    bundles = [output.get("data", {}) for output in cell.get("outputs", [])]
    return [
        (kind, "".join(data))
        for bundle in bundles
        for kind, data in bundle.items()
        if kind.startswith("image/")
    ]


def plain(node) -> object:
    """A syntax tree as nested lists, equal in all versions of Python, without docstrings."""
    if isinstance(node, list):
        return [plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, DEFINITIONS) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    if isinstance(node, ast.JoinedStr):  # Python 3.12 leaves empty strings after nested format widths
        fields["values"] = [part for part in node.values if getattr(part, "value", None) != ""]
    ignored = ("ctx", "kind", "type_comment", "type_params")
    kept = {name: value for name, value in fields.items() if name not in ignored and value not in (None, [])}
    return [type(node).__name__, [[name, plain(value)] for name, value in kept.items()]]


def parse(source: str) -> list[ast.stmt]:
    """The statements of a cell, without IPython's magics."""
    return ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", source)).body


def definitions(statements: list[ast.stmt], module: str | None = None) -> dict[str, object]:
    """Functions and classes by name, and as (module, name) those that are imported from musekit."""
    names = {}
    for statement in statements:
        if isinstance(statement, DEFINITIONS):
            names[statement.name] = statement
        elif isinstance(statement, ast.ImportFrom):
            source = absolute(statement, module)
            if source.startswith("musekit."):
                names |= {alias.asname or alias.name: (source, alias.name) for alias in statement.names}
    return names


def absolute(statement: ast.ImportFrom, module: str | None) -> str:
    """The module that a statement in `module` imports from."""
    base = module.split(".")[: -statement.level] if module and statement.level else []
    return ".".join([*base, *([statement.module] if statement.module else [])])


@cache
def module_definitions(module: str) -> dict[str, object]:
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return definitions(ast.parse(path.read_text(encoding="utf-8")).body, module) if path.is_file() else {}


def names_in(node: ast.AST) -> list[str]:
    """The names that a piece of code uses, sorted."""
    return sorted({part.id for part in ast.walk(node) if isinstance(part, ast.Name)})


class Sources:
    """The pieces of code that a figure depends on."""

    def __init__(self):
        self.pieces = {}  # place of a definition, or number of a statement -> its tree

    def add(self, statement: ast.stmt, local: dict[str, object], key: object):
        """A statement of a notebook and what it uses; `local` are the definitions there."""
        if key in self.pieces:
            return
        self.pieces[key] = plain(statement)
        for name in names_in(statement):
            definition = local.get(name)
            if isinstance(definition, tuple):
                self.add_from(*definition)
            elif definition is not None:
                self.add(definition, local, name)

    def add_from(self, module: str, name: str):
        """A function or class of a module, and the functions that it calls there or in modules that draw."""
        inside = module_definitions(module)
        definition = inside.get(name)
        if isinstance(definition, tuple) and definition[0] != module:  # imported there from elsewhere
            return self.add_from(*definition)
        if (module, name) in self.pieces or not isinstance(definition, DEFINITIONS):
            return
        self.pieces[module, name] = plain(definition)
        for used in names_in(definition):
            called = inside.get(used)
            if isinstance(called, FUNCTIONS):
                self.add_from(module, used)
            elif isinstance(called, tuple) and called[0].removeprefix("musekit.") in DRAWING:
                self.add_from(*called)

    def digest(self) -> str:
        return hashlib.sha256(repr(list(self.pieces.values())).encode()).hexdigest()[:12]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def digests(notebook: dict) -> dict[str, str]:
    """The digest of every cell with an image, by the cell's id."""
    local, result, module = {}, {}, None
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        if name := re.search(r"^#\|\s*default_exp (\S+)", source, re.M):
            module = f"musekit.{name[1]}"
        statements = parse(source)
        own = definitions(statements)
        if re.search(r"^#\|\s*export", source, re.M):  # as in the module
            own = {name: place if isinstance(place, tuple) else (module, name) for name, place in own.items()}
        local |= own
        if images_of(cell):
            sources = Sources()
            for number, statement in enumerate(statements):
                sources.add(statement, local, number)
            result[cell["id"]] = sources.digest()
    return result


def stale_cells(notebook: dict) -> list[str]:
    """The ids of cells whose figure does not come from the code as it is now."""
    stamps = {cell["id"]: cell["metadata"].get(KEY) for cell in notebook["cells"]}
    return [name for name, digest in digests(notebook).items() if stamps[name] != digest]


def coarse_cells(notebook: dict) -> list[str]:
    """The ids of cells with a figure of fewer than LOWEST_DPI dots per inch, as matplotlib notes it."""
    return [cell["id"] for cell in notebook["cells"] for kind, data in images_of(cell)
            if kind == "image/png" and round(opened(data).info.get("dpi", (LOWEST_DPI,))[0]) < LOWEST_DPI]


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def with_palette(data: str) -> str:
    """A PNG in at most 256 colours, if that is smaller."""
    image, file = opened(data).convert("RGBA"), io.BytesIO()
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image, mask=image.getchannel("A"))
    dpi = {"dpi": image.info["dpi"]} if "dpi" in image.info else {}
    paper.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True, **dpi)
    smaller = base64.b64encode(file.getvalue()).decode()
    return smaller if len(smaller) < len(data) else data


def stamp(path: Path):
    """Leaves images in place of widgets, makes PNGs smaller, and writes the digests."""
    notebook = nbformat.read(path, 4)
    still(notebook)
    new_digests = digests(notebook)
    for cell in notebook.cells:
        cell.metadata.pop(KEY, None)
        if cell.id in new_digests:
            cell.metadata[KEY] = new_digests[cell.id]
        for output in cell.get("outputs", []):
            if "text" in output:  # such as a warning, which names the place of the package
                output["text"] = output["text"].replace(f"{ROOT}/", "")
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = with_palette(output.data["image/png"])
                output.data.pop("image/jpeg", None)  # the same image again
    nbformat.write(notebook, path)
    subprocess.run([BIN / "nbdev_clean", "--fname", path], check=True, cwd=ROOT)


def execute(path: Path):
    print(f"executing {path.relative_to(ROOT)}", flush=True)
    command = [
        BIN / "jupyter",
        "nbconvert",
        "--to",
        "notebook",
        "--execute",
        "--inplace",
        path,
        "--log-level",
        "ERROR",
    ]
    subprocess.run(command, check=True, cwd=ROOT)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--stamp", action="store_true")
    options = parser.parse_args()
    paths = [path.resolve() for path in options.notebooks] or notebooks()
    if options.stamp and not options.notebooks:
        parser.error("--stamp needs the notebooks that you have executed")
    stale = {path: stale_cells(read(path)) for path in paths}
    for path in [path for path in paths if stale[path] or options.notebooks]:
        if options.write:
            execute(path)
        if options.write or options.stamp:
            stamp(path)
        for cell in [] if options.write or options.stamp else stale[path]:
            print(f"{path.relative_to(ROOT)}: the figure of cell {cell} is stale")
    return 0 if options.write or options.stamp else int(any(stale.values()))


if __name__ == "__main__":
    sys.exit(main())

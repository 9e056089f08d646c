"""Keeps the figures in the notebooks in step with the code that draws them.

Each cell whose output holds an image carries, in its metadata, a digest of its code: the cell, the statements of the notebook that define
what it uses, and the functions and classes of musekit that these name, with what they use of their own module. Comments, docstrings and
layout do not count. When the digest no longer fits, the figure is stale, and its notebook is to be executed again:

    python tests/figures.py                                        lists stale figures; exits 1 if there are any
    python tests/figures.py --write                                executes the notebooks that have one
    python tests/figures.py --write nbs/09_lab/05_live.ipynb ...   executes these notebooks
    python tests/figures.py --stamp nbs/00_start/02_classes.ipynb  you have just executed this one yourself

After an execution widgets become images, and PNGs get a palette of 256 colours, since notebooks are kept small.
"""
import argparse
import ast
import base64
import hashlib
import io
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
KEY = "figure"  # of the cell's metadata, see allowed_cell_metadata_keys in settings.ini
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
LOWEST_DPI = 100


def images_of(cell) -> dict[str, str]:
    """The images in the outputs of a cell, by MIME type."""
    bundles = [output.get("data", {}) for output in cell.get("outputs", [])]
    return {kind: data for bundle in bundles for kind, data in bundle.items() if kind.startswith("image/")}


def parse(source: str) -> list[ast.stmt]:
    """The statements of a cell, without IPython's magics."""
    return ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", source)).body


def plain(node) -> object:
    """A syntax tree as nested lists, the same in every version of Python, without docstrings."""
    if isinstance(node, list):
        return [plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, DEFINITIONS) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    kept = {name: value for name, value in fields.items() if name not in ("ctx", "kind", "type_comment", "type_params")}
    return [type(node).__name__, [[name, plain(value)] for name, value in kept.items() if value not in (None, [])]]


def names_in(node: ast.AST) -> set[str]:
    """The names that a statement uses."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def names_bound(statement: ast.stmt) -> set[str]:
    """The names that a statement defines at the top level of its cell or module."""
    if isinstance(statement, DEFINITIONS):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in statement.names}
    parts = [part for part in ast.walk(statement) if isinstance(part, ast.Name)]
    return {part.id for part in parts if isinstance(part.ctx, ast.Store)}


@cache
def module_statements(module: str) -> dict[str, ast.stmt]:
    """The top-level statements of a module of musekit by the names that they define."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        return {}
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    return {name: statement for statement in statements for name in names_bound(statement)}


def is_of_package(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("musekit")


class Digest:
    """Collects the statements that a cell's figure depends on."""

    def __init__(self):
        self.statements = {}  # id of the statement -> its tree

    def add(self, statement: ast.stmt, before: list[ast.stmt]):
        """A statement, and those of the notebook `before` it that define what it uses."""
        if id(statement) in self.statements:
            return
        self.statements[id(statement)] = plain(statement)
        for name in sorted(names_in(statement)):
            places = [place for place, earlier in enumerate(before) if name in names_bound(earlier)]
            if not places:
                continue
            definition = before[places[-1]]
            if is_of_package(definition):
                self.add_exported(definition.module, name, definition)
            elif not isinstance(definition, (ast.Import, ast.ImportFrom)):
                self.add(definition, before[: places[-1]])

    def add_exported(self, module: str, name: str, statement: ast.ImportFrom):
        """What a notebook imports from musekit, under the name that it has there."""
        original = next(alias.name for alias in statement.names if name == (alias.asname or alias.name))
        self.add_from(module, original)

    def add_from(self, module: str, name: str):
        """A definition of a module, and those of the same module that it uses."""
        statement = module_statements(module).get(name)
        if statement is None or id(statement) in self.statements or isinstance(statement, (ast.Import, ast.ImportFrom)):
            return
        self.statements[id(statement)] = plain(statement)
        for used in sorted(names_in(statement)):
            self.add_from(module, used)

    def value(self) -> str:
        return hashlib.sha256(repr(list(self.statements.values())).encode()).hexdigest()[:12]


def digests(notebook) -> dict[str, str]:
    """The digest of every cell with an image, by the cell's id."""
    before, result = [], {}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        statements = parse(cell.source)
        if images_of(cell):
            digest = Digest()
            for place, statement in enumerate(statements):
                digest.add(statement, before + statements[:place])
            result[cell.id] = digest.value()
        before += statements
    return result

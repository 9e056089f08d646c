"""The rooms: what may import what, and what an import costs."""
import ast
import re
import subprocess
import sys

import musekit
import pytest

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*/[0-9][0-9]_*.ipynb"))  # in the order of the book
PACKAGE = ROOT / "musekit"


ROOMS = ["utils", "core", "models", "data", "training", "inference", "evaluation", "shards", "recipes", "plots", "lab", "commands", "cli"]  # the ground first


def exported_from() -> dict[str, int]:
    """Module name -> place of its notebook in the book, in the order of folders and numbers."""
    names = [notebook.relative_to(ROOT / "nbs").as_posix() for notebook in NOTEBOOKS]
    places = {}
    for path in PACKAGE.rglob("*.py"):
        found = re.search(r"File to edit: \S*nbs/(\S+\.ipynb)", path.read_text(encoding="utf-8"))
        if found:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            places[module] = names.index(found[1])
    return places


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports_of(module: str) -> set[str]:
    """Modules of this package that a module imports, whatever the form of the statement."""
    path, names = (ROOT / module.replace(".", "/")).with_suffix(".py"), set()
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names |= {target} | {f"{target}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("musekit.")}


PLACES = exported_from()


def test_every_exporting_notebook_has_its_module():
    exporting = {place for place, path in enumerate(NOTEBOOKS) if "#| default_exp" in path.read_text(encoding="utf-8")}
    assert set(PLACES.values()) == exporting and len(PLACES) == len(exporting)


def test_every_module_is_in_a_room():
    assert {room_of(module) for module in PLACES} == set(ROOMS)


@pytest.mark.parametrize("module", PLACES)
def test_a_module_imports_only_downward(module):
    """From rooms below, and within its room from notebooks before its own."""
    for name in imports_of(module) & PLACES.keys():
        if room_of(name) == room_of(module):
            assert PLACES[name] < PLACES[module], f"{module} imports {name}, whose notebook comes later"
        else:
            assert ROOMS.index(room_of(name)) < ROOMS.index(room_of(module)), f"{module} imports {name}, from a room above"


@pytest.mark.parametrize("module", [module for module in PLACES if room_of(module) == "shards"])
def test_the_converter_stands_on_the_utilities_alone(module):
    assert {room_of(name) for name in imports_of(module) & PLACES.keys()} <= {"shards", "utils"}


def test_no_two_notebooks_share_a_number():
    numbers = [(path.parent.name[:2], path.name[:2]) for path in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers), numbers


def longest_function(path) -> tuple[int, str]:
    """Lines and name of the longest function of a file, a method counted as one."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return max(((node.end_lineno - node.lineno + 1, node.name) for node in functions), default=(0, ""))


@pytest.mark.parametrize("module", PLACES)
def test_functions_stay_short(module):
    path = (ROOT / module.replace(".", "/")).with_suffix(".py")
    lines, name = longest_function(path)
    assert lines <= 60, f"{name} has {lines} lines"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*(name for name in sys.modules if '.' not in name))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("statement", ["import musekit", "import musekit.cli"])
def test_import_is_instant(statement):
    assert not loaded_by(statement) & {"torch", "transformers", "accelerate", "numpy", "matplotlib", "sklearn"}


def test_the_face_of_the_package():
    assert {"Pipeline", "train", "load_config", "generate_ids", "MaskGitTransformer", "MaskGiTUViT", "VQGANModel"} <= set(dir(musekit))
    lazy = [name for name in dir(musekit) if name not in vars(musekit)]
    for name in lazy:
        assert getattr(musekit, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'; the nearest name is 'Pipeline'"):
        musekit.Pipelin


def test_the_version_is_that_of_the_settings():
    assert musekit.__version__ == re.search(r"^version = (.+)$", (ROOT / "settings.ini").read_text(), re.M)[1]


def test_package_needs_no_notebook_tools():
    everything = "; ".join(f"import {module}" for module in PLACES if not module.startswith("musekit.lab."))
    assert not loaded_by(everything) & {"nbdev", "fastcore", "execnb", "IPython", "jupyterlab"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_holds_small_outputs(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 300_000 and '"widgets"' not in text
    assert "widget-view+json" not in text, "a widget is no picture: run tests/still.py on the notebook"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_names_no_folder_of_a_machine(path):
    assert not re.search(r'/(tmp|home|root|Users)/', path.read_text(encoding="utf-8"))

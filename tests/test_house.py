"""The rooms: what may import what, and what an import costs."""
import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import musekit
import pytest

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*/[0-9][0-9]_*.ipynb"))  # in the order of the book
PACKAGE = ROOT / "musekit"
ROOMS = [  # the ground first
    "utils",
    "core",
    "models",
    "data",
    "training",
    "inference",
    "evaluation",
    "shards",
    "recipes",
    "plots",
    "lab",
    "commands",
    "cli",
]
ENTRY_POINTS = {"main"}  # the only name that may stand in two modules: each command has one


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


def path_of(module: str) -> Path:
    return (ROOT / module.replace(".", "/")).with_suffix(".py")


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


def imports_of(module: str) -> set[str]:
    """Modules of this package that a module imports, whatever the form of the statement."""
    names = set()
    package = module.split(".")[:-1]
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names |= {target} | {f"{target}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("musekit.")}


PLACES = exported_from()


def test_every_exporting_notebook_has_its_module():
    exporting = {
        place for place, path in enumerate(NOTEBOOKS) if "#| default_exp" in path.read_text(encoding="utf-8")
    }
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
            assert ROOMS.index(room_of(name)) < ROOMS.index(
                room_of(module)
            ), f"{module} imports {name}, from a room above"


@pytest.mark.parametrize("module", [module for module in PLACES if room_of(module) == "shards"])
def test_the_converter_stands_on_the_utilities_alone(module):
    assert {room_of(name) for name in imports_of(module) & PLACES.keys()} <= {"shards", "utils"}


def test_no_two_notebooks_share_a_number():
    numbers = [(path.parent.name[:2], path.name[:2]) for path in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers), numbers


def nodes_of(module: str, *kinds: type) -> list:
    return [node for node in ast.walk(tree_of(module)) if isinstance(node, kinds)]


def public_names(module: str) -> list[str]:
    """The module's `__all__`."""
    assignments = nodes_of(module, ast.Assign)
    return next(
        ast.literal_eval(node.value) for node in assignments if ast.unparse(node.targets[0]) == "__all__"
    )


def test_a_public_name_means_one_thing():
    modules_of = {}
    for module in PLACES:
        for name in public_names(module):
            modules_of.setdefault(name, []).append(module)
    shared = {name: modules for name, modules in modules_of.items() if len(modules) > 1}
    assert shared.keys() <= ENTRY_POINTS, shared


def test_private_names_stay_in_their_module():
    imports = [(module, node) for module in PLACES for node in nodes_of(module, ast.ImportFrom)]
    own = [(module, node) for module, node in imports if node.level or node.module.split(".")[0] == "musekit"]
    private = {
        (module, alias.name) for module, node in own for alias in node.names if re.match("_[^_]", alias.name)
    }
    assert not private


def test_functions_stay_short():
    """A method counts as one, with the functions in it."""
    functions = [
        (module, node)
        for module in PLACES
        for node in nodes_of(module, ast.FunctionDef, ast.AsyncFunctionDef)
    ]
    lengths = {f"{module}.{node.name}": node.end_lineno - node.lineno + 1 for module, node in functions}
    assert not {name: lines for name, lines in lengths.items() if lines > 60}


def long_lines(module: str) -> list[str]:
    """Lines of more than 110 columns, but for the `__all__` and the comments that nbdev writes."""
    text = path_of(module).read_text(encoding="utf-8")
    text = re.sub(r"^__all__ = \[[^\]]*\]$|^# %% [^\n]*$", "", text, flags=re.MULTILINE)
    return [line for line in text.splitlines() if len(line) > 110]


def test_lines_stay_short():
    assert not {module: long_lines(module) for module in PLACES if long_lines(module)}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_lines_of_tests_stay_short(path):
    assert not [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 110]


def lambdas_beside_calls(tree: ast.AST) -> list[int]:
    "Lines of the lambdas that are not an argument of a call: with a name, as a default or in a table."
    arguments = {
        id(value)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for value in (*call.args, *(keyword.value for keyword in call.keywords))
    }
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    return [node.lineno for node in nodes if id(node) not in arguments]


@pytest.mark.parametrize(
    "code",
    ["f = lambda x: x", "f: F = lambda x: x", "f = f or (lambda x: x)", "{1: lambda x: x}",
     "def f(g=lambda x: x): return g"],
)
def test_a_lambda_beside_a_call_is_noticed(code):
    assert lambdas_beside_calls(ast.parse(code)) == [1]
    assert not lambdas_beside_calls(ast.parse("f(lambda x: x, key=lambda x: x)"))


def test_a_lambda_is_an_argument():
    assert not [(module, lambdas_beside_calls(tree_of(module))) for module in PLACES
                if lambdas_beside_calls(tree_of(module))]


def test_a_module_is_about_one_thing():
    """A description of one line with two "and"s is about several."""
    descriptions = {module: ast.get_docstring(tree_of(module)) for module in PLACES}
    assert not [text for text in descriptions.values() if "\n" in text]
    several = {module for module, text in descriptions.items() if len(re.findall(r"\band\b", text)) > 1}
    assert not several


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*(name for name in sys.modules if '.' not in name))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


@pytest.mark.parametrize("statement", ["import musekit", "import musekit.cli"])
def test_import_is_instant(statement):
    assert not loaded_by(statement) & {
        "torch",
        "transformers",
        "accelerate",
        "numpy",
        "matplotlib",
        "sklearn",
    }


HEAVY = {"torch", "transformers", "accelerate", "matplotlib", "sklearn", "scipy"}


def test_a_pipeline_is_imported_with_torch_alone():
    loaded = loaded_by("from musekit.inference.pipeline import Pipeline")
    assert "torch" in loaded and not loaded & (HEAVY - {"torch"})


@pytest.mark.parametrize("arguments", [
    ["generate", "--mistyped"], ["genrate"],
    ["generate", "a three", "--model", "nofolder"], ["generate", "--again", "no.png"],
    ["train", "nofile.yaml"], ["check", "nofile.yaml"],
    ["train-tokenizer", "nofile.yaml"], ["encode", "nofile.yaml", "--out", "codes"],
    ["evaluate", "nofolder", "data=digits"], ["plot", "nofolder"], ["push", "nofolder", "a/b"],
], ids=" ".join)
def test_a_mistyped_name_is_refused_at_once(arguments):
    code = f"""import sys
from musekit.cli import main
try:
    status = main({arguments!r})
except SystemExit as end:
    status = end.code
print(status, *(name for name in sys.modules if '.' not in name))"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, *loaded = process.stdout.split()
    assert status == "2" and not HEAVY & set(loaded)


def test_the_face_of_the_package():
    assert {
        "Pipeline",
        "train",
        "load_config",
        "generate_ids",
        "MaskGitTransformer",
        "MaskGiTUViT",
        "VQGANModel",
    } <= set(dir(musekit))
    lazy = [name for name in dir(musekit) if name not in vars(musekit)]
    for name in lazy:
        assert getattr(musekit, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'. Did you mean 'Pipeline'"):
        musekit.Pipelin
    with pytest.raises(ImportError, match="name 'Pipelin' from 'musekit'. Did you mean 'Pipeline'"):
        from musekit import Pipelin  # noqa: F401
    from musekit import plots  # a module, not one of the names

    assert plots.__name__ == "musekit.plots"


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
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(tmp|home|root|Users)/", text)
    assert not re.search(r"(?<![\w.])/[\w./-]+\.py:\d+: ", text), "a warning names the place of the package"

"""Each figure in a notebook comes from the code as it is now, and can be read."""
import ast
import base64
import io
import shutil

import figures
import nbformat
import pytest
from conftest import ROOT
from PIL import Image

NAMES = [path.relative_to(ROOT).as_posix() for path in figures.notebooks()]


@pytest.mark.parametrize("name", NAMES)
def test_no_figure_is_stale(name):
    stale = figures.stale_cells(figures.read(ROOT / name))
    assert not stale, (
        f"the figures of cells {', '.join(stale)} are older than their code: python tests/figures.py --write"
        f" {name}"
    )


@pytest.mark.parametrize("name", NAMES)
def test_figures_have_at_least_100_dots_per_inch(name):
    coarse = figures.coarse_cells(figures.read(ROOT / name))
    assert (
        not coarse
    ), f"the figures of cells {', '.join(coarse)} are coarse: set figure.dpi to 100 and execute {name} again"


def png(**options) -> str:
    file = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(file, "PNG", **options)
    return base64.b64encode(file.getvalue()).decode()


def notebook(*sources: str, image: str | None = None):
    """A notebook of code cells, the last one with an image."""
    cells = [nbformat.v4.new_code_cell(source, id=f"cell{number}") for number, source in enumerate(sources)]
    cells[-1].outputs = [nbformat.v4.new_output("display_data", data={"image/png": image or png()})]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small project with a module that draws, one that it calls, and one that nothing follows."""
    for name in ("nbs", "musekit/data"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "musekit/data/grids.py").write_text("def frame(x): return x\n")
    (tmp_path / "musekit/data/rows.py").write_text("def read(x): return x\n")
    (tmp_path / "musekit/show.py").write_text(
        "from .data.grids import frame\nfrom .data.rows import read\n\ndef _line(x): return x + 1\n\n"
        "def plot(x):\n    'A figure.'\n    return frame(_line(read(x)))\n\ndef other(x): return x\n")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    figures.module_definitions.cache_clear()
    yield tmp_path
    figures.module_definitions.cache_clear()


CELLS = (
    "from musekit.show import plot\nimport math",
    "def double(x):\n    return 2 * x",
    "double(1)\nplot(2)",
)


def digest(*sources: str) -> str:
    figures.module_definitions.cache_clear()
    return figures.digests(notebook(*sources))["cell2"]


def test_the_digest_follows_the_code_that_draws_and_nothing_else(project):
    first = digest(*CELLS)
    assert (
        digest(
            CELLS[0],
            'def double(x):  # twice\n    "Twice."\n    return (2*x)',
            "double( 1 )\n\n# two\nplot(2)",
        )
        == first
    )
    assert digest(CELLS[0], CELLS[1] + "\n\ndef unused(): pass", CELLS[2]) == first
    assert digest(CELLS[0], CELLS[1], "double(1)\nplot(3)") != first
    assert digest(CELLS[0], CELLS[1].replace("2 *", "3 *"), CELLS[2]) != first


@pytest.mark.parametrize("file, old, new, follows", [
    ("show.py", "'A figure.'", "'The figure.'", False),
    ("show.py", "def other(x): return x", "def other(x): return -x", False),
    ("show.py", "x + 1", "x + 2", True),  # a helper in the same module
    ("data/grids.py", "return x", "return -x", True),  # a module that draws for others
    ("data/rows.py", "return x", "return -x", False),
])
def test_the_digest_follows_functions_of_the_package(project, file, old, new, follows):
    first = digest(*CELLS)
    path = project / "musekit" / file
    path.write_text(path.read_text().replace(old, new))
    assert (digest(*CELLS) != first) == follows


def test_an_exported_cell_counts_as_its_module_does(project):
    (project / "musekit/own.py").write_text("from .data.rows import read\n\ndef draw(x): return read(x)\n")
    own = (
        "#| default_exp own",
        "#| export\nfrom musekit.data.rows import read\n\ndef draw(x):\n    return read(x)",
        "draw(1)",
    )
    first = digest(*own)
    (project / "musekit/data/rows.py").write_text("def read(x): return -x\n")
    assert digest(*own) == first
    (project / "musekit/own.py").write_text("def draw(x): return 0\n")
    assert digest(*own) != first


def test_a_stale_figure_is_listed_and_drawn_again(project, capsys, monkeypatch):
    path = project / "nbs" / "drawn.ipynb"
    draw = "from PIL import Image\nImage.new('RGB', (8, 8), 'red')"
    nbformat.write(notebook("1", draw), path)
    run = lambda *words: monkeypatch.setattr("sys.argv", ["figures.py", *words]) or figures.main()
    assert run() == 1 and "nbs/drawn.ipynb: the figure of cell cell1 is stale" in capsys.readouterr().out
    assert run("--write") == 0
    (_, data), = figures.images_of(figures.read(path)["cells"][1])  # no JPEG beside the PNG
    assert figures.opened(data).convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert run() == 0 and figures.stale_cells(figures.read(path)) == []
    path.write_text(path.read_text().replace("'red'", "'blue'"))
    assert run() == 1
    assert run("--stamp", str(path)) == 0 and run() == 0


def test_coarse_figures_are_named_and_large_ones_get_a_palette():
    assert figures.coarse_cells(notebook("1", image=png(dpi=(90, 90)))) == ["cell0"]
    assert (
        figures.coarse_cells(notebook("1", image=png(dpi=(100, 100))))
        == figures.coarse_cells(notebook("1"))
        == []
    )
    large = Image.effect_noise((64, 64), 90).convert("RGB")
    file = io.BytesIO()
    large.save(file, "PNG", dpi=(100, 100))
    smaller = figures.opened(figures.with_palette(base64.b64encode(file.getvalue()).decode()))
    assert smaller.mode == "P" and smaller.size == (64, 64) and round(smaller.info["dpi"][0]) == 100


def test_empty_parts_of_an_f_string_do_not_count():
    """Python 3.12 leaves an empty string after a nested width, as in f"{name:<{width}}"."""
    plain, nested = (ast.parse('f"{name:<{width}}"').body[0] for _ in range(2))
    nested.value.values[0].format_spec.values.append(ast.Constant(value=""))
    assert figures.plain(nested) == figures.plain(plain)
    nested.value.values[0].format_spec.values.append(ast.Constant(value="d"))
    assert figures.plain(nested) != figures.plain(plain)


def test_stored_outputs_do_not_name_the_folder_of_the_project(project):
    path = project / "nbs" / "one.ipynb"
    made = notebook(*CELLS)
    warning = f"{project}/musekit/show.py:3: UserWarning: a warning"
    made.cells[0].outputs = [nbformat.v4.new_output("stream", name="stderr", text=warning)]
    nbformat.write(made, path)
    figures.stamp(path)
    stored = figures.read(path)["cells"][0]["outputs"][0]["text"]
    assert stored == ["musekit/show.py:3: UserWarning: a warning"]

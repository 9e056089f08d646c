"""Checks that nbdev_clean and nbdev_export would change nothing that README.md is the index notebook's,
and that links lead somewhere; exits 1 otherwise."""
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from readme import ROOT, render

BIN = Path(sys.executable).parent


def contents(root: Path) -> dict[str, bytes]:
    """Every notebook and module below `root`."""
    files = [*(root / "nbs").rglob("*.ipynb"), *(root / "musekit").rglob("*.py")]
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(files)}


def changed_by(*commands: str) -> list[str]:
    """Files that these commands would change, found on a copy of the project."""
    with tempfile.TemporaryDirectory() as folder:
        copy, ignore = Path(folder) / "musekit", shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        for name in ("nbs", "musekit"):
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        for name in ("settings.ini", "setup.py", "README.md"):
            shutil.copy(ROOT / name, copy / name)
        before = contents(copy)
        for command in commands:
            subprocess.run([BIN / command], cwd=copy, check=True)
        after = contents(copy)
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def markdown_of(path: Path) -> str:
    """The text of a Markdown file, or of a notebook's Markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join(
        "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
    )


def anchors_of(path: Path) -> set[str]:
    """The ids of a page's headings, as JupyterLab and GitHub make them from a notebook."""
    titles = re.findall(r"^#+ (.+)$", markdown_of(path), flags=re.MULTILINE)
    return {title.replace("`", "").replace(" ", "-") for title in titles}


def broken_links() -> list[str]:
    """Relative links of README.md and of the notebooks that lead to no file, or to no heading of it."""
    broken = []
    for page in [ROOT / "README.md", *sorted((ROOT / "nbs").rglob("*.ipynb"))]:
        for link, target, _, anchor in re.findall(r"\]\((([^)#:\s]*)(#([^)\s]*))?)\)", markdown_of(page)):
            path = page.parent / target if target else page
            if not path.exists() or anchor and anchor not in anchors_of(path):
                broken.append(f"{page.relative_to(ROOT)} links to {link}, which is not there")
    return broken


def main() -> int:
    problems = [f"nbdev_clean would change {name}" for name in changed_by("nbdev_clean")]
    problems += [f"nbdev_export would change {name}" for name in changed_by("nbdev_export")]
    if (ROOT / "README.md").read_text(encoding="utf-8") != render():
        problems.append("README.md is not what nbs/index.ipynb gives: run `make readme`")
    problems += broken_links()
    print("\n".join(problems) or "notebooks clean, package and README in sync")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())

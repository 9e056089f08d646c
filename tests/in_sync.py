"""Checks that nbdev_clean and nbdev_export would change nothing and that README.md is the index notebook's; exits 1 otherwise."""
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


def broken_links() -> list[str]:
    """Relative links of README.md that lead nowhere."""
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    return [link for link in links if not (ROOT / link).exists()]


def main() -> int:
    problems = [f"nbdev_clean would change {name}" for name in changed_by("nbdev_clean")]
    problems += [f"nbdev_export would change {name}" for name in changed_by("nbdev_export")]
    if (ROOT / "README.md").read_text(encoding="utf-8") != render():
        problems.append("README.md is not what nbs/index.ipynb gives: run `make readme`")
    problems += [f"README.md links to {link}, which is not there" for link in broken_links()]
    print("\n".join(problems) or "notebooks clean, package and README in sync")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())

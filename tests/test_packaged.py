"""The small model in the package: its size, its score, drawing with it from a wheel outside the checkout."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT
from musekit.data.digits import test_prompts as held_out_prompts
from musekit.evaluation.digits import DigitJudge
from musekit.inference.pipeline import Pipeline
from musekit.recipes.demo import judge_prompts

FOLDER = ROOT / "musekit" / "pretrained" / "digits"
PROMPT = "a blue three on yellow paper"
NOT_MADE = "musekit/pretrained/digits is not made yet: see nbs/07_recipes/08_demo.ipynb"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=NOT_MADE)


def test_it_is_small_and_whole():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    card = (FOLDER / "README.md").read_text()
    results = json.loads((FOLDER / "results.json").read_text())
    assert results["prompts"] == 400 and results["overall"]["joint"] >= 0.98
    assert "| command | `musekit demo" in card and f"| seed | {results['seed']} |" in card
    assert f"| overall.joint | {results['overall']['joint']:.4g} |" in card


def test_its_score_holds():
    prompts = held_out_prompts(100)
    score = judge_prompts(Pipeline.from_pretrained(), DigitJudge(), prompts, seed=1)
    assert score["overall"]["count"] == 100 and score["overall"]["joint"] >= 0.95, score["overall"]


def test_it_draws_from_a_wheel_outside_the_checkout(tmp_path):
    source, wheels, site, place = (tmp_path / name for name in ("source", "wheels", "site", "place"))
    shutil.copytree(ROOT / "musekit", source / "musekit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "settings.ini", "README.md"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    make = [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", wheels, source]
    subprocess.run(make, check=True)
    subprocess.run([*pip, "install", *offline, "--target", site, *wheels.glob("*.whl")], check=True)
    place.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def python(*arguments):
        options = {"cwd": place, "env": environment, "capture_output": True, "text": True}
        return subprocess.run([sys.executable, *arguments], **options)

    imported = python("-c", "import musekit; print(musekit.__file__)").stdout.strip()
    assert Path(imported).parent == site / "musekit"
    drawn = python("-m", "musekit", "generate", PROMPT, "--num-images", "2")
    assert (drawn.returncode, drawn.stdout) == (0, "generated.png\n"), drawn.stderr
    assert drawn.stderr == "musekit: model: digits, the one in the package\n"
    again = python("-m", "musekit", "generate", "--again", "generated.png", "--out", "again.png")
    assert again.returncode == 0, again.stderr
    images = [Image.open(place / name).tobytes() for name in ("again.png", "generated.png")]
    assert images[0] == images[1]

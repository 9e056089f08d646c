"""What `make test-lab` does where there is no browser; with one it is a test itself."""
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from musekit.lab import live
from toy_training import tiny_trainer, write_data


def run_lab(path, *options):
    return subprocess.run(
        [sys.executable, "tests/lab.py", "01_core/02_masking", *options],
        cwd=ROOT,
        env={**os.environ, "PATH": str(path)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("options, message", (((), "make test-lab"), (("--install",), "no apt-get")))
def test_without_a_browser_one_line_says_what_to_install(tmp_path, options, message):
    done = run_lab(tmp_path, *options)
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    assert "chromium and chromium-driver" in done.stderr and message in done.stderr


def test_what_is_missing_is_asked_of_apt_get(tmp_path):
    "A stand-in notes what it is called with and fails, as without a network."
    for name in ("apt-get", "sudo", "chromium"):
        (tmp_path / name).write_text(
            f'#!/bin/sh\n[ {name} = sudo ] && exec "$@"\necho "$@" >> {tmp_path}/asked\n[ "$2" = update ]\n'
        )
        (tmp_path / name).chmod(0o755)
    done = run_lab(tmp_path, "--install")
    assert (tmp_path / "asked").read_text().splitlines() == [
        "--quiet=2 update",
        "--quiet=2 install --yes --no-install-recommends chromium-driver",
    ]
    assert done.returncode == 1 and "apt-get install failed" in done.stderr


THREADS = """
import os, time, torch
from musekit.lab.live import _end_helper_threads
torch.set_num_threads(3)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
torch.rand(1000, 1000).exp().sum()
during = count()
_end_helper_threads()
end = time.monotonic() + 5
while count() > during - 2 and time.monotonic() < end:
    time.sleep(0.01)  # an ended thread stays listed for a moment
print(before, during, count(), float(torch.ones(1000, 1000).sum()))
"""


@pytest.mark.skipif(
    not list(Path(torch.__file__).parent.glob("lib/libgomp*")) or not Path("/proc/self/task").is_dir(),
    reason="needs Linux and GNU's OpenMP",
)
def test_a_run_in_the_background_does_not_share_the_processors_with_idle_helpers():
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    before, during, after, result = map(float, done.stdout.split())
    assert during >= before + 2 and after <= during - 2 and result == 1e6


def test_a_watched_run_pauses_the_helpers_of_the_thread_that_starts_it(tmp_path, monkeypatch):
    paused = []
    monkeypatch.setattr(
        live, "_end_helper_threads", lambda: paused.append((threading.current_thread().name, panel.running))
    )
    panel = live.LiveTraining(
        tiny_trainer(
            tmp_path / "run", write_data(tmp_path / "data.safetensors"), "training.max_train_steps=1"
        )
    )
    panel.resume()
    panel.wait()
    panel.close()
    assert paused == [("MainThread", False)]

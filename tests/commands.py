"""The commands as people type them, and photos to train on."""
import os
import subprocess
import sys

from musekit.data.digits import COMBINATIONS, WORDINGS, make_samples
from toy_training import free_port

TINY = [  # options of a run of seconds
    "model.vq_model.params.c_hidden=16",
    "model.vq_model.params.codebook_size=32",
    "model.vq_model.train.steps=10",
    "model.text_encoder.train.steps=5",
    "model.text_encoder.train.layers=1",
    "model.transformer.hidden_size=32",
    "model.transformer.num_hidden_layers=1",
    "model.transformer.intermediate_size=64",
    "training.max_train_steps=10",
    "training.batch_size=8",
    "training.generation_timesteps=2",
    "lr_scheduler.params.warmup_steps=2",
    "experiment.log_every=1",
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "110", "HF_HUB_OFFLINE": "1"}


def musekit(folder, *arguments, launcher=(), **environment):
    """Runs a command in `folder` in a process of its own; returns the finished process."""
    command = [sys.executable, *launcher, "-m", "musekit", *map(str, arguments)]
    options = {"env": ENVIRONMENT | environment, "capture_output": True, "text": True, "timeout": 120}
    return subprocess.run(command, cwd=folder, **options)


def launch_two(folder, *arguments):
    """The same command in two processes, as torchrun starts them."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    return musekit(folder, *arguments, launcher=launcher, ACCELERATE_USE_CPU="true")


def assert_refused(process, *parts):
    """One line on standard error that contains all `parts`, exit status 2."""
    assert process.returncode == 2, process
    assert process.stderr.startswith("musekit") and process.stderr.count("\n") == 1, process.stderr
    for part in parts:
        assert part in process.stderr


def some_digits(indices):
    every_wording = set(range(len(WORDINGS)))
    return make_samples(indices, 1, set(COMBINATIONS), lambda *combination: every_wording, seed=0)


def make_photos(folder, count=40):
    folder.mkdir(parents=True)
    for number, sample in enumerate(some_digits(range(count))):
        sample["image"].save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(sample["text"])
    return folder

"""A run that is killed again and again ends with the same bits as one that never was."""
import json
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from children import CHILDREN
import musekit.training.callbacks as callbacks_module
import musekit.training.checkpoint as resume_module
from musekit.training.callbacks import Callback, Checkpoint, Log
from musekit.training.log import read_log
from musekit.utils.files import PARTIAL
from musekit.training.checkpoint import checkpoints
from toy_training import SAVE_EVERY, STEPS, DieAt, die, tiny_trainer, write_data


def die_instead_of(module, name, times=0):
    "Replaces a function by one that kills the process at its call after `times` good ones."
    original, calls = getattr(module, name), []

    def fatal(*args, **kwargs):
        calls.append(1)
        if len(calls) > times:
            die()
        return original(*args, **kwargs)

    setattr(module, name, fatal)


def live(folder, data, moment):
    "One life of the run: up to the end, or to the moment of its death."
    usual = [Log(2), Checkpoint(SAVE_EVERY, limit=2)]
    kind, _, step = moment.partition(" ")
    if kind == "step":
        usual.insert(1, DieAt(int(step)))
    elif kind == "after-saving":
        usual.append(DieAt(int(step)))
    elif kind == "slow":
        usual.append(Slow())
    elif kind == "while-writing":
        die_instead_of(resume_module, "save_ema")
    elif kind == "before-rename":
        die_instead_of(callbacks_module, "publish")
    elif kind == "before-removal":
        die_instead_of(callbacks_module, "keep_newest")
    tiny_trainer(folder, data, callbacks=usual).fit()


class Slow(Callback):
    def on_step(self, trainer):
        time.sleep(0.2)


def run(folder, data, moment=""):
    child = CHILDREN.Process(target=live, args=(str(folder), str(data), moment))
    child.start()
    if moment == "slow":  # killed from outside, at whatever point it is
        while child.is_alive() and max((line["step"] for line in read_log(folder)), default=0) < 10:
            time.sleep(0.05)
        child.kill()
    child.join(120)
    return child.exitcode


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "train.parquet")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, data) == 0
    return folder


MOMENTS = ["step 2", "while-writing", "step 5", "before-rename", "after-saving 6", "before-removal", "slow"]


def test_killed_run_equals_uninterrupted(whole, data, tmp_path):
    for moment in MOMENTS:
        assert run(tmp_path, data, moment) == -signal.SIGKILL, moment
        for checkpoint in checkpoints(tmp_path):  # complete or absent
            assert json.loads((checkpoint / "trainer_state.json").read_text())["step"] == int(
                checkpoint.name.split("-")[1]
            )
            assert load_file(checkpoint / "ema_model" / "model.safetensors")
    assert run(tmp_path, data) == 0

    for name in (
        "model.safetensors",
        f"checkpoint-{STEPS}/model.safetensors",
        f"checkpoint-{STEPS}/ema_model/model.safetensors",
        f"checkpoint-{STEPS}/unwrapped_model/model.safetensors",
    ):
        ours, theirs = load_file(tmp_path / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert [p.name for p in checkpoints(tmp_path)] == [
        f"checkpoint-{STEPS - SAVE_EVERY}",
        f"checkpoint-{STEPS}",
    ]
    assert not list(tmp_path.glob(f"{PARTIAL}*"))
    pick = lambda folder: [(line["step"], line["loss"], line["learning_rate"]) for line in read_log(folder)]
    assert pick(tmp_path) == pick(whole)


def test_resumed_run_never_passes_the_last_step(whole, data):
    before = read_log(whole)
    assert run(whole, data) == 0
    assert read_log(whole) == before
    assert checkpoints(whole)[-1].name == f"checkpoint-{STEPS}"


def test_paths(whole, data, tmp_path):
    end = f"training.max_train_steps={STEPS}"
    trainer = tiny_trainer(
        tmp_path / "a",
        data,
        end,
        f"experiment.resume_from_checkpoint={whole}/checkpoint-{STEPS}/",
        callbacks=[],
    )
    assert trainer.fit().step == STEPS
    with pytest.raises(FileNotFoundError, match="checkpoint-999"):
        tiny_trainer(
            tmp_path / "b", data, "experiment.resume_from_checkpoint=checkpoint-999", callbacks=[]
        ).fit()

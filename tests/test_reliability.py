"""What happens to runs that go on for weeks: they are killed, asked to stop, run out of disk, meet broken
data."""
import io
import json
import os
import random
import resource
import signal
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from children import CHILDREN
from musekit.data.image_text import ImageTextConfig, make_loader
from musekit.utils.files import PARTIAL
from musekit.training.callbacks import Callback, Checkpoint, Log
from musekit.training.checkpoint import checkpoints
from musekit.training.log import read_log
from toy_training import SAVE_EVERY, RandomEncoder, all_weights, die, tiny_trainer, write_data

KILLS, LONG, SHORT = 20, 60, 18


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "train.parquet")


def make_trainer(folder, data, steps, *more):
    "A run with a checkpoint every three steps."
    length = f"training.max_train_steps={steps}", "training.gradient_accumulation_steps=1"
    return tiny_trainer(folder, data, *length, callbacks=[Log(2), *more, Checkpoint(SAVE_EVERY, limit=2)])


def start(function, *arguments):
    child = CHILDREN.Process(target=function, args=arguments)
    child.start()
    return child


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "The folders of runs that nothing disturbed."
    folder = tmp_path_factory.mktemp("whole")
    for steps in (SHORT, LONG):
        make_trainer(folder / str(steps), data, steps).fit()
    return folder


def ends_like(whole, folder, data, steps):
    "Whether the run in a folder, gone on with, ends with the bits of the undisturbed one."
    make_trainer(folder, data, steps).fit()
    last = f"checkpoint-{steps}"
    names = (
        "model.safetensors",
        f"{last}/model.safetensors",
        f"{last}/ema_model/model.safetensors",
        f"{last}/unwrapped_model/model.safetensors",
    )
    pairs = [(load_file(folder / name), load_file(whole / str(steps) / name)) for name in names]
    return all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        for ours, theirs in pairs
    )


def steps_saved(folder):
    "Steps of the checkpoints, each of which is whole."
    for checkpoint in checkpoints(folder):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert state["step"] == int(checkpoint.name.split("-")[1])
        assert load_file(checkpoint / "ema_model" / "model.safetensors") and load_file(
            checkpoint / "model.safetensors"
        )
    return [int(checkpoint.name.split("-")[1]) for checkpoint in checkpoints(folder)]


# Killed


def dies_at_event(folder, data, number):
    """Dies at a use of a file of the run: opened, renamed, made, removed. A checkpoint has about forty of
    them."""
    seen = [0]

    def watch(name, arguments):
        if name in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(folder) in str(
            arguments[0]
        ):
            seen[0] += 1
            if seen[0] == number:
                die()

    trainer = make_trainer(folder, data, LONG)
    sys.addaudithook(watch)
    trainer.fit()


class Tell(Callback):
    "Tells the parent that a step was taken, and gives it time to kill."

    def __init__(self, begun):
        super().__init__()
        self.begun = begun

    def on_step(self, trainer):
        self.begun.set()
        time.sleep(0.1)


def tells(folder, data, steps, begun):
    make_trainer(folder, data, steps, Tell(begun)).fit()


def begin(folder, data, steps):
    begun = CHILDREN.Event()
    child = start(tells, str(folder), str(data), steps, begun)
    assert begun.wait(120)
    return child


def test_killed_at_twenty_random_moments(data, whole, tmp_path):
    """Ten times at a random use of a file, mostly of a checkpoint that is being written, ten times at a
    random time."""
    rng, exits, half_written, saved = random.Random(0), [], 0, []
    for number in range(KILLS):
        if number % 2:
            child = begin(tmp_path, data, LONG)
            time.sleep(rng.uniform(0, 0.6))
            child.kill()
        else:
            child = start(dies_at_event, str(tmp_path), str(data), rng.randint(1, 70))
        child.join(120)
        exits.append(child.exitcode)
        half_written += bool(list(tmp_path.glob(f"{PARTIAL}checkpoint-*")))
        before, saved = saved, steps_saved(tmp_path)
        assert max(saved, default=0) >= max(before, default=0)  # nothing that was complete is lost
    assert exits == [-signal.SIGKILL] * KILLS and half_written >= 4, (exits, half_written)
    assert saved and saved[-1] < LONG
    assert ends_like(whole, tmp_path, data, LONG)
    pick = lambda folder: [(line["step"], line["loss"], line["learning_rate"]) for line in read_log(folder)]
    assert pick(tmp_path) == pick(whole / str(LONG))
    print(f"{KILLS} kills, {half_written} of them with a checkpoint half written, up to step {saved[-1]}")


# Asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_on_sigterm_it_saves(data, whole, tmp_path, number):
    rng, before = random.Random(int(number)), 0
    for _ in range(3):
        child = begin(tmp_path, data, SHORT)
        time.sleep(rng.uniform(0, 0.4))
        os.kill(child.pid, number)
        child.join(120)
        assert child.exitcode == 0 and not list(tmp_path.glob(f"{PARTIAL}*"))
        assert (
            steps_saved(tmp_path)[-1] > before
        )  # the steps of this life are kept, though none may have been due
        before = steps_saved(tmp_path)[-1]
    assert ends_like(whole, tmp_path, data, SHORT)


# No room


class NoRoom(Callback):
    "From a step on, no file may grow beyond some bytes, as on a full disk: writing more is an error."

    def __init__(self, step, room):
        super().__init__()
        self.step, self.room = step, room

    def on_step(self, trainer):
        if trainer.step == self.step:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, resource.RLIM_INFINITY))


def fills(folder, data, room, pipe):
    try:
        make_trainer(folder, data, SHORT, NoRoom(8, room)).fit()
    except OSError as error:
        pipe.send(str(error))


@pytest.mark.parametrize(
    "room", [20_000, 120_000, 300_000]
)  # too little for weights, for the optimizer's state, ...
def test_no_room_for_a_checkpoint(data, whole, tmp_path, room):
    ours, theirs = CHILDREN.Pipe()
    child = start(fills, str(tmp_path), str(data), room, theirs)
    child.join(120)
    assert ours.poll(), "it did not fail"
    message = ours.recv()
    assert (
        "checkpoint-9 could not be written" in message
        and f"Last good checkpoint: {tmp_path}/checkpoint-6" in message
        and "\n" not in message
    )
    assert steps_saved(tmp_path) == [3, 6] and not list(tmp_path.glob(f"{PARTIAL}*"))
    assert ends_like(whole, tmp_path, data, SHORT)


# A loss that is no number


def test_a_loss_that_is_no_number_names_its_examples(data, tmp_path):
    trainer = tiny_trainer(tmp_path, data, callbacks=[Log(2), Checkpoint(SAVE_EVERY)])
    loss, seen = trainer.loss, []

    def broken(model, micro, *arguments):
        seen.append(micro.keys)
        return loss(model, micro, *arguments) * (
            float("nan") if len(seen) == 14 else 1.0
        )  # the second half of step 7

    trainer.loss = broken
    with pytest.raises(ValueError, match="loss of step 7 is not finite") as failure:
        trainer.fit()
    assert str([seen[-1]]) in str(failure.value) and str(seen[-2]) not in str(failure.value)
    assert f"Last good checkpoint: {tmp_path}/checkpoint-6" in str(failure.value)
    assert trainer.step == 6 and all_weights(trainer).isfinite().all()


def test_a_gradient_that_is_no_number_moves_nothing(data, tmp_path):
    trainer = make_trainer(tmp_path, data, SHORT)
    parameter = next(trainer.network.parameters())
    parameter.register_hook(lambda gradient: gradient * (float("inf") if trainer.step == 4 else 1.0))
    with pytest.raises(ValueError, match="gradient of step 5 is not finite.*checkpoint-3"):
        trainer.fit()
    assert trainer.step == 4 and all_weights(trainer).isfinite().all()


# Broken data


def picture(number):
    drawn = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), number % 256, np.uint8)).save(drawn, "JPEG")
    return drawn.getvalue()


FAULTS = {
    "truncated image": {"jpg": picture(0)[:300]},
    "no image at all": {"jpg": b"not an image"},
    "wrong json": {"json": b"{oops"},
    "json without an object": {"json": b"[1]"},
    "text that is no text": {"txt": b"\xff\xfe\xfa"},
    "empty caption": {"txt": b"  \n"},
    "no caption": {"txt": None},
    "empty file": {"jpg": b""},
}


def write_shard(path, count, faults=()):
    "A shard of `count` good samples, with broken ones in between."
    samples = [(f"good-{n:03d}", {}) for n in range(count)]
    for place, fault in enumerate(faults):
        samples.insert(2 * place + 1, (f"bad-{fault.replace(' ', '-')}", FAULTS[fault]))
    with tarfile.open(path, "w") as tar:
        for number, (key, changes) in enumerate(samples):
            members = {"jpg": picture(number), "txt": f"picture {number}".encode(), "json": b"{}"} | changes
            for extension, content in members.items():
                if content is not None:
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(path)


def train_on_shards(folder, urls, data, **options):
    "Trains on images whose tokens are made up; gives the lines of the log."
    reading = ImageTextConfig(resolution=32, batch_size=4, shuffle_buffer_size=8, **options)
    encode, numbers = RandomEncoder(), iter(range(10**6))
    prepare = lambda batch: encode({**batch, "number": next(numbers)})
    trainer = tiny_trainer(
        folder,
        data,
        "training.max_train_steps=20",
        "experiment.log_every=5",
        callbacks=[Log(5), Checkpoint(100)],
    )
    trainer.data, trainer.prepare = (
        lambda start: make_loader(urls, reading, training=True, start_batch=start),
        prepare,
    )
    trainer.fit()
    return [line for line in read_log(folder) if "loss" in line]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_skipped_counted_and_reported(data, tmp_path, workers):
    urls = [write_shard(tmp_path / "00.tar", 40, FAULTS)]
    kept = [
        key
        for batch in make_loader(urls, ImageTextConfig(resolution=32, max_bad_share=0.5), training=False)
        for key in batch["keys"]
    ]
    assert kept == [f"good-{n:03d}" for n in range(40)]
    lines = train_on_shards(tmp_path / "run", urls, data, max_bad_share=0.5, num_workers=workers)
    skipped = [line["skipped"] for line in lines]
    assert len(lines) == 4 and skipped == sorted(skipped) and skipped[-1] >= len(FAULTS)


def test_a_tar_that_ends_early_is_counted(data, tmp_path):
    whole, cut = write_shard(tmp_path / "00.tar", 40), write_shard(tmp_path / "01.tar", 40)
    content = open(cut, "rb").read()
    open(cut, "wb").write(content[: len(content) // 2 + 100])
    junk = tmp_path / "02.tar"
    junk.write_bytes(b"this is no tar" * 1000)
    lines = train_on_shards(tmp_path / "run", [whole, cut, str(junk)], data, max_bad_share=0.5)
    assert lines[-1]["skipped"] > 0 and lines[-1]["step"] == 20


def test_more_broken_samples_than_allowed_are_an_error(data, tmp_path):
    urls = [write_shard(tmp_path / "00.tar", 24, FAULTS)]
    with pytest.raises(
        ValueError, match=r"could not be used, more than max_bad_share=0.1 allows; the last: "
    ):
        train_on_shards(tmp_path / "run", urls, data, max_bad_share=0.1)

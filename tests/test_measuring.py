"""A run that compares its own images with held-out ones on the way, as `musekit evaluate` does
afterwards."""
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from musekit.data.packing import write_shards
from musekit.recipes.text_to_image import MEASURED, Measurement, train
from musekit.recipes.configure import configure, validate
from musekit.training.log import read_log
from commands import some_digits
from small_models import save_frozen_networks
from toy_training import free_port


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Digits as shards, and two networks that were never trained."
    folder = tmp_path_factory.mktemp("measuring")
    write_shards(some_digits(range(40)), folder / "train")
    write_shards(some_digits(range(1000, 1060)), folder / "test")
    save_frozen_networks(folder)
    return folder


def settings(place, name, *more):
    return [
        f"experiment.output_dir={place}/runs/{name}",
        f"model.vq_model.pretrained={place}/vq",
        f"model.text_encoder.pretrained={place}/clip",
        "model.transformer.hidden_size=32",
        "model.transformer.num_hidden_layers=1",
        "model.transformer.num_attention_heads=2",
        "model.transformer.intermediate_size=32",
        "dataset.preprocessing.max_seq_length=12",
        "training.batch_size=8",
        "training.max_train_steps=4",
        "training.generation_timesteps=2",
        "lr_scheduler.params.warmup_steps=1",
        "experiment.log_every=1",
        "experiment.eval_every=null",
        "experiment.generate_every=null",
        "experiment.save_every=null",
        "experiment.measure_every=3",
        "experiment.measure_samples=20",
        *more,
    ]


DIGITS = (
    "data=digits",
    "dataset.params.eval_shards_path_or_url=digits",
    "experiment.max_eval_examples=60",
    "training.encode_first=false",
)


def test_a_run_measures_itself(place):
    "Every three steps and at the end, with averaged weights, and as a second look at the same weights finds."
    statistics = f"experiment.measure_statistics={place}/real.safetensors"
    run = train(configure(None, settings(place, "digits", *DIGITS, statistics)), progress=False)
    lines = [line for line in read_log(run.folder) if "frechet_distance" in line]
    assert [line["step"] for line in lines] == [3, 4] and all(set(MEASURED) <= set(line) for line in lines)
    assert (place / "real.safetensors").is_file() and 1 <= lines[-1]["inception_score"] <= 10
    again = Measurement(run.recipe, run.batches)(run.trainer)
    assert again == {name: pytest.approx(lines[-1][name]) for name in MEASURED}


def test_two_processes_draw(place):
    words = settings(place, "two", *DIGITS)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "-m",
        "musekit",
        "train",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in read_log(place / "runs" / "two") if "frechet_distance" in line]
    assert [line["step"] for line in lines] == [3, 4] and all(set(MEASURED) <= set(line) for line in lines)


SHARDS = "data={place}/train", "dataset.params.eval_shards_path_or_url={place}/test"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            [*SHARDS],
            "experiment.measure_features=None is for digits only; set it to inception=FILE or clip=FOLDER",
        ),
        ([*SHARDS, "experiment.measure_features=digits"], "is for digits only"),
        ([*SHARDS, "experiment.measure_features=inception=nowhere.pth"], "no file nowhere.pth"),
        ([*SHARDS, "experiment.measure_features=dino=x"], "must be digits, inception=FILE or clip=FOLDER"),
        ([SHARDS[0], "experiment.measure_features=clip=x"], "needs real images that are not trained on"),
        ([*DIGITS, "experiment.measure_samples=5"], "at least 20"),
    ],
)
def test_what_cannot_be_measured(changes, message, place):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        validate(configure(None, settings(place, "bad", *(change.format(place=place) for change in changes))))

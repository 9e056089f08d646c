"""Trackers by name, through the libraries themselves: numbers, pictures, and a resume that goes on in the
same curves."""
import os
import shutil
import sqlite3
import tempfile

import pytest
from PIL import Image

from musekit.training.callbacks import diagnostic_callbacks, standard_callbacks
from musekit.training.log import check_trackers, read_log
from musekit.training.distributed import make_accelerator
from toy_training import tiny_trainer, write_data

os.environ.setdefault(
    "TRACKIO_DIR", tempfile.mkdtemp()
)  # trackio looks at it when it is imported, which no module here does
EVERY = [
    "experiment.log_every=1",
    "experiment.generate_every=4",
    "experiment.save_every=3",
    "experiment.log_token_probability_distributions_every=4",
    "experiment.project=toys",
    "experiment.name=first",
]


def run(folder, tracker, steps):
    "Trains up to some steps, going on where there is a checkpoint; gives the trainer."
    data = write_data(folder.parent / "data.parquet")
    options = [*EVERY, f"experiment.trackers=[{tracker}]", f"training.max_train_steps={steps}"]
    trainer = tiny_trainer(folder, data, *options, callbacks=[])
    draw = lambda model, step: Image.new("RGB", (40, 20), "teal")
    run = trainer.config.experiment
    diagnostics = diagnostic_callbacks(run)
    trainer.callbacks = standard_callbacks(
        run, diagnostics=diagnostics, samples={"step": draw}, evaluate=None
    )
    trainer.fit()
    trainer.accelerator.end_training()
    return trainer


def twice(folder, tracker):
    "A run that ends after 5 steps, the checkpoint of step 3 being its last, and goes on to 8."
    run(folder, tracker, 5)
    shutil.rmtree(folder / "checkpoint-5")
    return run(folder, tracker, 8)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    twice(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "toys"))
    events.Reload()
    seen = {event.step: event.value for event in events.Scalars("loss")}
    assert [event.step for event in events.Scalars("loss")] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
    ], "what is written again counts once"
    wrote = {line["step"]: line["loss"] for line in read_log(tmp_path / "run") if "loss" in line}
    assert seen == pytest.approx(wrote)
    assert {"samples", "token_probabilities"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Images("samples")] == [4, 8]
    assert (events.Images("samples")[0].width, events.Images("samples")[0].height) == (40, 20)


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    last = twice(tmp_path / "run", "wandb")
    kept = last.callbacks[0].run_id
    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(path.name.endswith(f"-{kept}") for path in runs)
    pictures = [path.name for path in runs[-1].rglob("*.png")]
    assert any(name.startswith("samples") for name in pictures)
    assert any(name.startswith("token_probabilities") for name in pictures)


def test_trackio(tmp_path):
    pytest.importorskip("trackio", reason="needs trackio: pip install trackio")
    import trackio.sqlite_storage as storage

    twice(tmp_path / "run", "trackio")
    with sqlite3.connect(storage.SQLiteStorage.get_project_db_path("toys")) as base:
        rows = base.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, _, _ in rows} == {"first"}, "the resumed run is the same run"
    assert {step for _, step, metrics in rows if "loss" in str(metrics)} == set(range(1, 9))
    assert any("trackio.image" in str(metrics) for _, _, metrics in rows)


def test_a_run_needs_none(tmp_path):
    trainer = run(tmp_path / "run", "", 2)
    assert trainer.accelerator.trackers == [] and len(read_log(tmp_path / "run")) == 2


def test_what_is_missing_is_named(tmp_path):
    from accelerate.tracking import get_available_trackers

    trainer = tiny_trainer(tmp_path / "run", write_data(tmp_path / "data.parquet"), callbacks=[])
    trainer.config.experiment.trackers = ["weights"]
    with pytest.raises(ValueError, match="'weights', which is no tracker; choose from .*wandb"):
        make_accelerator(trainer.config)
    there = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    absent = next(name for name in ("clearml", "swanlab", "aim", "tensorboard") if name not in there)
    with pytest.raises(ValueError, match=f"pip install {absent}"):
        check_trackers([absent])

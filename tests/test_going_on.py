"""Going on with other settings, from damaged checkpoints, and with several runs in one process; both
trainers."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from musekit.recipes.image_tokenizer import find_images
from musekit.training.callbacks import Checkpoint, Log
from musekit.training.checkpoint import STATE_FILE, checkpoints, load_run
from musekit.training.log import read_log
from musekit.training.tokenizer import VQTrainer
from commands import TINY, assert_refused, make_photos
from test_tokenizer_training import EVERYTHING, batches, settings, tiny_vqgan
from toy_training import all_weights, launch, tiny_trainer, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "train.parquet")


def transformer(folder, data, *overrides):
    return tiny_trainer(folder, data, *overrides, callbacks=[Log(1), Checkpoint(2)])


def tokenizer(folder, data, *overrides):
    options = [*EVERYTHING, "training.max_train_steps=4", *overrides]
    return VQTrainer(tiny_vqgan(), batches, settings(folder, *options), callbacks=[Log(1), Checkpoint(2)])


TRAINERS = {"transformer": transformer, "tokenizer": tokenizer}


@pytest.fixture(scope="module", params=TRAINERS)
def run(request, data, tmp_path_factory):
    "A trainer's maker and the folder of its run of four steps, with checkpoints after two and four."
    make, folder = TRAINERS[request.param], tmp_path_factory.mktemp(request.param)
    make(folder, data, "training.max_train_steps=4").fit()
    return make, folder


@pytest.fixture
def copied(run, tmp_path):
    make, folder = run
    shutil.copytree(folder, tmp_path / "run")
    return make, tmp_path / "run"


# Damage


def files_of(checkpoint):
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("wanted", ["latest", "checkpoint-4"])
def test_each_damaged_file_is_named_with_the_checkpoint_before_it(copied, data, damage, wanted):
    make, folder = copied
    names = files_of(folder / "checkpoint-4")
    assert {
        "model.safetensors",
        "optimizer.bin",
        "scheduler.bin",
        "random_states_0.pkl",
        "config.yaml",
        STATE_FILE,
    } < set(names)
    assert {
        "unwrapped_model/model.safetensors",
        "ema_model/model.safetensors",
        "ema_model/ema_state.json",
    } < set(names)
    for name in names:
        path = folder / "checkpoint-4" / name
        content = path.read_bytes()
        DAMAGES[damage](path)
        with pytest.raises(ValueError) as failure:
            make(folder, data, f"experiment.resume_from_checkpoint={wanted}").fit()
        message = str(failure.value)
        assert f"{path} is damaged" in message and "\n" not in message, name
        assert f"experiment.resume_from_checkpoint={folder}/checkpoint-2" in message, name
        path.write_bytes(content)
    DAMAGES[damage](folder / "checkpoint-4" / "optimizer.bin")
    later = make(
        folder, data, "experiment.resume_from_checkpoint=checkpoint-2", "training.max_train_steps=4"
    ).fit()  # as the message says
    assert later.step == 4 and [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]


def test_damage_without_a_checkpoint_before_it(copied, data):
    make, folder = copied
    for number in (2, 4):
        (folder / f"checkpoint-{number}" / "optimizer.bin").unlink()
    with pytest.raises(
        ValueError,
        match=(
            "checkpoint-4/optimizer.bin is damaged: it is missing.*no complete checkpoint before it; start a"
            " new run"
        ),
    ):
        make(folder, data).fit()


def as_saved_before(checkpoint):
    "A checkpoint as older versions wrote it: without its settings and the sizes of its files."
    (checkpoint / "config.yaml").unlink()
    state = json.loads((checkpoint / STATE_FILE).read_text())
    (checkpoint / STATE_FILE).write_text(
        json.dumps({name: value for name, value in state.items() if name != "files"})
    )


def test_checkpoints_of_older_versions_go_on(copied, run, data):
    make, folder = copied
    shutil.rmtree(folder / "checkpoint-4")
    as_saved_before(folder / "checkpoint-2")
    assert make(folder, data, "training.max_train_steps=4").fit().step == 4
    for name in ("model.safetensors", "ema_model/model.safetensors", "unwrapped_model/model.safetensors"):
        ours, theirs = (load_file(place / "checkpoint-4" / name) for place in (folder, run[1]))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_in_a_checkpoint_of_an_older_version(copied, data, damage):
    make, folder = copied
    for number in (2, 4):
        as_saved_before(folder / f"checkpoint-{number}")
    for name in (
        "model.safetensors",
        "optimizer.bin",
        "scheduler.bin",
        "ema_model/ema_state.json",
        STATE_FILE,
    ):
        path = folder / "checkpoint-4" / name
        content = path.read_bytes()
        DAMAGES[damage](path)
        with pytest.raises(ValueError) as failure:
            make(folder, data).fit()
        message = str(failure.value)
        assert (
            name in message
            and "\n" not in message
            and f"experiment.resume_from_checkpoint={folder}/checkpoint-2" in message
        ), message
        path.write_bytes(content)


def test_content_that_is_another_is_no_traceback(copied, data):
    "A file of the right length and frame that holds something else."
    make, folder = copied
    path = folder / "checkpoint-4" / "scheduler.bin"
    size = path.stat().st_size
    torch.save({"last": 1}, path)
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
    with pytest.raises(ValueError, match="checkpoint-4.*(could not be loaded|is damaged).*checkpoint-2"):
        make(folder, data).fit()


# Other settings


def test_nothing_changed_is_silent_and_exact(copied, run, data, capsys):
    make, folder = copied
    later = make(
        folder, data, "experiment.resume_from_checkpoint=checkpoint-2", "training.max_train_steps=4"
    ).fit()
    assert later.step == 4 and "checkpoint-2" not in capsys.readouterr().out
    ours, theirs = (load_file(place / "checkpoint-4" / "model.safetensors") for place in (folder, run[1]))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


CHANGES = {  # setting -> (what is said, whether the data starts anew, whether the optimizer is fresh)
    "training.batch_size=2": ("batch_size: {} -> 2", True, False),
    "training.seed=7": ("training.seed: 42 -> 7", True, False),
    "optimizer.name=muon": ("optimizer.name: adamw -> muon", False, True),
    "optimizer.name=lion": ("optimizer.name: adamw -> lion", False, True),
    "training.mixed_precision=bf16": ("training.mixed_precision: no -> bf16", False, False),
    "training.mixed_precision=fp16": ("training.mixed_precision: no -> fp16", False, False),
    "training.gradient_accumulation_steps=3": ("training.gradient_accumulation_steps: 2 -> 3", False, False),
    "training.use_ema=false": ("training.use_ema: true -> false", False, False),
    "lr_scheduler.scheduler=linear": ("lr_scheduler.scheduler: cosine -> linear", False, False),
    "optimizer.params.learning_rate=1e-3": ("lr: {} -> 0.001", False, False),
    "training.max_grad_norm=null": ("training.max_grad_norm: {} -> null", False, False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_named_checkpoint_goes_on_with_other_settings(run, data, tmp_path, capsys, change):
    make, folder = run
    line, data_anew, fresh = CHANGES[change]
    if "muon" in change and make is TRAINERS["tokenizer"]:
        with pytest.raises(ValueError, match="optimizer.name=muon is for the blocks of a transformer"):
            make(tmp_path, data, change)
        return
    start = make(folder, data).config
    name = change.split("=")[0]
    before = start
    for part in name.split("."):
        before = getattr(before, part)
    trainer = make(
        tmp_path,
        data,
        f"experiment.resume_from_checkpoint={folder}/checkpoint-4",
        "training.max_train_steps=6",
        change,
    )
    seen = []
    load = trainer.load_state_dict
    trainer.load_state_dict = lambda state: (
        load(state),
        seen.append(bool(trainer.optimizer.state_dict()["state"])),
    )
    micro = trainer.config.training.gradient_accumulation_steps
    trainer.fit()
    out = capsys.readouterr().out
    if before is not None or "null" not in change:
        assert f"checkpoint-4: {line.format(before)}" in out
    assert ("the data starts from its beginning" in out) == data_anew and (
        "a fresh optimizer" in out
    ) == fresh == (not seen[0])
    assert trainer.step == 6 and trainer.batches_seen == 2 * micro + (0 if data_anew else 8)
    assert read_log(tmp_path)[-1]["step"] == 6
    assert all(parameter.isfinite().all() for parameter in trainer.network.parameters())
    latest = make(
        tmp_path, data, "training.max_train_steps=8", change
    ).fit()  # and from there it goes on as any run
    assert latest.step == 8


def test_from_lion_to_adamw_and_back(run, data, tmp_path):
    make, folder = run
    make(
        tmp_path / "a",
        data,
        f"experiment.resume_from_checkpoint={folder}/checkpoint-4",
        "training.max_train_steps=6",
        "optimizer.name=lion",
    ).fit()
    names = lambda trainer: set(next(iter(trainer.optimizer.state_dict()["state"].values())))
    back = make(
        tmp_path / "b",
        data,
        f"experiment.resume_from_checkpoint={tmp_path}/a/checkpoint-6",
        "training.max_train_steps=8",
    ).fit()
    assert names(back) == {"step", "exp_avg", "exp_avg_sq"}


def test_an_average_begins_with_the_weights_of_the_checkpoint(run, data, tmp_path, capsys):
    make, folder = run
    plain = make(
        tmp_path / "a",
        data,
        f"experiment.resume_from_checkpoint={folder}/checkpoint-4",
        "training.use_ema=false",
        "training.max_train_steps=5",
    ).fit()
    named = f"experiment.resume_from_checkpoint={tmp_path}/a/checkpoint-{plain.step}"
    averaged = make(
        tmp_path / "b", data, named, f"training.max_train_steps={plain.step}"
    ).fit()  # no step is left
    assert "the EMA weights start from the weights of the checkpoint" in capsys.readouterr().out
    assert all(
        map(torch.equal, averaged.ema.shadow, [p for p in plain.network.parameters() if p.requires_grad])
    )
    assert averaged.ema.step == 0


@pytest.mark.parametrize(
    "change, said",
    {
        "training.batch_size=2": "batch_size: {} -> 2",
        "optimizer.name=lion": "optimizer.name: adamw -> lion",
        "training.mixed_precision=fp16": "training.mixed_precision: no -> fp16",
        "training.use_ema=false": "training.use_ema: true -> false",
        "training.seed=7": "training.seed: 42 -> 7",
    }.items(),
)
def test_latest_names_the_setting_and_the_way_out(run, data, change, said):
    make, folder = run
    before = make(folder, data).config.training.batch_size
    with pytest.raises(ValueError) as failure:
        make(folder, data, change).fit()
    message = str(failure.value)
    assert (
        said.format(before) in message
        and f"experiment.resume_from_checkpoint={folder}/checkpoint-4" in message
        and "\n" not in message
    )


def test_latest_goes_on_with_what_is_no_other_run(copied, data):
    make, folder = copied
    free = (
        "optimizer.name=fused_adamw",
        "optimizer.params.learning_rate=1e-3",
        "lr_scheduler.scheduler=constant",
        "training.max_train_steps=5",
    )
    assert make(folder, data, *free).fit().step == 5


def test_another_model_is_refused(run, data, tmp_path):
    make, folder = run
    trainer = make(tmp_path, data, f"experiment.resume_from_checkpoint={folder}/checkpoint-4")
    before = [p.detach().clone() for p in trainer.network.parameters()]
    name, parameter = next((n, p) for n, p in trainer.network.named_parameters() if p.dim() == 2)
    other = torch.nn.Parameter(torch.zeros(parameter.shape[0] + 1, parameter.shape[1]))
    owner = trainer.network.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], other)
    with pytest.raises(
        ValueError, match=f"another model: .*{name} is .* there and .* here. A resumed run needs the same one"
    ):
        trainer.fit()
    assert (
        sum(map(torch.equal, before, trainer.network.parameters())) >= len(before) - 1
    ), "nothing was loaded"


def test_other_data_of_the_same_name_is_read_from_its_beginning(run, data, tmp_path, capsys):
    make, folder = run
    trainer = make(
        tmp_path,
        data,
        f"experiment.resume_from_checkpoint={folder}/checkpoint-4",
        "training.max_train_steps=4",
    )
    trainer.same_data = False
    assert trainer.fit().batches_seen == 0 and "the data starts from its beginning" in capsys.readouterr().out


def test_other_shards_are_read_from_their_beginning(run, data, tmp_path, capsys):
    make, folder = run
    if make is tokenizer:
        pytest.skip("the configuration of a bare tokenizer names no data")
    other = write_data(tmp_path / "other.parquet")
    named = f"experiment.resume_from_checkpoint={folder}/checkpoint-4"
    trainer = make(tmp_path / "run", other, named, "training.max_train_steps=5").fit()
    assert f"{data} -> {other}" in capsys.readouterr().out and trainer.batches_seen == 2


def two_processes(folder, data, rank):
    trainer = tiny_trainer(
        folder,
        data,
        "training.max_train_steps=6",
        "experiment.resume_from_checkpoint=checkpoint-4",
        callbacks=[Checkpoint(2)],
    )
    trainer.fit()
    return {"step": trainer.step, "batches": trainer.batches_seen, "weights": all_weights(trainer)}


def test_another_number_of_processes(data, tmp_path, capsys):
    transformer(tmp_path, data, "training.max_train_steps=4").fit()
    first, second = launch(two_processes, tmp_path, data)
    assert (first["step"], first["batches"]) == (6, 8 // 2 + 4) and torch.equal(
        first["weights"], second["weights"]
    )
    capsys.readouterr()
    alone = transformer(
        tmp_path, data, "training.max_train_steps=8", "experiment.resume_from_checkpoint=checkpoint-6"
    ).fit()
    assert alone.step == 8 and "number of processes: 2 -> 1" in capsys.readouterr().out


def test_a_discriminator_may_come_later_grow_and_go(data, tmp_path, capsys):
    "The one part of a tokenizer's training that is no part of the tokenizer."
    none = [each for each in EVERYTHING if "adversarial" not in each]
    make = lambda name, steps, *overrides: VQTrainer(
        tiny_vqgan(),
        batches,
        settings(tmp_path / name, *none, f"training.max_train_steps={steps}", *overrides),
        callbacks=[Checkpoint(2)],
    )
    make("a", 2).fit()
    named = lambda name, step: f"experiment.resume_from_checkpoint={tmp_path}/{name}/checkpoint-{step}"
    with_one = make("b", 4, named("a", 2), "loss.adversarial=1", "loss.adversarial_start=0").fit()
    out = capsys.readouterr().out
    assert (
        "loss.adversarial: 0.0 -> 1.0" in out
        and "a fresh discriminator" in out
        and "a fresh optimizer" not in out
    )
    assert with_one.discriminator_optimizer.state_dict()["state"]
    make(
        "c",
        6,
        named("b", 4),
        "loss.adversarial=1",
        "loss.adversarial_start=0",
        "loss.discriminator_channels=16",
    ).fit()
    assert "a fresh discriminator" in capsys.readouterr().out
    assert make("d", 8, named("c", 6)).fit().discriminator is None
    assert "discriminator" not in capsys.readouterr().out.replace("loss.discriminator", "")


def test_the_way_to_load_by_hand(run, data, tmp_path):
    make, folder = run
    trainer = make(tmp_path, data, "experiment.resume_from_checkpoint=null")
    load_run(trainer, str(folder / "checkpoint-2"))
    assert trainer.step == 2


# Several runs in one process


def test_runs_in_one_process_do_not_share_accelerates_state(data, tmp_path):
    for number, precision in enumerate(("no", "bf16", "fp16", "no")):  # on a CPU fp16 computes as no does
        for name, make in TRAINERS.items():
            trainer = make(
                tmp_path / f"{name}-{number}",
                data,
                f"training.mixed_precision={precision}",
                "training.max_train_steps=2",
            ).fit()
            assert (
                trainer.accelerator.mixed_precision == trainer.accelerator.state.mixed_precision == precision
            )
            assert hasattr(trainer.model, "_original_forward") == (
                precision == "bf16"
            ), "the forward pass runs in that precision"


def test_a_run_after_a_failed_one(data, tmp_path):
    broken = transformer(tmp_path / "broken", data, "training.mixed_precision=bf16")
    broken.loss = lambda *arguments: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        broken.fit()
    assert (
        transformer(tmp_path / "next", data, "training.max_train_steps=2").fit().accelerator.mixed_precision
        == "no"
    )


def test_two_trainers_that_take_turns_are_as_if_alone(data, tmp_path):
    "Accumulation and precision of one say nothing to the other."
    make = lambda name, *more: transformer(tmp_path / name, data, *more)
    kinds = {"a": ("training.mixed_precision=bf16",), "b": ("training.gradient_accumulation_steps=3",)}
    alone = {}
    for name, more in kinds.items():
        trainer = make(f"{name}-alone", *more)
        for _ in range(3):
            trainer.train_step()
        alone[name] = all_weights(trainer)
    turns = {name: make(f"{name}-turns", *more) for name, more in kinds.items()}
    for _ in range(3):
        for trainer in turns.values():
            trainer.train_step()
    assert all(torch.equal(all_weights(turns[name]), alone[name]) for name in kinds)


# From the command line


SHORT = [*TINY, "training.max_train_steps=4", "experiment.save_every=2", "experiment.generate_every=2"]


def packed(run):
    return json.loads((run / "data" / "train" / "packed.json").read_text())["packed"]


def trained_on_the_folder(here, photos, *settings):
    process = here(photos, "train", "data=.", *SHORT, *settings)
    assert process.returncode == 0, process.stderr
    return process


def test_pictures_of_runs_are_no_data(here, tmp_path):
    photos = make_photos(tmp_path / "photos", 12)
    trained_on_the_folder(here, photos)
    drawn = here(
        photos,
        "generate",
        "a red two",
        "--model",
        "runs/small/pipeline",
        "--steps",
        "2",
        "--singles",
        "drawn",
    )
    assert drawn.returncode == 0, drawn.stderr
    assert len(list(photos.rglob("*.png"))) > 12
    trained_on_the_folder(here, photos, "experiment.output_dir=runs/second")
    trained_on_the_folder(here, photos, "training.max_train_steps=6")  # latest: the data are the same
    trained_on_the_folder(here, photos, "experiment.output_dir=.")
    trained_on_the_folder(here, photos, "experiment.output_dir=.", "training.max_train_steps=6")
    assert [packed(photos / run) for run in ("runs/small", "runs/second", ".")] == [12] * 3
    tokenizer = (
        "training.max_train_steps=2",
        "training.batch_size=4",
        "experiment.generate_every=1",
        "dataset.resolution=32",
    )
    for run in ("runs/tokenizer", "runs/another"):
        process = here(photos, "train-tokenizer", "data=.", f"experiment.output_dir={run}", *tokenizer)
        assert process.returncode == 0, process.stderr
    assert len(find_images(".", tmp_path / "none")) == 12


def test_with_more_pictures_and_in_another_folder(here, tmp_path):
    "The transformer goes on with the tokenizer and the text encoder that it was trained with."
    photos = make_photos(tmp_path / "photos", 12)
    go = lambda *settings: here(
        tmp_path, "train", "data=photos", "experiment.output_dir=run", *SHORT, *settings
    )
    assert go().returncode == 0
    weights = (tmp_path / "run" / "vq_model" / "model.safetensors").read_bytes()
    make_photos(tmp_path / "more", 16)
    for path in (tmp_path / "more").iterdir():
        shutil.copy(path, photos)
    assert_refused(go("training.max_train_steps=6"), "changed: files", "experiment.resume_from_checkpoint=")
    more = go("training.max_train_steps=6", "experiment.resume_from_checkpoint=run/checkpoint-4")
    assert more.returncode == 0 and "the data starts from its beginning" in more.stdout, more
    assert packed(tmp_path / "run") == 16
    latest = go("training.max_train_steps=8")  # from there on it is a run as any other
    assert (
        latest.returncode == 0
        and "going on after step 6 of 8" in latest.stdout
        and "beginning" not in latest.stdout
    )
    elsewhere = here(
        tmp_path,
        "train",
        "data=more",
        "experiment.output_dir=elsewhere",
        *SHORT,
        "training.max_train_steps=10",
        "training.seed=3",
        "experiment.resume_from_checkpoint=run/checkpoint-8",
    )
    assert elsewhere.returncode == 0 and "training.seed: 0 -> 3" in elsewhere.stdout, elsewhere
    for folder in ("run", "elsewhere"):
        assert (tmp_path / folder / "vq_model" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "elsewhere" / "pipeline" / "vq_model" / "model.safetensors").read_bytes() == weights


def test_damage_and_another_model_on_the_command_line(here, tmp_path):
    make_photos(tmp_path / "photos", 12)
    go = lambda *settings: here(
        tmp_path, "train", "data=photos", "experiment.output_dir=run", *SHORT, *settings
    )
    assert go().returncode == 0
    assert_refused(
        go("model.transformer.hidden_size=64"), "another model (model.transformer.hidden_size: 32 -> 64)"
    )
    (tmp_path / "run" / "checkpoint-4" / "scheduler.bin").write_bytes(b"")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    assert_refused(
        go("training.max_train_steps=6"),
        "run/checkpoint-4/scheduler.bin is damaged",
        "resume_from_checkpoint=run/checkpoint-2",
    )
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "alone" / "checkpoint-2")
    alone = here(
        tmp_path,
        "train",
        "data=photos",
        "experiment.output_dir=new",
        *SHORT,
        "experiment.resume_from_checkpoint=alone/checkpoint-2",
    )
    assert_refused(alone, "alone/vq_model is missing", "model.vq_model.pretrained")

"""Training a tokenizer: killed runs, two processes, what a critic is good for, and the command line."""
import json
import os
import shlex
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from children import CHILDREN
from musekit.data.digits import train_samples
from musekit.models.vqgan import VQGANModel
from musekit.recipes.image_tokenizer import VQ_MODELS
from musekit.training.callbacks import Callback, Checkpoint, Evaluate, Log
from musekit.training.config import load_config
from musekit.training.checkpoint import checkpoints
from musekit.training.log import read_log
from musekit.training.tokenizer import VQConfig, VQTrainer
from commands import TINY, assert_refused, launch_two, make_photos, musekit, some_digits
from toy_training import DieAt, launch

STEPS = 10
EVERYTHING = [  # whatever has state or draws random numbers
    "training.use_ema=true",
    "training.ema_decay=0.9",
    "codebook.revive_every=3",
    "codebook.revive_below=20",
    "loss.adversarial=1",
    "loss.adversarial_start=2",
    "loss.discriminator_channels=8",
    "loss.discriminator_layers=1",
    "loss.perceptual=0.1",
    "loss.perceptual_network=random",
    "training.gradient_accumulation_steps=2",
]


def tiny_vqgan(codes=32, **settings):
    torch.manual_seed(0)
    sizes = dict(
        hidden_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        z_channels=8,
        quantized_embed_dim=4,
        attn_resolutions=(),
    )
    return VQGANModel(**sizes | dict(num_embeddings=codes, no_attn_mid_block=True, dropout=0.1) | settings)


def pixels(number, rows=4, side=16):
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(number))


def batches(start):
    for number in range(start, 10**6):
        yield {"pixel_values": pixels(number)}


def settings(folder, *overrides):
    torch.set_num_threads(1)
    return load_config(
        None,
        [
            f"experiment.output_dir={folder}",
            "experiment.resume_from_checkpoint=latest",
            f"training.max_train_steps={STEPS}",
            "optimizer.params.learning_rate=3e-3",
            "lr_scheduler.scheduler=cosine",
            "lr_scheduler.params.warmup_steps=2",
            *overrides,
        ],
        VQConfig,
    )


def live(folder, step):
    callbacks = [Log(2), Evaluate(4, VQTrainer.report), DieAt(step), Checkpoint(3)]
    held_out = [{"pixel_values": pixels(-1 % 2**32)}]
    VQTrainer(
        tiny_vqgan(), batches, settings(folder, *EVERYTHING), eval_batches=held_out, callbacks=callbacks
    ).fit()


def run(folder, step=None):
    child = CHILDREN.Process(target=live, args=(str(folder), step))
    child.start()
    child.join(120)
    return child.exitcode


def test_killed_run_equals_uninterrupted(tmp_path):
    assert run(tmp_path / "whole") == 0
    for step in (2, 5, 8):
        assert run(tmp_path / "killed", step) == -signal.SIGKILL
    assert run(tmp_path / "killed") == 0
    assert [path.name for path in checkpoints(tmp_path / "killed")] == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-9",
        "checkpoint-10",
    ]
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]
    assert (
        len(names) >= 4 * 4 + 1
    )  # accelerate's two models, the bare one, the average; and the model of the run
    for name in names:
        ours, theirs = (load_file(tmp_path / run / name) for run in ("killed", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    timeless = lambda row: {
        name: value for name, value in row.items() if "time" not in name and "second" not in name
    }
    ours, theirs = ([timeless(row) for row in read_log(tmp_path / run)] for run in ("killed", "whole"))
    assert (
        ours == theirs
        and theirs[-2]["revived"] > 32
        and "adaptive_weight" in theirs[-2]
        and "eval_ssim" in theirs[-1]
    )


def test_a_resumed_run_takes_new_learning_rates_for_both_networks(tmp_path):
    go = lambda steps, *more: VQTrainer(
        tiny_vqgan(),
        batches,
        settings(
            tmp_path,
            *EVERYTHING,
            "lr_scheduler.scheduler=constant",
            f"training.max_train_steps={steps}",
            *more,
        ),
        callbacks=[Checkpoint(3)],
    ).fit()
    rates = lambda trainer: [optimizer.param_groups[0]["lr"] for optimizer, _ in trainer.schedules]
    before, after = rates(go(3)), rates(go(6, "optimizer.params.learning_rate=1e-3"))
    assert len(before) == 2 and before == pytest.approx([3e-3, 3e-3]) and after == pytest.approx([1e-3, 1e-3])


def two_steps(folder, data, rank, processes=2):
    """Steps on the half of each batch that belongs to this process; a large epsilon keeps Adam from
    enlarging rounding errors."""
    share = 8 // processes
    mine = [{"pixel_values": pixels(number, 8)[rank * share:(rank + 1) * share]} for number in range(4)]
    config = settings(
        folder,
        "codebook.revive_every=2",
        "codebook.revive_below=10",
        "optimizer.params.epsilon=1e-2",
        "training.max_grad_norm=1",
    )
    trainer = VQTrainer(tiny_vqgan(dropout=0.0), mine, config, eval_batches=mine)
    for _ in range(4):
        trainer.train_step()
    weights = torch.cat([p.detach().flatten() for p in trainer.network.parameters()])
    return {
        "weights": weights,
        "counts": trainer.autoencoder.counts,
        "revived": trainer.autoencoder.revived,
        "report": trainer.report(),
    }


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    first, second = launch(two_steps, tmp_path / "two", "")
    alone = two_steps(tmp_path / "one", "", 0, processes=1)
    assert torch.equal(first["weights"], second["weights"]) and torch.equal(first["counts"], second["counts"])
    assert torch.allclose(first["weights"], alone["weights"], atol=1e-5)
    assert (
        torch.equal(first["counts"], alone["counts"]) and first["revived"] == alone["revived"] > 32
    ), "codes were moved, and alike"
    assert first["report"] == second["report"] and first["report"] == pytest.approx(alone["report"], rel=1e-4)


def adversarial_steps(folder, data, rank):
    mine = [{"pixel_values": pixels(2 * number + rank)} for number in range(6)]
    trainer = VQTrainer(tiny_vqgan(), mine, settings(folder, *EVERYTHING))
    for _ in range(5):
        trainer.train_step()
    kept = [
        *trainer.network.parameters(),
        *trainer.accelerator.unwrap_model(trainer.discriminator).parameters(),
        *trainer.ema.shadow,
    ]
    return {
        "weights": torch.cat([p.detach().flatten() for p in kept]),
        "balance": trainer.metrics["adaptive_weight"],
    }


def test_two_processes_agree_on_the_critic(tmp_path):
    first, second = launch(adversarial_steps, tmp_path / "two", "")
    assert torch.equal(first["weights"], second["weights"]) and first["weights"].isfinite().all()
    assert first["balance"] == second["balance"] > 0


class StopOne(Callback):
    def on_step(self, trainer):
        if trainer.step == 3 and trainer.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped(folder, data, rank):
    callbacks = [Log(1), StopOne(), Checkpoint(100)]
    mine = lambda start: ({"pixel_values": pixels(2 * number + rank)} for number in range(start, 100))
    trainer = VQTrainer(tiny_vqgan(), mine, settings(folder), callbacks=callbacks).fit()
    return {"step": trainer.step, "stop": trainer.stop}


def test_two_processes_stop_together(tmp_path):
    first, second = launch(stopped, tmp_path / "run", "")
    assert first == second and first["stop"] and first["step"] in (3, 4)
    assert checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{first['step']}"


def steepness_after(folder, *overrides):
    """How hard an edge a tokenizer paints that cannot know where it stands, having one code: 1 for one
    between two pixels."""
    def edges(start):
        for number in range(start, 10**6):
            place = torch.randint(5, 12, (8, 1, 1, 1), generator=torch.Generator().manual_seed(number))
            yield {"pixel_values": (0.2 + 0.6 * (torch.arange(16) >= place)).expand(8, 3, 16, 16)}

    model = tiny_vqgan(codes=1, channel_mult=(1, 1, 1), dropout=0.0)
    config = settings(
        folder,
        "training.max_train_steps=120",
        "lr_scheduler.scheduler=constant",
        "training.max_grad_norm=1",
        *overrides,
    )
    VQTrainer(model, edges, config).fit()
    with torch.no_grad():
        painted = model.eval()(next(edges(10**5))["pixel_values"])
    return (painted.diff(dim=-1).amax(-1).mean() / 0.6).item()


def test_a_critic_wants_the_edge_that_the_squared_error_blurs(tmp_path):
    critic = [
        "loss.adversarial=1",
        "loss.adversarial_start=40",
        "loss.discriminator_channels=16",
        "loss.discriminator_layers=1",
    ]
    blurred, sharp = steepness_after(tmp_path / "plain"), steepness_after(tmp_path / "critic", *critic)
    assert blurred < 0.3 and sharp > 1.5 * blurred, (blurred, sharp)


FAMILIES = {
    "vqgan": tiny_vqgan,
    "fsq": lambda: tiny_vqgan(
        None, quantized_embed_dim=None, quantizer="fsq", quantizer_params={"levels": [4, 4, 2]}
    ),
    "lfq": lambda: tiny_vqgan(None, quantized_embed_dim=None, quantizer="lfq", quantizer_params={"dim": 5}),
    "maskgit_vqgan": lambda: VQ_MODELS["maskgit_vqgan"](
        hidden_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        z_channels=8,
        quantized_embed_dim=8,
        num_embeddings=32,
    ),
    "movq": lambda: VQ_MODELS["movq"](
        hidden_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        z_channels=8,
        quantized_embed_dim=8,
        num_embeddings=32,
        attn_resolutions=(),
    ),
    "paella_vq": lambda: VQ_MODELS["paella_vq"](levels=1, bottleneck_blocks=1, c_hidden=16, codebook_size=32),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_quantizer_trains(tmp_path, family):
    model = FAMILIES[family]()
    config = settings(tmp_path, *EVERYTHING, "training.max_train_steps=4", "codebook.revive_below=1e9")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = VQTrainer(
        model, batches, config, eval_batches=[{"pixel_values": pixels(7)}], callbacks=[Checkpoint(2)]
    ).fit()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert trainer.metrics["adaptive_weight"] > 0 and trainer.metrics["loss"].isfinite()
    assert (trainer.metrics["revived"] > 0) == (family not in ("fsq", "lfq"))
    assert trainer.report()["eval_codes_used"] > 1
    assert type(model).from_pretrained(tmp_path).codebook_size == model.codebook_size


SMALL = [
    "model.params.hidden_channels=32",
    "model.params.channel_mult=[1,1,1]",
    "model.params.z_channels=8",
    "model.params.num_embeddings=32",
    "model.params.quantized_embed_dim=4",
    "model.params.no_attn_mid_block=true",
    "dataset.resolution=32",
    "training.batch_size=8",
    "training.max_train_steps=12",
    "experiment.log_every=1",
    "lr_scheduler.params.warmup_steps=2",
    "experiment.output_dir=runs/tok",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with images/ without captions and photos/ with some."""
    folder = tmp_path_factory.mktemp("place")
    make_photos(folder / "photos", count=20)
    for number, sample in enumerate(some_digits(range(24))):
        path = folder / "images" / str(number % 3) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sample["image"].save(path)
    (folder / "images" / "broken.jpg").write_bytes(b"no image")
    (folder / "images" / "notes.txt").write_text("no image either")
    return folder


def test_a_folder_from_end_to_end(place, here):
    process = here(place, "train-tokenizer", "data=images/", *SMALL, "dataset.eval_share=0.2")
    assert process.returncode == 0 and process.stderr == "", process.stderr
    folder = place / "runs" / "tok"
    report = json.loads((folder / "report.json").read_text())
    assert {"l1", "mse", "psnr", "ssim", "codes_used", "codebook_size", "perplexity"} == set(report)
    assert f"{report['codes_used']} of 32 codes used" in process.stdout
    Image.open(folder / "reconstructions.png").verify()
    Image.open(folder / "samples" / "step-000012.png").verify()
    assert read_log(folder)[-2]["skipped"] >= 1, "the broken file was counted, not hidden"
    assert VQ_MODELS["vqgan"].from_pretrained(folder).codebook_size == 32

    hint = process.stdout.splitlines()[-1].split("train with it, on images with captions: ")[1]
    words = [
        "data=photos" if word.startswith("data=") else word for word in shlex.split(hint)
    ]  # those have captions
    tiny = [word for word in TINY if "vq_model" not in word]
    trained = here(place, *words[1:], *tiny, "output=runs/whole")
    assert trained.returncode == 0, trained.stderr
    assert (place / "runs" / "whole" / "pipeline").is_dir()


def test_interrupted_command_goes_on(place, here, monkeypatch):
    class Interrupt(Callback):
        def on_step(self, trainer):
            if trainer.step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    import musekit.recipes.image_tokenizer as room

    command = ["train-tokenizer", "data=photos", *SMALL, "experiment.output_dir=runs/stopped"]
    usual = room._callbacks
    monkeypatch.setattr(room, "_callbacks", lambda *arguments: [Interrupt(), *usual(*arguments)])
    process = here(place, *command)
    monkeypatch.setattr(room, "_callbacks", usual)
    assert (
        process.returncode == 130
        and "stopped at step 5, saved in runs/stopped/checkpoint-5" in process.stderr
    )
    assert not (place / "runs" / "stopped" / "report.json").exists()
    resumed = here(place, *shlex.split(process.stderr.split("resume with: ")[1])[1:])
    assert resumed.returncode == 0, resumed.stderr
    assert here(place, *command[:-1], "experiment.output_dir=runs/calm").returncode == 0
    ours, theirs = (load_file(place / "runs" / name / "model.safetensors") for name in ("stopped", "calm"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_command_in_two_processes(place):
    process = launch_two(
        place, "train-tokenizer", "data=photos", *SMALL, "experiment.output_dir=runs/two"
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("of 32 codes used") == 1
    assert (
        json.loads((place / "runs" / "two" / "checkpoint-12" / "trainer_state.json").read_text())[
            "num_processes"
        ]
        == 2
    )


@pytest.mark.parametrize("arguments, message", [
    ([], "no data: name them"),
    (["nowhere.yaml"], "nowhere.yaml"),
    (["data=nowhere"], "no shard, folder or YAML list at nowhere"),
    (["data=empty"], "no image in empty"),
    (["data=one"], "dataset.eval_share=0"),
    (["data=broken"], "could not be used"),
    (["data=images", "dataset.resolutoin=32"], "Did you mean 'dataset.resolution'"),
    (["data=images", "model.type=vq"], "must be one of 'vqgan'"),
    (["data=images", "model.params.codes=3"], "has no setting 'codes'"),
    (["data=images", "dataset.resolution=30"], "does not split into tokens"),
    (["data=images", "model.pretrained=a/b/c"], "a/b/c"),
    (["data=images", "loss.l1=0", "loss.l2=0"], "are all 0; set one of them above 0"),
    (["data=images", "loss.perceptual=1"], "loss.perceptual_network"),
    (["data=images", "loss.perceptual=1", "loss.perceptual_network=vgg.pth"], "vgg.pth does not exist"),
    (["data=images", "loss.perceptual=1", "loss.perceptual_network=images/notes.txt"], "images/notes.txt"),
])
def test_bad_input_is_one_clear_line(place, here, arguments, message):
    (place / "empty").mkdir(exist_ok=True)
    (place / "one").mkdir(exist_ok=True)
    next(train_samples())["image"].save(place / "one" / "1.png")
    (place / "broken").mkdir(exist_ok=True)
    for number in range(40):
        (place / "broken" / f"{number}.png").write_bytes(b"no image")
    assert_refused(
        (
            here(place, "train-tokenizer", *arguments, "experiment.output_dir=runs/bad")
            if arguments
            else here(place, "train-tokenizer")
        ),
        message,
    )


def test_check_and_help(place, here):
    process = here(place, "train-tokenizer", "data=images", "model.type=paella_vq", "--check")
    assert (
        process.returncode == 0
        and "dataset.eval_share" in process.stdout
        and "paella_vq: 189,682 parameters" in process.stdout
    )
    assert "musekit train-tokenizer data=photos/" in here(place, "train-tokenizer", "--help").stdout
    process = musekit(place, "train-tokenizer", "data=empty", "experiment.output_dir=runs/bad")
    assert_refused(process, "empty")

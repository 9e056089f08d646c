"""What `musekit check` prints is what happens: saved tensors, memory of a process, files in the published
style."""
import json
import subprocess
import sys
import tarfile
from functools import partial

import pytest
import torch
from PIL import Image

from conftest import ROOT
from musekit import cli
from musekit.recipes.memory import (
    Batch, activation_bytes, find_networks, peak_bytes, training_memory, weight_memory, without_memory,
)
from musekit.recipes.survey import data_report, tokenizer_data_report
from musekit.models.lora import add_lora
from musekit.models.inspection import num_parameters
from musekit.core.losses import masked_cross_entropy, saved_bytes
from musekit.recipes.configure import configure
from musekit.recipes.image_tokenizer import configure_tokenizer
from small_models import small_transformers

PUBLISHED = ROOT / "tests" / "published"
BUILD = small_transformers(side=8, num_layers=3)
BUILD |= {
    "uvit, halved": partial(BUILD["uvit with biases"], force_down_up_sample=True),
    "updates": lambda: add_lora(BUILD["uvit"](), rank=4),
}
del BUILD["uvit with biases"]


def on_meta(build):
    with torch.device("meta"):
        return build()


def measured(model, batch, precision, checkpointing):
    "Bytes that the real model keeps."
    model.train().gradient_checkpointing = checkpointing
    ids, conditions = batch.inputs(model)
    tensors = [value for value in conditions.values() if isinstance(value, torch.Tensor)]

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(ids, **conditions)
        return masked_cross_entropy(logits, ids)

    return saved_bytes(loss, [*model.parameters(), ids, *tensors])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", BUILD)
def test_activations_are_those_of_the_real_model(name, precision, checkpointing, monkeypatch):
    batch = Batch(3, (8, 8), 7)
    estimate = activation_bytes(on_meta(BUILD[name]), batch, precision, checkpointing)
    in_float32 = "musekit.models.layers.attends_in_float32"
    monkeypatch.setattr(in_float32, lambda query: False)  # as on an accelerator
    kept = measured(BUILD[name](), batch, precision, checkpointing)
    assert estimate == pytest.approx(kept, rel=1e-5 if precision == "no" else 2e-3)


@pytest.mark.parametrize("name", BUILD)
def test_checkpointing_keeps_less(name):
    model, batch = on_meta(BUILD[name]), Batch(3, (8, 8), 7)
    assert activation_bytes(model, batch, checkpointing=True) < 0.8 * activation_bytes(model, batch)


def test_a_run_with_all_tokens_masked_keeps_the_estimate():
    "The trainer asks for the logits of masked tokens alone, which takes a copy of their states."
    model, batch = BUILD["uvit"](), Batch(3, (8, 8), 7)
    ids, conditions = batch.inputs(model)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    loss = lambda: masked_cross_entropy(model(ids, **conditions, token_mask=everywhere), ids[everywhere])
    kept = saved_bytes(loss, [*model.train().parameters(), ids])
    assert kept == pytest.approx(activation_bytes(on_meta(BUILD["uvit"]), batch), rel=0.05)


def test_drawing_peak_is_that_of_the_real_model():
    batch, build = Batch(4, (8, 8), 7), BUILD["uvit"]
    real = build().eval()
    ids, conditions = batch.inputs(real)
    happened = peak_bytes(lambda: real(ids, **conditions), real.parameters())
    with without_memory(on_meta(build).eval()) as model:
        ids, conditions = batch.inputs(model)
        assert peak_bytes(lambda: model(ids, **conditions), model.parameters()) == pytest.approx(
            happened, rel=0.02
        )


def test_updates_take_gradients_and_optimizer_for_themselves_alone():
    whole, adapted = weight_memory(on_meta(BUILD["uvit"]), use_ema=True), weight_memory(
        on_meta(BUILD["updates"]), use_ema=True
    )
    for part in ("gradients", "optimizer", "EMA weights"):
        assert adapted[part] < 0.2 * whole[part]
    assert whole["weights"] < adapted["weights"] < 1.2 * whole["weights"]


STEP = """
import json, re, torch
from musekit.recipes.memory import Batch, activation_bytes, weight_memory
from musekit.core.losses import masked_cross_entropy
from musekit.models.uvit import MaskGiTUViT

torch.set_num_threads(1)
build = lambda width: MaskGiTUViT(
    vocab_size=2049, codebook_size=2048, hidden_size=width, num_hidden_layers=6, num_attention_heads=6,
    intermediate_size=1024, encoder_hidden_size=64, in_channels=128, block_out_channels=(128,),
    num_res_blocks=1, block_num_heads=2, cond_embed_dim=64,
    micro_cond_encode_dim=8, micro_cond_embed_dim=40)
batch = Batch(4, (16, 16), 20)
with torch.device("meta"):
    model = build(384)
activations = activation_bytes(model, batch)
weights = weight_memory(model)


def train(model, batch):
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids, conditions = batch.inputs(model)
    for _ in range(3):
        optimizer.zero_grad()
        masked_cross_entropy(model(ids, **conditions), ids).backward()
        optimizer.step()


train(build(6), Batch(1, (2, 2), 2))  # what the libraries load at first use is not the model's
memory = lambda name: int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
before = memory("VmRSS")
train(build(384).train(), batch)
print(json.dumps({"grown": memory("VmHWM") - before, "activations": activations, **weights}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory as Linux does")
def test_the_memory_of_a_process():
    """The peak of a process, beyond what the libraries take, lies between what stands there at one time for
    sure and all parts together: while activations fall in the backward pass, gradients rise."""
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    smaller, larger = sorted((report["gradients"], report["activations"]))
    at_once = report["weights"] + report["optimizer"] + larger
    assert 0.9 * at_once < report["grown"] < 1.15 * (at_once + smaller), report
    assert smaller > 0.15 * (at_once + smaller), "all parts count in this case"


LARGE = """
import resource
from musekit.recipes.memory import memory_report
from musekit.recipes.configure import configure
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
overrides = [
    "model.transformer.hidden_size=8192", "model.transformer.num_hidden_layers=2",
    "model.transformer.intermediate_size=22528",
]
report = memory_report(configure("tests/published/text_uvit.yaml", overrides))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6)
print(report)
"""


def test_a_large_model_is_reported_without_building_it():
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    grown, *report = done.stdout.splitlines()
    parameters = int(
        next(line for line in report if line.startswith("transformer")).split()[2].replace(",", "")
    )
    assert parameters > 2e9 and float(grown) < 1.0, "a gigabyte at most, for one that takes eight"


@pytest.mark.filterwarnings("ignore:Old keys without effect")
@pytest.mark.parametrize("name, parts", [
    ("text_uvit", ["603,537,664", "not on this machine", "16x16 tokens", "MaskGiTUViT"]),
    ("text_transformer", ["MaskGitTransformer", "* model.transformer", "16x16 tokens"]),
])
def test_files_in_the_published_style(name, parts, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    assert cli.main(["check", str(PUBLISHED / f"{name}.yaml"), "training.batch_size=2", "--no-data"]) == 0
    out, complaints = capfd.readouterr()
    assert not complaints and all(part in out for part in parts)
    assert not list(tmp_path.iterdir()), "nothing was written"


def make_photos(folder, count=5):
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (40, 30), (40 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a picture of number {number}")


def test_train_with_check_prints_the_same(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos")
    outputs = []
    for command in (["check", "data=photos/"], ["train", "data=photos/", "--check"]):
        assert cli.main(command) == 0
        lines = capfd.readouterr().out.splitlines()
        assert any(line.startswith("bf16 ") for line in lines) != torch.accelerator.is_available()
        outputs.append("\n".join(line for line in lines if not line.startswith("bf16 ")))  # measured anew
    assert outputs[0] == outputs[1] and "together, about" in outputs[0]
    assert (
        "data photos/: 5 images, 0.0 MB; a batch of 5 at 32x32 pixels, captions such as 'a picture of"
        " number 0'"
        in outputs[0]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["photos"], "nothing was written"


@pytest.mark.parametrize(
    "command, data, message",
    [
        (["check"], "nowhere/", "nowhere"),
        (["train", "--check"], "missing/{000..002}.tar", "missing/000.tar"),
        (["check"], "empty/", "empty"),
        (["check"], "broken/000.tar", "broken/000.tar"),
        (["train-tokenizer", "--check"], "nowhere/", "nowhere"),
        (["train-tokenizer", "--check"], "broken/000.tar", "broken/000.tar"),
    ],
)
def test_data_that_cannot_be_used(command, data, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "000.tar").write_bytes(b"no tar " * 200)
    assert cli.main([*command, f"data={data}"]) == 2
    out, complaints = capfd.readouterr()
    assert "optimizer.params.learning_rate" in out, "the settings are printed"
    assert complaints.count("\n") == 1 and message in complaints and "the data cannot" in complaints
    if data == "nowhere/":
        assert cli.main([*command, f"data={data}", "--no-data"]) == 0
        assert "data cannot" not in capfd.readouterr().err


def test_data_of_which_too_much_is_unusable_is_refused_as_in_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos")
    with tarfile.open("whole.tar", "w") as tar:
        for path in sorted((tmp_path / "photos").iterdir()):
            tar.add(path, path.name)
    content = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:4096])
    for report in (
        lambda data: data_report(configure(None, [data])),
        lambda data: tokenizer_data_report(configure_tokenizer(None, [data])),
    ):
        with pytest.raises(ValueError, match=r"samples could not be used.*cut\.tar"):
            report("data=*.tar")  # a star is no alias of YAML
        assert len(report("data=whole.tar")) == 1


def test_a_broken_sample_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos", 20)
    (tmp_path / "photos" / "0.png").write_bytes(b"no picture")
    assert cli.main(["check", "data=photos/"]) == 2
    assert "1 unreadable: 0.png" in capfd.readouterr().err
    assert cli.main(["check", "data=photos/", "dataset.params.skip_bad=true"]) == 0
    assert "left out: 1 unreadable: 0.png" in capfd.readouterr().out
    assert cli.main(["train-tokenizer", "data=photos/", "--check"]) == 0
    assert "1 left out (photos/0.png: " in capfd.readouterr().out


def test_of_many_pictures_a_few_are_read(tmp_path, monkeypatch, capfd):
    "A folder of 1,100 pictures, most of which are empty files: every thirty-fifth is opened, and no other."
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos", 0)
    for number in range(1100):
        path = tmp_path / "photos" / f"{number:04d}.png"
        path.touch()
        path.with_suffix(".txt").write_text(f"number {number}")
        if number % 35 == 0:
            Image.new("RGB", (40, 30)).save(path)
    assert cli.main(["check", "data=photos/"]) == 0
    assert "1,100 images" in capfd.readouterr().out


def test_old_keys_are_reported_once():
    with pytest.warns(UserWarning, match="dataset.params.batch_size .use batch_size."):
        config = configure(PUBLISHED / "text_uvit.yaml")
    assert config.mask_schedule.schedule == "cosine" and config.optimizer.params.learning_rate == 1e-4
    networks = find_networks(config)
    assert networks.vq_model is networks.text_encoder is None
    assert training_memory(networks, config)["weights"] == 4 * num_parameters(networks.transformer)

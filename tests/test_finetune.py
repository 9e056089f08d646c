"""Fine-tuning as people do it: from a pipeline, by low-rank updates or whole, checkpointed, resumed, drawn
with."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from musekit import cli
from musekit.models.lora import add_lora, load_lora, lora_parameters, lora_targets, merge_lora, save_lora
from musekit.core.losses import masked_cross_entropy, saved_bytes
from musekit.models.paella_vq import PaellaVQModel
from musekit.models.uvit import MaskGiTUViT
from musekit.inference.pipeline import Pipeline
from musekit.training.log import read_log
from commands import TINY, make_photos
from small_models import small_transformers

BUILD = small_transformers(side=4, num_layers=2)


def build(name):
    "A model whose layers of zeros are filled, so that everything counts."
    torch.manual_seed(0)
    model = BUILD[name]()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(name, rows=3):
    torch.manual_seed(1)
    text = {"encoder_hidden_states": torch.randn(rows, 5, 12)}
    conditions = {
        "uvit": text | {"cond_embeds": torch.randn(rows, 12), "micro_conds": torch.rand(rows, 5)},
        "text": text,
        "class": {"class_ids": torch.arange(rows)},
    }
    return torch.randint(17, (rows, 16)), conditions[name.split()[0]]


def disturb(model):
    torch.manual_seed(2)
    for parameter in lora_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", BUILD)
def test_updates_on_every_family(name, tmp_path):
    model, (ids, conditions) = build(name).eval(), inputs(name)
    adapted = add_lora(build(name).eval(), rank=3)
    assert torch.equal(adapted(ids, **conditions), model(ids, **conditions)), "the same at first"
    targets = lora_targets(model)
    assert len(targets) == 2 * (7 if name == "class" else 11) and len(lora_parameters(adapted)) == 2 * len(
        targets
    )
    disturb(adapted)
    learned = adapted(ids, **conditions)
    assert (learned - model(ids, **conditions)).abs().max() > 0.05
    merged = merge_lora(
        load_lora(build(name).eval(), save_lora(adapted, tmp_path / "update") or tmp_path / "update")
    )
    assert torch.allclose(merged(ids, **conditions), learned, atol=1e-4)
    adapted.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    loaded = type(model).from_pretrained(tmp_path / "whole")
    assert (
        torch.allclose(loaded(ids, **conditions), learned, atol=1e-4)
        and loaded.state_dict().keys() == model.state_dict().keys()
    )


def saved_update(tmp_path, name="uvit"):
    save_lora(disturb(add_lora(build(name), rank=3)), tmp_path)
    return load_file(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda t: {n: w for n, w in t.items() if "lora_A" in n}, "lacks one of its matrices"),
        (lambda t: t | {"bias": torch.ones(1)}, "bias is not part of one"),
        (lambda t: {n: w * torch.nan for n, w in t.items()}, "not finite"),
        (lambda t: {f"{n}.lora_magnitude_vector": w for n, w in t.items()}, "DoRA"),
        (
            lambda t: {n.replace("transformer_layers.1", "transformer_layers.7"): w for n, w in t.items()},
            "updates of transformer_layers.7",
        ),
        (
            lambda t: {n: w[:, :1].contiguous() for n, w in t.items()},
            "Load .* into the model that it was trained with",
        ),
        (lambda t: {"w": torch.ones(1)}, "w is not part of one"),
    ],
)
def test_updates_that_do_not_fit_change_nothing(tmp_path, wrong, message):
    save_file(wrong(saved_update(tmp_path)), tmp_path / "adapter_model.safetensors")
    model, before = build("uvit"), build("uvit").state_dict()
    with pytest.raises(ValueError, match=message) as error:
        load_lora(model, tmp_path)
    assert "strict" not in str(error.value) and "config.json" not in str(error.value), "it has neither"
    assert (
        all(map(torch.equal, model.state_dict().values(), before.values()))
        and model.state_dict().keys() == before.keys()
    )


def test_what_is_said_about_alpha_counts(tmp_path):
    "Without a word alpha is the rank; a text encoder's updates are left out, and both are said."
    tensors, name = saved_update(tmp_path), "transformer_layers.0.attention.query"
    delta = lambda model: model.get_submodule(name).get_delta_weight("default")
    usual = delta(load_lora(build("uvit"), tmp_path))  # alpha 16, rank 3
    (tmp_path / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match="no adapter_config.json beside .*; alpha is taken to be the rank"):
        assert torch.allclose(delta(load_lora(build("uvit"), tmp_path)), usual * 3 / 16)
    text = {f"text_encoder.layers.0.q_proj.lora_{kind}.weight": torch.ones(2, 2) for kind in "AB"}
    save_file(
        {n.replace("base_model.model", "transformer"): w for n, w in tensors.items()} | text,
        tmp_path / "pytorch_lora_weights.safetensors",
    )
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.warns(UserWarning, match="the updates of 1 layers of a text encoder are ignored"):
        assert torch.allclose(delta(load_lora(build("uvit"), tmp_path, scale=2)), usual * 6 / 16)
    save_file(text, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="0 layers fit"):
        load_lora(build("uvit"), tmp_path)


@pytest.mark.parametrize("name", BUILD)
def test_every_update_gets_a_gradient_and_nothing_else(name):
    model, (ids, conditions) = disturb(add_lora(build(name).train(), rank=2)), inputs(name)
    masked_cross_entropy(model(ids, **conditions)[:, -16:, :16].contiguous(), ids.clamp(max=15)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in parameter_name), parameter_name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, parameter_name


def test_a_pipeline_draws_with_updates_as_with_the_folded_model():
    "What the transformer makes of the text once for all steps is made with the updates, too."
    adapted = disturb(add_lora(build("uvit"), rank=3))
    rows = {"encoder_hidden_states": torch.randn(2, 5, 12), "cond_embeds": torch.randn(2, 12)}
    none = {"encoder_hidden_states": torch.zeros(1, 5, 12), "cond_embeds": torch.zeros(1, 12)}
    draw = lambda model: Pipeline(model, PaellaVQModel(levels=2, c_hidden=16, codebook_size=16)).ids(
        conditions=rows, negative_prompt=none, seed=0, steps=4, guidance_scale=3.0, temperature=0.5)
    before = draw(adapted)
    assert torch.equal(draw(merge_lora(adapted)), before) and not torch.equal(draw(build("uvit")), before)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "updates"])
def test_checkpointing_changes_memory_and_nothing_else(name, adapted):
    ids, conditions = inputs(name)
    grads, kept = {}, {}
    for checkpointing in (False, True):
        model = build(name).train()
        model = disturb(add_lora(model, rank=2)) if adapted else model
        model.gradient_checkpointing = checkpointing
        loss = lambda: masked_cross_entropy(
            model(ids, **conditions)[:, -16:, :16].contiguous(), ids.clamp(max=15)
        )
        kept[checkpointing] = saved_bytes(loss, list(model.parameters()))
        loss().backward()
        grads[checkpointing] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads[True].keys() == grads[False].keys()
    assert all(torch.equal(grads[True][name], grads[False][name]) for name in grads[True])
    assert kept[True] < 0.75 * kept[False]


# through the command line

FAST = [
    "training.max_train_steps=6",
    "lr_scheduler.params.warmup_steps=1",
    "training.generation_timesteps=2",
    "experiment.log_every=1",
    "experiment.save_every=3",
    "training.batch_size=8",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A working folder with photos/ and runs/first, a small run on them."
    folder = tmp_path_factory.mktemp("finetune")
    make_photos(folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", "data=photos", "experiment.output_dir=runs/first", *TINY]) == 0
    return folder


@pytest.fixture
def train(place, monkeypatch, capfd):
    monkeypatch.chdir(place)

    def run(*settings):
        capfd.readouterr()
        status = cli.main(["train", "data=photos", *settings])
        return status, *capfd.readouterr()

    return run


FROM_PIPELINE = "model.pretrained_model_path=runs/first/pipeline"


@pytest.mark.filterwarnings("ignore:model.transformer differs")
def test_updates_from_a_pipeline(place, train):
    status, out, complaints = train(
        "experiment.output_dir=runs/lora",
        FROM_PIPELINE,
        "model.lora.rank=2",
        "model.gradient_checkpointing=true",
        *FAST,
    )
    assert status == 0, complaints
    run, first = place / "runs" / "lora", place / "runs" / "first"
    assert not (run / "vq_model").exists() and not (run / "clip").exists(), "nothing was made anew"
    for part in ("vq_model", "text_encoder"):
        assert (run / "pipeline" / part / "model.safetensors").read_bytes() == (
            first / "pipeline" / part / "model.safetensors"
        ).read_bytes()
    update = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(update) == 22 and (run / "adapter" / "adapter_model.safetensors").stat().st_size < 20_000
    old, new = (load_file(each / "pipeline" / "transformer" / "model.safetensors") for each in (first, run))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys() and changed == {
        name for name in old if name.removesuffix(".weight") in targets(old)
    }
    card = (run / "pipeline" / "README.md").read_text()
    assert (
        "| fine-tuned from | transformer |" in card
        and "| LoRA rank | 2 |" in card
        and "after 6 steps" in card
    )
    model = MaskGiTUViT.from_pretrained(first / "pipeline" / "transformer")
    merged = merge_lora(load_lora(model, run / "adapter")).state_dict()
    assert all(torch.allclose(merged[name], new[name], atol=1e-6) for name in new)
    assert (
        cli.main(
            ["generate", "a two", "--model", "runs/lora/pipeline", "--out", "two.png", "--num-images", "1"]
        )
        == 0
    )


def targets(names):
    kinds = ("query", "key", "value", "out", "wi_0", "wi_1", "wo")
    return {
        name.removesuffix(".weight")
        for name in names
        if "transformer_layers" in name and name.split(".")[-2] in kinds
    }


@pytest.mark.filterwarnings("ignore:model.transformer differs")
def test_a_stopped_run_of_updates_goes_on_to_the_same_end(place, train):
    settings = [FROM_PIPELINE, "model.lora.rank=2", "model.lora.dropout=0.1", *FAST]
    for folder in ("whole", "again"):
        assert train(f"experiment.output_dir=runs/{folder}", *settings)[0] == 0
    again = place / "runs" / "again"
    shutil.rmtree(again / "checkpoint-6")
    shutil.rmtree(again / "pipeline")
    status, _, complaints = train(
        "experiment.output_dir=runs/again", *settings, "experiment.resume_from_checkpoint=latest"
    )
    assert status == 0, complaints
    for name in (
        "model.safetensors",
        "adapter/adapter_model.safetensors",
        "pipeline/transformer/model.safetensors",
    ):
        ends = [load_file(place / "runs" / folder / name) for folder in ("whole", "again")]
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0]), name
    assert [line["step"] for line in read_log(again) if "loss" in line] == list(range(1, 7))
    result = train(
        "experiment.output_dir=runs/again",
        FROM_PIPELINE,
        "model.lora.rank=3",
        *FAST,
        "experiment.resume_from_checkpoint=latest",
    )
    assert result[0] == 2 and "model.lora.rank: 2 -> 3" in result[2]


def test_all_weights_from_a_transformer(place, train):
    first = place / "runs" / "first"
    paths = [
        f"model.pretrained_model_path={first}/pipeline/transformer",
        f"model.vq_model.pretrained={first}/vq_model",
        f"model.text_encoder.pretrained={first}/clip",
    ]
    with pytest.warns(UserWarning, match="is overridden by the model in .*: hidden_size=64 .there 32.*\\.$"):
        status, _, complaints = train(
            "experiment.output_dir=runs/all",
            *paths,
            "model.transformer.hidden_size=64",
            "optimizer.params.learning_rate=0",
            "training.use_ema=false",
            *FAST,
        )
    assert status == 0, complaints
    old, new = (
        load_file(place / "runs" / name / "pipeline" / "transformer" / "model.safetensors")
        for name in ("first", "all")
    )
    assert all(torch.equal(old[name], new[name]) for name in old), "a learning rate of zero changes nothing"


@pytest.mark.parametrize(
    "settings, message",
    [
        (["model.lora.rank=2"], "set model.pretrained_model_path"),
        (["model.lora.rank=0"], "at least 1"),
        (["model.lora.rank=two"], "model.lora.rank"),
        (["model.lora.ranks=2"], "Did you mean 'model.lora.rank'"),
        ([FROM_PIPELINE, "model.lora.rank=2", "model.lora.target=[querry]"], "Did you mean 'query'"),
        (
            ["model.pretrained_model_path=runs/first/pipeline/transformer"],
            "set model.vq_model.pretrained to that one",
        ),
        (["model.pretrained_model_path=./runs/none"], "is no folder here"),
    ],
)
@pytest.mark.filterwarnings("ignore:model.transformer differs")
def test_contradictions_are_one_line(train, settings, message):
    status, _, complaints = train("experiment.output_dir=runs/never", *settings)
    assert status == 2 and message in complaints and complaints.count("\n") == 1, complaints


@pytest.mark.filterwarnings("ignore:model.transformer differs")
def test_check_counts_the_updates(place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    capfd.readouterr()
    assert cli.main(["check", "data=photos", FROM_PIPELINE, "model.lora.rank=2"]) == 0
    out = capfd.readouterr().out
    rows = {line.split()[0]: line.split() for line in out[out.index("network"):].splitlines() if line}
    settings = json.loads((place / "runs/first/pipeline/transformer/config.json").read_text())
    assert settings["num_hidden_layers"] == 1 and int(rows["transformer"][3].replace(",", "")) == 2 * (
        8 * 64 + 3 * 96
    )
    assert "CLIPTextModelWithProjection" in out and "not on this machine" not in out

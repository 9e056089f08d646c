"""Every setting does something, and a test shows it."""
import ast
import dataclasses
import json
import math

import pytest
import torch
from PIL import Image

from conftest import ROOT
from key_tests import DRAWS, KEY_TESTS, LOG, READS, WEIGHTS
from musekit.recipes.memory import Batch
from musekit.core.losses import saved_bytes
from musekit.recipes.settings import (
    generation_config,
    image_text_config,
    read_sample_inputs,
    sample_prompts,
)
from musekit.recipes.networks import FrozenNetworks, make_transformer
from musekit.recipes.text_to_image import Data, ImageSource, Recipe, encode
from musekit.recipes.configure import configure
from musekit.training.callbacks import Evaluate, diagnostic_callbacks, standard_callbacks
from musekit.training.config import all_keys, load_config
from musekit.training.log import Log, read_log
from musekit.training.checkpoint import checkpoints
from musekit.training.schema import Config
from musekit.training.distributed import make_accelerator
from small_models import save_frozen_networks
from toy_training import tiny_trainer, write_data


def leaves(section=Config, path=""):
    "Every key that holds a value rather than a section."
    for key in dataclasses.fields(section):
        name = f"{path}.{key.name}".lstrip(".")
        yield from leaves(key.type, name) if dataclasses.is_dataclass(key.type) else [name]


def test_every_key_has_a_test():
    assert set(leaves()) <= set(all_keys())
    assert list(KEY_TESTS) == list(leaves()), set(KEY_TESTS) ^ set(leaves())


def functions(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_cells(path):
    "The code of cells that test something and export nothing."
    cells = [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    return [cell for cell in cells if "test_" in cell and "#| export" not in cell]


test_cells.__test__ = False


@pytest.mark.parametrize("key", KEY_TESTS)
def test_that_test_exists(key):
    place = KEY_TESTS[key]
    if "::" in place:
        name, function = place.split("::")
        assert function in functions(ROOT / "tests" / name), place
    else:
        name, word = place.split(": ")
        assert any(word in cell for cell in test_cells(ROOT / "nbs" / f"{name}.ipynb")), place
    covered = {WEIGHTS: MOVES, LOG: LOGGED, READS: READ, DRAWS: DRAWN}.get(place)
    assert covered is None or key in covered, f"{place} has no case for {key}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "train.parquet")


def config_of(*settings):
    return load_config(
        None, ["experiment.output_dir=runs/x", "data=digits", "model.architecture=uvit", *settings]
    )


# The optimizer and the masks: a run of a few steps ends elsewhere

PLAIN = [
    "optimizer.params.learning_rate=1e-3",
    "training.gradient_accumulation_steps=1",
    "training.use_ema=false",
    "training.mask_contiguous_region_prob=null",
    "training.max_grad_norm=null",
    "lr_scheduler.scheduler=cosine",
]
MOVES = {
    "optimizer.name": ["optimizer.name=fused_adamw"],
    "optimizer.params.learning_rate": ["optimizer.params.learning_rate=2e-3"],
    "optimizer.params.scale_lr": ["optimizer.params.scale_lr=true"],
    "optimizer.params.beta1": ["optimizer.params.beta1=0.5"],
    "optimizer.params.beta2": ["optimizer.params.beta2=0.5"],
    "optimizer.params.weight_decay": ["optimizer.params.weight_decay=0.5"],
    "optimizer.params.epsilon": ["optimizer.params.epsilon=0.1"],
    "lr_scheduler.scheduler": ["lr_scheduler.scheduler=constant"],
    "lr_scheduler.params.warmup_steps": ["lr_scheduler.params.warmup_steps=4"],
    "mask_schedule.schedule": ["mask_schedule.schedule=linear"],
    "mask_schedule.params": ["mask_schedule.schedule=sigmoid", "mask_schedule.params.tau=0.5"],
    "optimizer.params.muon_learning_rate": [
        "optimizer.name=muon",
        "optimizer.params.muon_learning_rate=1e-2",
    ],
    "training.batch_size": ["training.batch_size=5"],
    "training.seed": ["training.seed=7"],
}


def after_steps(folder, data, settings, steps=3):
    trainer = tiny_trainer(folder, data, *PLAIN, *settings, callbacks=[])
    for _ in range(steps):
        trainer.train_step()
    return torch.cat([p.detach().flatten() for p in trainer.network.parameters()])


@pytest.fixture(scope="module")
def usual(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("usual")
    weights = after_steps(folder, data, [])
    assert torch.equal(
        weights, after_steps(folder, data, [])
    )  # a run repeats, so what differs is the setting's doing
    return weights


@pytest.mark.parametrize("key", MOVES)
def test_it_moves_the_weights(usual, data, tmp_path, key):
    moved = after_steps(tmp_path, data, MOVES[key])
    assert not torch.equal(moved, usual) and moved.isfinite().all()
    if len(MOVES[key]) > 1:
        assert not torch.equal(moved, after_steps(tmp_path, data, MOVES[key][:1]))


def test_clipping(data, tmp_path):
    def norm_after(limit):
        trainer = tiny_trainer(tmp_path, data, *PLAIN, f"training.max_grad_norm={limit}", callbacks=[])
        trainer.train_step()
        return (
            trainer.metrics["grad_norm"].item(),
            torch.stack([p.grad.norm() for p in trainer.network.parameters()]).norm().item(),
        )

    (before, clipped), (same, whole) = norm_after(0.5), norm_after(1000)
    assert before == same == pytest.approx(whole, rel=1e-4) and before > 0.5
    assert clipped == pytest.approx(0.5, rel=1e-4)


def test_the_average(data, tmp_path):
    def shadow(*settings, steps=4):
        trainer = tiny_trainer(
            tmp_path, data, "training.use_ema=true", "training.ema_decay=0.9", *settings, callbacks=[]
        )
        for _ in range(steps):
            trainer.train_step()
        own = torch.cat([p.detach().flatten() for p in trainer.ema.parameters])
        return torch.cat([s.flatten() for s in trainer.ema.shadow]), own

    average, own = shadow()
    assert not torch.equal(average, own) and not torch.equal(average, shadow("training.ema_decay=0.1")[0])
    assert torch.equal(*shadow("training.ema_update_after_step=10"))  # until then a copy
    assert torch.equal(
        shadow("training.ema_update_every=3", steps=3)[0], shadow("training.ema_update_every=3", steps=1)[0]
    )
    assert not torch.equal(average, shadow("training.ema_update_every=3")[0])
    assert tiny_trainer(tmp_path, data, "training.use_ema=false", callbacks=[]).ema is None


def test_one_batch_again_and_again(data, tmp_path):
    trainer = tiny_trainer(tmp_path, data, *PLAIN, "training.overfit_one_batch=true", callbacks=[])
    keys = [trainer.train_step() or trainer.last_micro.keys for _ in range(3)]
    assert keys[0] == keys[1] == keys[2]
    usual = tiny_trainer(tmp_path, data, *PLAIN, callbacks=[])
    keys = [usual.train_step() or usual.last_micro.keys for _ in range(3)]
    assert keys[0] != keys[1] != keys[2]


def micro(folder, data, *settings, count=30, **options):
    "What a trainer makes of some batches."
    trainer = tiny_trainer(folder, data, *PLAIN, "training.batch_size=8", *settings, callbacks=[])
    batches = trainer.data(0)
    return trainer, [
        trainer.make_micro_batch(batch, number, 0, **options) for number, batch in zip(range(count), batches)
    ]


def join(micros, name):
    return torch.cat([getattr(each.tokens, name) for each in micros])


def test_least_masking(data, tmp_path):
    least = join(micro(tmp_path, data, "training.min_masking_rate=0.5")[1], "mask").float().mean(-1).min()
    assert least >= 0.5 > join(micro(tmp_path, data)[1], "mask").float().mean(-1).min()


def test_random_replacement(data, tmp_path):
    _, masked = micro(tmp_path, data)
    _, replaced = micro(tmp_path, data, "training.noise_type=random_replace")
    assert (join(masked, "input_ids")[join(masked, "mask")] == 64).all()
    noise = join(replaced, "input_ids")[join(replaced, "mask")]
    assert noise.max() < 64 and len(noise.unique()) > 50
    assert (
        join(replaced, "labels") >= 0
    ).all()  # every token is a label, since nothing tells which were replaced


def test_every_token_is_a_label(data, tmp_path):
    _, micros = micro(tmp_path, data, "training.predict_all_tokens=true")
    labels, mask, weight = (join(micros, name) for name in ("labels", "mask", "loss_weight"))
    assert (labels >= 0).all() and (weight[mask] == 1).all() and (weight[~mask] < 1).all()
    assert (join(micro(tmp_path, data)[1], "labels")[~mask] == -100).all()


def test_rectangles(data, tmp_path):
    def is_rectangle(mask):
        rows, columns = mask.reshape(4, 4).any(1), mask.reshape(4, 4).any(0)
        return torch.equal(rows[:, None] & columns, mask.reshape(4, 4))

    share = lambda *settings: sum(map(is_rectangle, join(micro(tmp_path, data, *settings)[1], "mask"))) / 240
    assert share("training.mask_contiguous_region_prob=1.0") == 1.0 > share()


def test_ratios_of_an_evaluation(data, tmp_path):
    seen = []

    def measure(trainer):
        ratios = trainer.config.training.eval_mask_ratios
        seen.append(
            trainer.make_micro_batch(
                next(iter(trainer.data(0))), "evaluation", 0, ratios=ratios, training=False
            ).tokens.mask
        )
        from musekit.training.callbacks import validation_loss

        return validation_loss(trainer)

    trainer = tiny_trainer(
        tmp_path,
        data,
        *PLAIN,
        "training.batch_size=8",
        "training.eval_mask_ratios=[0.25]",
        "training.max_train_steps=1",
        callbacks=[Log(1), Evaluate(1, measure)],
    )
    trainer.eval_batches = lambda: [batch for _, batch in zip(range(2), trainer.data(0))]
    trainer.fit()
    assert (seen[0].sum(-1) == 4).all() and "eval_loss" in read_log(tmp_path)[-1]


def test_dropped_conditions(data, tmp_path):
    def share(prob):
        _, micros = micro(tmp_path, data, f"training.cond_dropout_prob={prob}")
        states, pooled = (
            torch.cat([each.conditions[name].flatten(1) for each in micros])
            for name in ("encoder_hidden_states", "cond_embeds")
        )
        gone = (states == 0).all(-1)
        assert torch.equal(gone, (pooled == 0).all(-1))  # a row loses both
        return gone.float().mean().item()

    assert share(0) == 0 and share(1) == 1 and share(0.3) == pytest.approx(0.3, abs=0.1)


def test_label_smoothing(data, tmp_path):
    trainer, micros = micro(tmp_path, data, count=1)
    trainer.train_step(), trainer.train_step()  # at the start all logits are equal
    with torch.no_grad():
        plain, smooth = (
            trainer.loss(trainer.model.eval(), micros[0], amount).item() for amount in (0.0, 0.5)
        )
        counts = micros[0].tokens.labels >= 0
        logits = trainer.model(micros[0].tokens.input_ids, **micros[0].conditions, token_mask=counts)
    expected = torch.nn.functional.cross_entropy(
        logits, micros[0].tokens.labels[counts], label_smoothing=0.5
    ).item()
    assert smooth == pytest.approx(expected, abs=1e-5) and smooth != plain
    assert not torch.equal(
        after_steps(tmp_path, data, ["training.label_smoothing=0.3"]), after_steps(tmp_path, data, [])
    )


# What the stages of a run make of its two frozen networks


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    "An image tokenizer and a text encoder on the disk, untrained."
    folder = tmp_path_factory.mktemp("networks")
    save_frozen_networks(folder)
    return folder


def batches_of(networks, *settings):
    "The batches of a run that encodes its images in every step; there are none."
    options = [
        f"model.vq_model.pretrained={networks}/vq",
        f"model.text_encoder.pretrained={networks}/clip",
        "training.encode_first=false",
    ]
    config = configure(None, ["data=digits", "dataset.preprocessing.max_seq_length=12", *options, *settings])
    no_data = Data({"train": ImageSource([])}, image_text_config(config))
    return encode(Recipe(config, progress=False), no_data, FrozenNetworks(config))


PIXELS = {
    "pixel_values": torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    "text": ["a red seven"] * 6,
}


def test_soft_targets(networks, data, tmp_path):
    soft = "training.use_soft_code_target=true"
    warm, cold = (
        batches_of(networks, soft, f"training.soft_code_temp={temperature}").prepare(PIXELS)
        for temperature in (1.0, 0.05)
    )
    entropy = lambda targets: -(targets * targets.clamp(min=1e-12).log()).sum(-1).mean()
    assert warm["soft_targets"].shape == (6, 64, 32) and entropy(cold["soft_targets"]) < entropy(
        warm["soft_targets"]
    )
    assert torch.equal(
        warm["soft_targets"].argmax(-1), warm["image_ids"]
    ) and "soft_targets" not in batches_of(networks).prepare(PIXELS)

    trainer, micros = micro(tmp_path, data, soft, count=1)
    soft = torch.rand(8, 16, 64, generator=torch.Generator().manual_seed(1)).softmax(-1)
    trainer.prepare = lambda batch: {**batch, "soft_targets": soft}
    masked = trainer.make_micro_batch(next(iter(trainer.data(0))), 0, 0)
    mask = masked.tokens.mask
    with torch.no_grad():
        loss = trainer.loss(trainer.model.eval(), masked)
        logits = trainer.model(masked.tokens.input_ids, **masked.conditions, token_mask=mask)
    assert loss.item() == pytest.approx(
        -(soft[mask] * logits.log_softmax(-1)).sum(-1).mean().item(), abs=1e-5
    )
    usual, _ = micro(tmp_path, data, count=1)
    usual.prepare = trainer.prepare
    assert usual.make_micro_batch(next(iter(usual.data(0))), 0, 0).soft_targets is None


def test_codes_that_are_drawn(networks):
    best = batches_of(networks).prepare(PIXELS)["image_ids"]
    prepare = batches_of(networks, "training.use_stochastic_code=true").prepare
    first, second = prepare(PIXELS)["image_ids"], prepare(PIXELS)["image_ids"]
    assert not torch.equal(first, second) and not torch.equal(first, best)


def test_encoding_in_parts(networks):
    def encoded(*settings):
        batches, sizes = batches_of(networks, *settings), []
        batches.networks.vq_model.in_block.register_forward_pre_hook(
            lambda module, inputs: sizes.append(len(inputs[0]))
        )
        return batches.prepare(PIXELS)["image_ids"], sizes

    (parts, sizes), (whole, one) = encoded("training.split_vae_encode=4"), encoded()
    assert (sizes, one) == ([4, 2], [6]) and torch.equal(parts, whole)


def test_prompts_are_as_long(networks):
    length = (
        lambda most: batches_of(networks, f"dataset.preprocessing.max_seq_length={most}")
        .prepare(PIXELS)["encoder_hidden_states"]
        .shape[1]
    )
    assert [length(5), length(12)] == [5, 12]


def test_padding(networks):
    last = (
        lambda *settings: batches_of(networks, *settings)
        .networks.text_encoder.tokenize(["a red seven"])[0, -1]
        .item()
    )
    assert last("model.text_encoder.pad_token_id=0") == 0 != last()


def test_the_unconditional_values(networks):
    batches, states = batches_of(networks), "encoder_hidden_states"
    empty = batches.networks.text_encoder([""])
    assert (
        torch.equal(batches.unconditional[states], empty[states][0])
        and batches.unconditional["cond_embeds"].any()
    )
    zeros = batches_of(networks, "training.use_empty_embeds_for_uncond=false").unconditional
    assert not zeros["cond_embeds"].any() and not zeros[states].any()


# Settings of the loader, whose own tests show their effect (nbs/03_data/10_image_text.ipynb)

READ = {
    "dataset.params.num_workers": (3, "num_workers"),
    "dataset.params.shuffle_buffer_size": (7, "shuffle_buffer_size"),
    "dataset.params.pin_memory": (True, "pin_memory"),
    "dataset.params.persistent_workers": (True, "persistent_workers"),
    "dataset.params.use_filtered_dataset": (True, "metadata_filter"),
    "dataset.params.min_size": (9, "metadata_filter.min_size"),
    "dataset.params.max_pwatermark": (0.2, "metadata_filter.max_pwatermark"),
    "dataset.params.min_aesthetic_score": (6.0, "metadata_filter.min_aesthetic_score"),
    "dataset.params.max_pnsfw": (0.1, "metadata_filter.max_pnsfw"),
    "dataset.params.require_marked_as_ok_by_spawning": (
        True,
        "metadata_filter.require_marked_as_ok_by_spawning",
    ),
    "dataset.params.require_marked_as_not_getty": (True, "metadata_filter.require_marked_as_not_getty"),
    "dataset.preprocessing.resolution": (48, "resolution"),
    "dataset.preprocessing.center_crop": (True, "center_crop"),
    "dataset.preprocessing.random_flip": (True, "random_flip"),
}
GOOD = {
    "original_width": 300,
    "original_height": 300,
    "pwatermark": 0.4,
    "aesthetic": 5.0,
    "is_spawning": 0,
    "is_getty": 0,
    "p_nsfwdf": 0.3,
}
REJECTED = {  # by the value above, and not by the default
    "min_size": {"original_width": 5}, "max_pwatermark": {}, "min_aesthetic_score": {}, "max_pnsfw": {},
    "require_marked_as_ok_by_spawning": {"is_spawning": 1}, "require_marked_as_not_getty": {"is_getty": 1},
}


@pytest.mark.parametrize("key", READ)
def test_settings_reach_the_loader(key):
    value, path = READ[key]
    read = lambda *settings: image_text_config(
        config_of("dataset.params.use_filtered_dataset=true", *settings)
    )
    loaded, name = read(f"{key}={value}"), path.split(".")[-1]
    if key == "dataset.params.use_filtered_dataset":
        assert loaded.metadata_filter is not None and image_text_config(config_of()).metadata_filter is None
        return
    for part in path.split("."):
        loaded = getattr(loaded, part)
    assert loaded == value
    if name in REJECTED:
        sample, lenient = GOOD | REJECTED[name], [] if name != "min_size" else ["dataset.params.min_size=0"]
        assert read(*lenient).metadata_filter(sample) and not read(f"{key}={value}").metadata_filter(sample)


# Settings of generation

DRAWN = {
    "training.guidance_scale": (3.0, "guidance_scale"), "training.generation_timesteps": (5, "steps"),
    "training.generation_temperature": (0.5, "temperature"), "training.generation_params": (None, None),
}


@pytest.mark.parametrize("key", DRAWN)
def test_settings_reach_generation(key):
    value, name = DRAWN[key]
    if value is None:
        assert (
            generation_config(config_of(f"{key}.steps=3")).steps == 3 != generation_config(config_of()).steps
        )
    else:
        assert (
            getattr(generation_config(config_of(f"{key}={value}")), name)
            == value
            != getattr(generation_config(config_of()), name)
        )


def test_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red seven\n\na green two\n")
    config = config_of(f"dataset.params.validation_prompts_file={tmp_path}/prompts.txt")
    assert read_sample_inputs(config).prompts == ["a red seven", "a green two"]
    assert read_sample_inputs(config_of()).prompts is None
    assert sample_prompts(config_of(), ["from the data"]) == ["from the data"]


# What a run writes, and when

LOGGED = {
    "experiment.max_train_examples": ("epoch", 30),
    "experiment.max_eval_examples": ("eval_examples", 6),
    "experiment.log_every": ("loss", 2),
    "experiment.eval_every": ("eval_loss", 2),
    "experiment.save_every": ("checkpoint", 2),
    "experiment.generate_every": ("sample", 2),
    "experiment.checkpoints_total_limit": ("limit", 1),
    "experiment.log_grad_norm_every": ("grad_norm/", 2),
    "experiment.log_pixel_entropy_every": ("token_entropy/", 2),
    "experiment.log_image_entropy_every": ("image_entropy/", 2),
    "experiment.log_cross_entropy_every": ("cross_entropy/", 2),
    "experiment.log_token_probability_distributions_every": ("token_probabilities", 2),
}
NEVER = [f"experiment.{name}_every=null" for name in ("log", "eval", "save", "generate")]


@pytest.mark.parametrize("key", LOGGED)
def test_it_is_logged(data, tmp_path, key):
    word, value = LOGGED[key]
    settings = {"epoch": ["experiment.log_every=1"], "limit": ["experiment.save_every=1"]}.get(word, [])

    def run(folder, *more):
        trainer = tiny_trainer(folder, data, *PLAIN, "training.max_train_steps=4", *NEVER, *settings, *more)
        experiment = trainer.config.experiment
        trainer.callbacks = standard_callbacks(
            experiment,
            diagnostics=diagnostic_callbacks(experiment),
            samples={"step": lambda *_: Image.new("RGB", (2, 2))},
            progress=False,
        )
        trainer.eval_batches = [batch for _, batch in zip(range(4), trainer.data(0))]
        trainer.fit()
        lines = read_log(folder)
        return lines, [line["step"] for line in lines if any(name.startswith(word) for name in line)]

    without, _ = run(tmp_path / "without")
    lines, steps = run(tmp_path / "with", f"{key}={value}")
    saved = lambda name: [path.name for path in checkpoints(tmp_path / name)]
    if word == "epoch":
        assert [line["epoch"] for line in lines if "epoch" in line] == pytest.approx([0.1, 0.2, 0.3, 0.4])
        assert not any("epoch" in line for line in without)
    elif word == "eval_examples":
        assert [line["eval_examples"] for line in lines if "eval_loss" in line] == [6]
        assert [line["eval_examples"] for line in without if "eval_loss" in line] == [12]
    elif word == "checkpoint":
        assert saved("with") == ["checkpoint-2", "checkpoint-4"] and saved("without") == ["checkpoint-4"]
    elif word == "limit":
        assert saved("with") == ["checkpoint-4"] and len(saved("without")) == 4
    elif word == "sample":
        assert sorted(path.name for path in (tmp_path / "with" / "samples").iterdir()) == [
            "step-000002.png",
            "step-000004.png",
        ]
        assert not (tmp_path / "without" / "samples").exists()
    else:
        assert steps == [2, 4], lines
        assert not [
            line for line in without if line["step"] < 4 and any(name.startswith(word) for name in line)
        ]


def test_settings_reach_the_tracker(data, tmp_path):
    wandb = {}
    trainer = tiny_trainer(
        tmp_path,
        data,
        "wandb.entity=us",
        "wandb.run_id=abc",
        "training.max_train_steps=1",
        callbacks=[Log(1)],
    )
    trainer.config.experiment.trackers = ["wandb"]
    trainer.accelerator.init_trackers = lambda project, config, init_kwargs: wandb.update(
        init_kwargs["wandb"]
    )
    trainer.fit()
    assert (wandb["entity"], wandb["id"]) == ("us", "abc")


# The model


SMALLEST = {
    "hidden_size": 16,
    "in_channels": 16,
    "block_out_channels": "[16]",
    "num_res_blocks": 1,
    "block_num_heads": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "micro_cond_encode_dim": 8,
    "micro_cond_embed_dim": 40,
    "force_down_up_sample": "false",
}


def made(networks, *settings):
    "The transformer of a run."
    sizes = (
        []
        if any("pretrained_model_path" in setting for setting in settings)
        else [f"model.transformer.{name}={size}" for name, size in SMALLEST.items()]
    )
    batches = batches_of(networks, *sizes, *settings)
    num_tokens = math.prod(batches.grid)
    return make_transformer(
        batches.networks.config, batches.codebook_size, batches.condition_sizes, num_tokens
    )


def test_updates(networks, tmp_path):
    made(networks).save_pretrained(tmp_path)
    updated = lambda *settings: made(
        networks, f"model.pretrained_model_path={tmp_path}", "model.lora.rank=2", *settings
    )
    trained = lambda *settings: [name for name, p in updated(*settings).named_parameters() if p.requires_grad]
    assert 0 < len(trained("model.lora.target=[query]")) < len(trained())
    dropped = lambda *settings: {
        m.p for name, m in updated(*settings).named_modules() if "lora_dropout" in name and hasattr(m, "p")
    }
    assert dropped("model.lora.dropout=0.25") == {0.25} != dropped()
    scaling = lambda *settings: {
        scale for m in updated(*settings).modules() if hasattr(m, "scaling") for scale in m.scaling.values()
    }
    assert scaling() == {8.0} and scaling("model.lora.alpha=1") == {0.5}


def test_compiled(networks):
    assert (
        made(networks)._compiled_call_impl is None
        and made(networks, "model.compile=true")._compiled_call_impl is not None
    )
    assert made(networks, "model.compile=true").state_dict().keys() == made(networks).state_dict().keys()


def test_checkpointed(networks):
    "The transformer of a run keeps less from the forward to the backward pass."
    def kept(*settings):
        model = made(networks, *settings).train()
        ids, conditions = Batch(3, (8, 8), 7).inputs(model)
        return saved_bytes(lambda: model(ids, **conditions).mean(), [*model.parameters(), ids])

    assert kept("model.gradient_checkpointing=true") < 0.9 * kept()


def test_attention_is_one_thing():
    "An old key is accepted with a warning; attention is always PyTorch's own."
    with pytest.warns(UserWarning, match="xformers_memory_efficient_attention .use PyTorch's own attention"):
        assert config_of("model.enable_xformers_memory_efficient_attention=true") == config_of()


def test_tf32():
    try:
        for wanted in (True, False):
            make_accelerator(config_of(f"training.enable_tf32={str(wanted).lower()}"))
            assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is wanted
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

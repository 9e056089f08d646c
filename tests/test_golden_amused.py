"""aMUSEd: its stored answers, diffusers' own classes on models at random, and whole pipelines, there and
back."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from musekit import cli
from musekit.models.text_encoders import TextEncoder
from musekit.recipes.clip import train_clip_bpe
from musekit.models.lora import load_lora, merge_lora
from musekit.core.guidance import GenerationConfig
from musekit.models.diffusers import CONVERTERS, read_amused, save_diffusers, to_diffusers
from musekit.models.uvit import MaskGiTUViT
from musekit.models.vqgan import VQGANModel
from musekit.inference.pipeline import Pipeline
from musekit.models.weights import load_weights, read_json

FIXTURES = ("amused", "amused_downsample")


def difference(one, other):
    return (one - other).abs().max().item()


def conditions(width, pooled, batch=2):
    "Text states, pooled text and micro-conditions, drawn at random."
    return torch.randn(batch, 7, width), torch.randn(batch, pooled), torch.rand(batch, 5) * 512


@torch.no_grad()
def randomise(model):
    "No weight is left at the zero or one it starts from."
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", FIXTURES)
def test_logits(golden, name):
    io = load_file(golden / name / "io.safetensors")
    model = MaskGiTUViT.from_pretrained(golden / name / "transformer")
    inputs = io["encoder_hidden_states"], io["cond_embeds"], io["micro_conds"]
    assert difference(model(io["input_ids"].flatten(1), *inputs), io["logits"].flatten(2).mT) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", FIXTURES)
def test_tokens_and_images(golden, name):
    io = load_file(golden / name / "io.safetensors")
    model = VQGANModel.from_pretrained(golden / "amused", subfolder="vqvae")
    assert torch.equal(model.get_code(io["pixel_values"]), io["tokens"])
    for images in (model.decode_code(io["tokens"]), model(io["pixel_values"])):
        assert difference(images, io["decoded"]) <= 1e-4


@pytest.mark.parametrize("part", ("amused/transformer", "amused_downsample/transformer", "amused/vqvae"))
def test_files_come_back_bit_by_bit(golden, part, tmp_path):
    stored, config = load_weights(golden / part), read_json(golden / part / "config.json")
    cls = {"UVit2DModel": MaskGiTUViT, "VQModel": VQGANModel}[config["_class_name"]]
    save_diffusers(cls.from_pretrained(golden / part), tmp_path)
    back = load_weights(tmp_path)
    assert back.keys() == stored.keys() and all(torch.equal(back[name], stored[name]) for name in stored)
    left_out = {"_diffusers_version", "vq_embed_dim", "force_upcast"}
    kept = {name: value for name, value in config.items() if name not in left_out}
    assert kept.items() <= read_json(tmp_path / "config.json").items()


def test_a_converter_is_found_whichever_module_was_imported(golden):
    code = "\n".join([
        "import sys",
        "from musekit.models.uvit import MaskGiTUViT",
        "assert 'musekit.models.diffusers' not in sys.modules",
        f"MaskGiTUViT.from_pretrained({str(golden / 'amused' / 'transformer')!r})",
        "assert 'diffusers' not in sys.modules",
    ])
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pickle_in_their_layout_is_refused_like_any_other(golden, tmp_path):
    (tmp_path / "config.json").write_bytes((golden / "amused" / "transformer" / "config.json").read_bytes())
    torch.save({"weights": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="was refused"):
        MaskGiTUViT.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip(
        "diffusers", reason="compares with diffusers' own classes; pip install diffusers"
    )


UVIT = dict(
    hidden_size=32,
    cond_embed_dim=12,
    micro_cond_encode_dim=8,
    micro_cond_embed_dim=40,
    encoder_hidden_size=20,
    vocab_size=40,
    codebook_size=32,
    in_channels=16,
    block_out_channels=24,
    num_res_blocks=1,
    block_num_heads=3,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    sample_size=4,
)
UVIT_CHANGES = {
    "plain": {},
    "biases": {"use_bias": True},
    "resampled": {"downsample": True, "upsample": True},
    "three residual blocks": {"num_res_blocks": 3},
    "as wide outside": {"block_out_channels": 32, "block_num_heads": 8},
    "no learned norms": {"ln_elementwise_affine": False},
    "no residual block": {"num_res_blocks": 0},
    "all": {
        "use_bias": True,
        "downsample": True,
        "upsample": True,
        "ln_elementwise_affine": False,
        "num_res_blocks": 2,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("grid", ((4, 4), (2, 6)))
@pytest.mark.parametrize("changes", UVIT_CHANGES.values(), ids=UVIT_CHANGES)
def test_uvit_of_diffusers(diffusers, changes, grid, tmp_path):
    torch.manual_seed(0)
    theirs, ids = randomise(diffusers.UVit2DModel(**UVIT | changes)), torch.randint(40, (2, *grid))
    inputs, ours = conditions(20, 12), MaskGiTUViT
    expected = theirs(ids, *inputs).flatten(2).mT
    theirs.save_pretrained(tmp_path / "theirs")
    ours = MaskGiTUViT.from_pretrained(tmp_path / "theirs")
    assert difference(ours(ids.flatten(1), *inputs, grid=grid), expected) <= 1e-4 and expected.std() > 0.1
    save_diffusers(ours, tmp_path / "back")
    back = diffusers.UVit2DModel.from_pretrained(tmp_path / "back")
    assert difference(back(ids, *inputs).flatten(2).mT, expected) <= 1e-4
    assert dict(back.config).items() >= (UVIT | changes).items()


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


@torch.no_grad()
@pytest.mark.parametrize("alpha", [3.0, 12.0])
def test_updates_that_diffusers_saved(diffusers, alpha, tmp_path):
    "A network of diffusers with low-rank updates, and ours that reads them from each layout, answer alike."
    peft = pytest.importorskip("peft")
    from diffusers.loaders import AmusedLoraLoaderMixin

    torch.manual_seed(0)
    theirs, ids = randomise(diffusers.UVit2DModel(**UVIT)), torch.randint(40, (2, 4, 4))
    inputs = conditions(20, 12)
    theirs.save_pretrained(tmp_path / "model")
    plain = theirs(ids, *inputs).flatten(2).mT
    theirs.add_adapter(
        peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=TARGETS, rank_pattern={"to_v": 5})
    )
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    expected = theirs(ids, *inputs).flatten(2).mT
    updates = peft.get_peft_model_state_dict(theirs)
    config = json.loads(json.dumps(theirs.peft_config["default"].to_dict(), default=sorted))
    metadata = {f"transformer.{name}": value for name, value in config.items()}
    folders = {name: tmp_path / name for name in ("header", "alphas", "old", "processor", "peft")}
    for folder in folders.values():
        folder.mkdir()
    AmusedLoraLoaderMixin.save_lora_weights(folders["header"], transformer_lora_layers=updates)
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)}
    save_file(
        load_file(folders["header"] / "pytorch_lora_weights.safetensors"),
        folders["header"] / "pytorch_lora_weights.safetensors",
        header,
    )
    down_up = {
        name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor
        for name, tensor in updates.items()
    }
    alphas = {
        name.replace(".lora.down.weight", ".alpha"): torch.tensor(alpha)
        for name in down_up
        if ".down." in name
    }
    save_file(
        {f"unet.{name}": tensor for name, tensor in (down_up | alphas).items()},
        folders["alphas"] / "pytorch_lora_weights.safetensors",
    )
    flat = {
        "lora_unet_" + layer.replace(".", "_") + f".lora_{kind}.weight": tensor
        for name, tensor in down_up.items()
        for layer, kind in [name.removesuffix(".weight").split(".lora.")]
    }
    flat |= {
        "lora_unet_" + name.removesuffix(".alpha").replace(".", "_") + ".alpha": tensor
        for name, tensor in alphas.items()
    }
    save_file(flat, folders["old"] / "pytorch_lora_weights.safetensors")
    processor = {
        name.replace(".lora.", "_lora.")
        .replace(".to_", ".processor.to_")
        .replace("to_out.0_lora", "to_out_lora"): tensor
        for name, tensor in down_up.items()
    }
    processor |= {name.replace("to_out.0.", "to_out."): tensor for name, tensor in alphas.items()}
    save_file(
        {f"transformer.{name}": tensor for name, tensor in processor.items()},
        folders["processor"] / "pytorch_lora_weights.safetensors",
    )
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in updates.items()},
        folders["peft"] / "adapter_model.safetensors",
    )
    (folders["peft"] / "adapter_config.json").write_text(json.dumps(config))
    for name, folder in folders.items():
        ours = load_lora(MaskGiTUViT.from_pretrained(tmp_path / "model"), folder)
        assert difference(ours(ids.flatten(1), *inputs), expected) <= 1e-4, name
        assert (
            difference(merge_lora(ours)(ids.flatten(1), *inputs), expected) <= 1e-4
            and difference(expected, plain) > 0.05
        )


VQ = dict(
    block_out_channels=(32, 64), layers_per_block=1, latent_channels=8, num_vq_embeddings=24, sample_size=16
)


def vq_settings(attention=(False, False), **changes):
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * len(attention),
        "up_block_types": ["UpDecoderBlock2D"] * len(attention),
    }
    for level, attended in enumerate(attention):
        for kind, place in (("down_block_types", level), ("up_block_types", -1 - level)):
            kinds[kind][place] = "Attn" * attended + kinds[kind][place]
    return VQ | {name: tuple(value) for name, value in kinds.items()} | changes


VQ_CHANGES = {
    "plain": vq_settings(),
    "one level": vq_settings((False,), block_out_channels=(32,)),
    "attention below": vq_settings((False, True), mid_block_add_attention=False, layers_per_block=2),
    "attention above": vq_settings((True, False, False), block_out_channels=(32, 32, 96), layers_per_block=2),
    "narrow codes": vq_settings(vq_embed_dim=4, layers_per_block=2),
    "grey": vq_settings(in_channels=1, out_channels=1),
}


@pytest.mark.parametrize("upcast", [True, False])
def test_a_tokenizer_that_asks_for_single_precision_keeps_it(diffusers, upcast, tmp_path):
    diffusers.VQModel(**VQ_CHANGES["one level"], force_upcast=upcast).save_pretrained(tmp_path)
    model = VQGANModel.from_pretrained(tmp_path, torch_dtype="float16")
    model.save_pretrained(tmp_path / "ours")
    again = VQGANModel.from_pretrained(tmp_path / "ours")
    for one in (
        model,
        again.half(),
        again.to("cpu", torch.float16),
        again.to(torch.zeros(1, dtype=torch.float16)),
    ):
        assert one.dtype == (torch.float32 if upcast else torch.float16)
    assert (
        again.to(torch.bfloat16).dtype == torch.bfloat16 and again.config.get("force_upcast", False) == upcast
    )


@torch.no_grad()
@pytest.mark.parametrize("settings", VQ_CHANGES.values(), ids=VQ_CHANGES)
def test_vq_model_of_diffusers(diffusers, settings, tmp_path):
    torch.manual_seed(0)
    theirs = randomise(diffusers.VQModel(**settings))
    pixels = torch.rand(2, settings.get("in_channels", 3), 16, 24)
    latents = theirs.encode(pixels).latents
    codes, _, (_, _, ids) = theirs.quantize(latents)
    expected = theirs.decode(latents).sample
    theirs.save_pretrained(tmp_path / "theirs")
    ours = VQGANModel.from_pretrained(tmp_path / "theirs")
    scale = expected.abs().max().clamp_min(1)
    assert torch.equal(ours.get_code(pixels), ids.view(2, -1)) and len(ids.unique()) > 1
    assert difference(ours(pixels), expected) <= 1e-4 * scale
    save_diffusers(ours, tmp_path / "back")
    back = diffusers.VQModel.from_pretrained(tmp_path / "back")
    decoded = back.decode(ids.view(codes.shape[0], *codes.shape[2:]), force_not_quantize=True,
                        shape=(*codes.permute(0, 2, 3, 1).shape,)).sample
    assert difference(decoded, expected) <= 1e-4 * scale


def test_as_many_parameters_as_published(diffusers):
    with torch.device("meta"):
        theirs = diffusers.UVit2DModel(sample_size=32, downsample=True, upsample=True)
        ours = MaskGiTUViT.from_config(CONVERTERS["UVit2DModel"](dict(theirs.config), {})[0])
    config, back = to_diffusers({"_class_name": "MaskGiTUViT", **ours.config}, ours.state_dict())
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }
    assert sum(parameter.numel() for parameter in ours.parameters()) == theirs.num_parameters() == 608_257_792


PROMPTS = ["a red three on white paper", "two"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_clip_bpe(PROMPTS * 4, vocab_size=530, max_seq_length=12)


@pytest.fixture(scope="module")
def clip(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(1)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=12,
        hidden_size=20,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=3,
        projection_dim=12,
        **special,
    )
    return randomise(CLIPTextModelWithProjection(config))


@pytest.fixture(scope="module")
def theirs(diffusers, tokenizer, clip):
    "A tiny pipeline of diffusers, every weight of it random."
    torch.manual_seed(2)
    transformer, vqvae = diffusers.UVit2DModel(**UVIT), diffusers.VQModel(**vq_settings(
        num_vq_embeddings=32, mid_block_add_attention=False, lookup_from_codebook=True))
    scheduler = diffusers.AmusedScheduler(mask_token_id=39, masking_schedule="linear")
    pipeline = diffusers.AmusedPipeline(randomise(vqvae), tokenizer, clip, randomise(transformer), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("amused")
    theirs.save_pretrained(folder)
    return folder


def first_step(pipeline, run):
    "Inputs and logits of the first call of a pipeline's transformer."
    seen = []
    hook = pipeline.transformer.register_forward_hook(
        lambda module, args, options, output: seen.append((args, options, output)), with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return seen[0]


@torch.no_grad()
def test_a_pipeline_of_diffusers_asks_and_answers_alike(theirs, folder):
    ours = Pipeline.from_pretrained(folder)
    assert ours.generation == GenerationConfig(12, 10.0, temperature=(2.0, 0.0), schedule="linear")
    mine, precompute = {}, ours.transformer.precompute
    ours.transformer.precompute = lambda **conditions: mine.update(conditions) or precompute(**conditions)
    for prompts, negative in ((PROMPTS, None), (PROMPTS, ["dark", "blue paper"])):
        _, options, logits = first_step(
            theirs, lambda: theirs(prompts, negative_prompt=negative, output_type="latent")
        )
        args, _, answer = first_step(ours, lambda: ours.ids(prompts, negative_prompt=negative))
        unconditional, conditional = logits.flatten(2).mT.chunk(2)  # diffusers puts the empty prompt first
        assert torch.equal(args[0], torch.full((4, 16), 39))
        assert difference(mine["micro_conds"], options["micro_conds"]) == 0
        assert mine["micro_conds"][0].tolist() == [8, 8, 0, 0, 6]
        assert difference(mine["cond_embeds"], options["pooled_text_emb"].roll(2, 0)) <= 1e-5
        assert difference(mine["encoder_hidden_states"], options["encoder_hidden_states"].roll(2, 0)) <= 1e-5
        assert (
            difference(answer, torch.cat([conditional, unconditional]).flatten(0, 1)) <= 1e-4
            and difference(conditional, unconditional) > 1e-2
        )


@torch.no_grad()
@pytest.mark.parametrize("steps", (1, 2, 5, 12))
def test_tokens_are_the_schedulers_where_chance_has_no_say(theirs, folder, monkeypatch, steps):
    """The likeliest id in place of a drawn one, and a re-masking temperature of zero: both decode the same
    tokens."""
    monkeypatch.setattr(
        torch, "multinomial", lambda probs, count, generator=None: probs.argmax(-1, keepdim=True)
    )
    monkeypatch.setattr(
        "musekit.core.samplers.gumbel_noise", lambda shape, generator=None, device=None: torch.zeros(shape)
    )
    monkeypatch.setattr("musekit.core.noise._invert", lambda probs, u: probs.max(-1)[::-1])
    expected = theirs(PROMPTS, num_inference_steps=steps, temperature=(0, 0), output_type="latent").images
    ids = Pipeline.from_pretrained(folder).ids(PROMPTS, steps=steps, temperature=(0.0, 0.0))
    assert torch.equal(ids, expected.flatten(1)) and len(ids.unique()) > 2


@torch.no_grad()
def test_images_of_the_same_tokens_are_the_same(theirs, folder):
    ours, ids = Pipeline.from_pretrained(folder), torch.randint(32, (2, 16))
    shape = (2, 4, 4, 8)
    expected = theirs.vqvae.decode(ids.view(2, 4, 4), force_not_quantize=True, shape=shape).sample.clip(0, 1)
    for image, pixels in zip(ours.decode(ids), expected):
        assert difference(torch.tensor(np.asarray(image)) / 255, pixels.permute(1, 2, 0)) <= 0.5 / 255 + 1e-4


def test_drawing_inpainting_and_saving(folder, tmp_path):
    pipeline = Pipeline.from_pretrained(folder)
    image, = pipeline(PROMPTS[0], seed=0, steps=3)
    hidden = np.zeros((8, 8), bool)
    hidden[:, 4:] = True
    painted, = pipeline.inpaint(image, hidden, PROMPTS[1], seed=0)
    assert image.size == (8, 8) and (np.asarray(painted)[:, :4] == np.asarray(image)[:, :4]).all()
    pipeline.save_pretrained(tmp_path / "ours")
    again, = Pipeline.from_pretrained(tmp_path / "ours")(PROMPTS[0], seed=0, steps=3)
    assert np.array_equal(again, image)


@torch.no_grad()
def test_a_pipeline_goes_back_to_diffusers(diffusers, theirs, folder, tmp_path):
    Pipeline.from_pretrained(folder).save_diffusers(tmp_path / "back")
    back = diffusers.AmusedPipeline.from_pretrained(tmp_path / "back")
    back.set_progress_bar_config(disable=True)
    assert back.scheduler.config.masking_schedule == "linear" and back.scheduler.config.mask_token_id == 39
    run = lambda pipeline: pipeline(
        PROMPTS, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    assert np.abs(run(back) - run(theirs)).max() <= 1e-4
    assert read_amused(tmp_path / "back") == read_amused(folder)


def test_a_pipeline_that_began_here_runs_in_diffusers(diffusers, tokenizer, clip, tmp_path):
    sizes = {name: value for name, value in UVIT.items() if name != "sample_size"}
    transformer = randomise(MaskGiTUViT(**sizes, default_shape=(4, 4), use_bias=True))
    vq_model = VQGANModel(16, 3, 32, (1, 1), 2, (8,), z_channels=8, quantized_embed_dim=8, num_embeddings=32)
    text = TextEncoder(clip, tokenizer, use_pooled=True)
    Pipeline(transformer, vq_model, text).save_diffusers(tmp_path / "new")
    pipeline = diffusers.AmusedPipeline.from_pretrained(tmp_path / "new")
    pipeline.set_progress_bar_config(disable=True)
    image, = pipeline("two", num_inference_steps=2).images
    assert image.size == (8, 8)


def test_generate_on_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "drawn.png"
    assert (
        cli.main([
            "generate",
            *PROMPTS,
            "--model",
            str(folder),
            "--out",
            str(out),
            "--num-images",
            "2",
            "--steps",
            "2",
        ])
        == 0
    )
    assert Image.open(out).size[0] >= 16


def test_another_pipeline_of_diffusers_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    out = tmp_path / "drawn.png"
    assert cli.main(["generate", "two", "--model", str(tmp_path), "--out", str(out)]) == 2
    assert "holds a StableDiffusionPipeline" in capsys.readouterr().err and not out.exists()

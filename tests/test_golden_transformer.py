"""Parity of the masked transformer with the published implementation; its other settings against a naive
second one."""
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from musekit.core.losses import masked_cross_entropy
from musekit.models.pretrained import load_weights
from musekit.models.transformer import MaskGitTransformer
from musekit.inference.pipeline import TokenPipeline

NAMES = ("transformer_class", "transformer_text")


def read(golden, name):
    "The model of a fixture and what the published implementation answered."
    return MaskGitTransformer.from_pretrained(golden / name), load_file(golden / name / "io.safetensors")


@torch.no_grad()
def logits_of(model, io, **keywords):
    return model(io["input_ids"], io.get("encoder_hidden_states"), **keywords)


@pytest.mark.parametrize("name", NAMES)
def test_logits(golden, name):
    model, io = read(golden, name)
    assert (logits_of(model, io) - io["logits"]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_masked_rows(golden, name):
    model, io = read(golden, name)
    masked = io["labels"] != -100
    assert (logits_of(model, io, token_mask=masked) - io["logits"][masked]).abs().max() <= 1e-4
    assert (io["input_ids"][masked] == model.config.mask_token_id).all()


@torch.no_grad()
def test_logits_of_the_image_alone(golden):
    model, io = read(golden, "transformer_class")
    image_ids, masked = io["input_ids"][:, 1:], io["labels"][:, 1:] != -100
    expected = io["logits"][:, 1:]
    assert (model(image_ids, class_ids=io["class_ids"]) - expected).abs().max() <= 1e-4
    rows = model(image_ids, class_ids=io["class_ids"], token_mask=masked, grid=(4, 4))
    assert (rows - expected[masked]).abs().max() <= 1e-4
    assert (io["labels"][:, 0] == -100).all(), "the class token is never a label"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", ("all positions", "labelled positions"))
def test_losses(golden, name, rows):
    model, io = read(golden, name)
    labels, keywords = io["labels"], {}
    if rows == "labelled positions":
        keywords, labels = {"token_mask": labels != -100}, labels[labels != -100]
    logits = logits_of(model, io, **keywords)
    plain, smoothed = (masked_cross_entropy(logits, labels, label_smoothing=share) for share in (0, 0.1))
    assert plain.item() == pytest.approx(io["loss"].item(), abs=1e-5)
    assert smoothed.item() == pytest.approx(io["loss_label_smoothing_0_1"].item(), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_saved_as_safetensors_it_is_the_same_model(golden, tmp_path, name):
    model, io = read(golden, name)
    model.save_pretrained(tmp_path)
    again, published = MaskGitTransformer.from_pretrained(tmp_path), load_weights(golden / name)
    assert again.config == model.config and published.keys() == again.state_dict().keys()
    assert torch.equal(logits_of(again, io), logits_of(model, io))


# A second implementation, in the order and with the names of published files, one image after the other.

def random_settings(seed):
    "A member of the family, as its config.json tells."
    draw = random.Random(seed)
    coin = lambda: draw.random() < 0.5
    conv, use_mlm, heads = coin(), coin(), draw.choice((1, 2, 4))
    patch = draw.choice((1, 2, 4)) if conv and use_mlm else 1
    classes = None if conv or coin() else 5
    return {
        "_class_name": "MaskGitTransformer",
        "_version": "0.0.1",
        "codebook_size": 13,
        "num_classes": classes,
        "vocab_size": 13 + (classes or 0) + draw.choice((1, 4)),
        "hidden_size": 8 * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
        "intermediate_size": 20,
        "embedding_size": draw.choice((6, None)) if conv else None,
        "num_vq_tokens": 64,
        "patch_size": patch,
        "max_position_embeddings": draw.choice((65, 80)),
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "add_cross_attention": coin(),
        "encoder_hidden_size": 10,
        "project_encoder_hidden_states": coin(),
        "norm_type": draw.choice(("layernorm", "rmsnorm")),
        "layer_norm_eps": draw.choice((1e-6, 1e-5)),
        "use_normformer": coin(),
        "use_encoder_layernorm": coin(),
        "use_mlm_layer": use_mlm,
        "use_mlm_layernorm": coin(),
        "use_bias": coin(),
        "use_codebook_size_for_output": coin(),
        "use_conv_in_out": conv,
        "initializer_range": 0.02,
    }


class Naive:
    "Makes the weights it asks for, so that their names and shapes are checked, too."

    def __init__(self, settings, seed):
        self.settings, self.weights = settings, {}
        self.generator = torch.Generator().manual_seed(seed)

    def __getattr__(self, name):
        return self.settings[name]

    def weight(self, name, *shape):
        if name not in self.weights:
            self.weights[name] = torch.randn(shape, generator=self.generator) * 0.4 + (len(shape) == 1)
        return self.weights[name]

    def linear(self, name, x, out, kernel=()):
        weight = self.weight(f"{name}.weight", out, x.shape[-1], *kernel).flatten(1)
        return x @ weight.T + (self.weight(f"{name}.bias", out) if self.use_bias else 0)

    def norm(self, name, x, kind=None):
        weight = self.weight(f"{name}.weight", x.shape[-1])
        if (kind or self.norm_type) == "rmsnorm":
            return weight * x / (x.square().mean(-1, keepdim=True) + self.layer_norm_eps).sqrt()
        x = x - x.mean(-1, keepdim=True)
        x = weight * x / (x.square().mean(-1, keepdim=True) + self.layer_norm_eps).sqrt()
        return x + (self.weight(f"{name}.bias", x.shape[-1]) if self.use_bias else 0)

    def attention(self, name, x, context):
        q, k, v = (self.linear(f"{name}.{part}", y, self.hidden_size)
                   for part, y in (("query", x), ("key", context), ("value", context)))
        wide = self.hidden_size // self.num_attention_heads
        parts = [slice(head * wide, (head + 1) * wide) for head in range(self.num_attention_heads)]
        heads = [(q[:, p] @ k[:, p].T / math.sqrt(wide)).softmax(-1) @ v[:, p] for p in parts]
        return self.linear(f"{name}.out", torch.cat(heads, -1), self.hidden_size)

    def layer(self, name, x, text):
        post = lambda norm, y: self.norm(f"{name}.{norm}", y) if self.use_normformer else y
        y = self.norm(f"{name}.attn_layer_norm", x)
        x = x + post("post_attn_layer_norm", self.attention(f"{name}.attention", y, y))
        if self.add_cross_attention:
            y = self.attention(f"{name}.crossattention", self.norm(f"{name}.crossattn_layer_norm", x), text)
            x = x + post("post_crossattn_layer_norm", y)
        y = self.norm(f"{name}.ffn.pre_mlp_layer_norm", x, "layernorm")
        gate, value = (self.linear(f"{name}.ffn.wi_{i}", y, self.intermediate_size) for i in (0, 1))
        gated = post("ffn.mid_mlp_layer_norm", gate * (1 + torch.erf(gate / math.sqrt(2))) / 2 * value)
        return x + self.linear(f"{name}.ffn.wo", gated, self.hidden_size)

    def embed(self, ids, grid):
        channels, dim = self.embedding_size or self.hidden_size, self.hidden_size
        if not self.use_conv_in_out:
            places = self.weight("embed.position_embeddings.weight", self.max_position_embeddings, dim)
            return self.weight("embed.word_embeddings.weight", self.vocab_size, dim)[ids] + places[: len(ids)]
        x = self.weight("embed.embeddings.weight", self.vocab_size, channels)[ids]
        x = self.norm("embed.layer_norm", x).T.unflatten(1, grid)
        x = F.pixel_unshuffle(x[None], self.patch_size)[0].flatten(1).T
        x = self.linear("embed.conv", x, dim, kernel=(1, 1))
        return x + self.weight("embed.position_embeddings.weight", 256, dim)[: len(x)]

    def head(self, x, grid):
        out = self.codebook_size if self.use_codebook_size_for_output else self.vocab_size
        if not self.use_mlm_layer:
            return self.linear("to_logits", x, out)
        if not self.use_conv_in_out:
            x = F.gelu(self.linear("mlm_layer.mlm_dense", x, self.hidden_size))
            x = self.norm("mlm_layer.mlm_ln", x) if self.use_mlm_layernorm else x
            return self.linear("mlm_layer.to_logits", x, out)
        channels, patch = self.embedding_size or self.hidden_size, self.patch_size
        x = self.linear("mlm_layer.conv1", x, channels * patch**2, kernel=(1, 1))
        x = F.pixel_shuffle(x.T.unflatten(1, [side // patch for side in grid])[None], patch)[0]
        x = self.norm("mlm_layer.layer_norm.norm", x.flatten(1).T)
        return self.linear("mlm_layer.conv2", x, out, kernel=(1, 1))

    def __call__(self, ids, text, grid):
        x = self.embed(ids, grid)
        if self.add_cross_attention and self.project_encoder_hidden_states:
            text = self.norm("encoder_proj_layer_norm", self.linear("encoder_proj", text, self.hidden_size))
        for number in range(self.num_hidden_layers):
            x = self.layer(f"transformer_layers.{number}", x, text)
        return self.head(self.norm("encoder_layer_norm", x) if self.use_encoder_layernorm else x, grid)


def inputs_of(settings, seed, grid):
    "Ids (2, N), text states if the model reads them, class ids if it knows classes."
    torch.manual_seed(seed)
    ids = torch.randint(settings["codebook_size"], (2, math.prod(grid)))
    ids[torch.rand(ids.shape) < 0.5] = settings["vocab_size"] - 1
    text = torch.randn(2, 7, 10) if settings["add_cross_attention"] else None
    classes = torch.randint(settings["num_classes"], (2,)) if settings["num_classes"] else None
    return ids, text, classes


def published_folder(folder, settings, weights):
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(settings | {"mask_token_id": settings["vocab_size"] - 1}))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("seed", range(24))
def test_any_settings_agree_with_the_naive_implementation(tmp_path, seed):
    settings = random_settings(seed)
    grid = (8, 8) if seed % 2 or not settings["use_conv_in_out"] else (4, 12)
    ids, text, classes = inputs_of(settings, seed, grid)
    sequence = ids if classes is None else torch.cat([13 + classes[:, None], ids], 1)
    naive = Naive(settings, seed)
    expected = torch.stack(
        [naive(row, None if text is None else text[i], grid) for i, row in enumerate(sequence)]
    )
    model = MaskGitTransformer.from_pretrained(published_folder(tmp_path, settings, naive.weights))
    assert model.state_dict().keys() == naive.weights.keys()
    close = {"atol": 1e-4 * float(expected.abs().max().clamp(min=1)), "rtol": 0}
    torch.testing.assert_close(model(sequence, text, grid=grid), expected, **close)
    image = expected if classes is None else expected[:, 1:]
    torch.testing.assert_close(model(ids, text, classes, grid=grid), image, **close)
    mask = torch.rand(ids.shape) < 0.4
    torch.testing.assert_close(model(ids, text, classes, grid=grid, token_mask=mask), image[mask], **close)


@pytest.mark.parametrize("seed", range(24))
def test_any_settings_learn_and_are_saved(tmp_path, seed):
    settings = random_settings(seed)
    ids, text, classes = inputs_of(settings, seed, (8, 8))
    model = MaskGitTransformer.from_config(settings)
    masked = ids == model.config.mask_token_id
    model.gradient_checkpointing = bool(seed % 2)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(4):
        logits = model(ids, text, classes, token_mask=masked)
        losses.append(masked_cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)))
        optimizer.zero_grad()
        losses[-1].backward()
        assert not [name for name, weight in model.named_parameters() if weight.grad is None]
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(ids, text, classes)
        assert torch.equal(MaskGitTransformer.from_pretrained(tmp_path)(ids, text, classes), logits)
        half = MaskGitTransformer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)(ids, text, classes)
    assert half.dtype == torch.bfloat16 and (half.float() - logits).norm() / logits.norm() < 0.1


def test_the_pipeline_decodes_by_class():
    torch.manual_seed(0)
    model = MaskGitTransformer(
        19,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        codebook_size=13,
        num_classes=5,
        num_vq_tokens=16,
        max_position_embeddings=17,
    )
    pipeline = TokenPipeline(model)
    draw = lambda *classes, **options: pipeline.ids(
        conditions={"class_ids": torch.tensor(classes)}, seed=0, steps=4, **options
    )
    assert pipeline.grid == (4, 4)
    ids = draw(1, 4, guidance_scale=1)
    assert ids.shape == (2, 16) and ids.max() < 13
    assert torch.equal(ids, draw(1, 4, guidance_scale=1, batch_size=1))
    away = draw(1, 4, guidance_scale=3, negative_prompt={"class_ids": torch.tensor([0])})
    assert away.shape == ids.shape and not torch.equal(away, ids)


@pytest.mark.parametrize("classes", [None, 10])
def test_conditions_that_were_read_once_give_the_same_logits(classes):
    torch.manual_seed(0)
    model = MaskGitTransformer(
        vocab_size=75,
        codebook_size=64,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_vq_tokens=16,
        max_position_embeddings=17,
        num_classes=classes,
        add_cross_attention=True,
        encoder_hidden_size=32,
        project_encoder_hidden_states=True,
    ).eval()
    ids, text = torch.randint(64, (3, 16)), torch.randn(3, 7, 32)
    mask = torch.arange(7) < torch.tensor([[7], [5], [3]])
    conditions = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    conditions |= {"class_ids": torch.tensor([1, 5, 9])} if classes else {}
    ready = model.precompute(**conditions)
    assert {len(value) for value in ready.values()} == {3}
    model.encoder_proj.register_forward_hook(lambda *_: pytest.fail("the text was read again"))
    expected = None
    with torch.no_grad():
        got = model(ids, precomputed=ready)
        model.encoder_proj._forward_hooks.clear()
        expected = model(ids, **conditions)
    assert torch.allclose(got, expected, atol=1e-5)


@torch.no_grad()
def test_a_model_without_layers_is_read_once_too():
    sizes = dict(
        vocab_size=17,
        codebook_size=16,
        hidden_size=16,
        num_hidden_layers=0,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = MaskGitTransformer(
        **sizes, num_vq_tokens=16, add_cross_attention=True, encoder_hidden_size=8
    ).eval()
    ids, text = torch.randint(16, (2, 16)), torch.randn(2, 3, 8)
    assert torch.equal(model(ids, precomputed=model.precompute(text)), model(ids, text))

"""Parity of the image tokenizers with the published ones, and what their other configurations hold."""
import pytest
import torch
from safetensors.torch import load_file

from musekit.models.pretrained import load_weights
from musekit.models.maskgit_vqgan import MaskGitVQGAN
from musekit.models.movq import MOVQ
from musekit.models.paella_vq import PaellaVQModel
from musekit.models.vqgan import VQGANModel

FAMILIES = {"vqgan": VQGANModel, "maskgit_vqgan": MaskGitVQGAN, "movq": MOVQ, "paella_vq": PaellaVQModel}
GRIDS = {"vqgan": 16, "maskgit_vqgan": 16, "movq": 16, "paella_vq": 8}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def read(golden, family):
    "The model of a fixture and what the published implementation answered."
    return FAMILIES[family].from_pretrained(golden / family), load_file(golden / family / "io.safetensors")


@torch.no_grad()
def test_tokens_and_codes(read):
    model, io = read
    quantized, ids = model.encode(io["pixel_values"])
    assert torch.equal(ids, io["tokens"]) and torch.equal(model.get_code(io["pixel_values"]), io["tokens"])
    assert (quantized - io["quantized"]).abs().max() <= 1e-4


@torch.no_grad()
def test_half_precision_reads_images_and_codes_of_any_type(golden, family):
    model = FAMILIES[family].from_pretrained(golden / family, torch_dtype="bfloat16")
    pixels = load_file(golden / family / "io.safetensors")["pixel_values"]
    quantized, ids = model.encode(pixels)
    assert torch.equal(ids, model.get_code(pixels.bfloat16())) and quantized.dtype == torch.bfloat16
    assert torch.equal(model.decode(quantized.float()), model.decode(quantized))


def test_images_of_another_kind_are_refused(read):
    model, io = read
    for wrong in ((255 * io["pixel_values"]).byte(), io["pixel_values"][0]):
        with pytest.raises(ValueError, match="in floating point, from 0 to 1; got"):
            model.get_code(wrong)


@torch.no_grad()
@pytest.mark.parametrize("form", ("quantized", "tokens", "tokens and grid", "pixels"))
def test_images(read, family, form):
    model, io = read
    grid = (GRIDS[family], GRIDS[family])
    ways = {
        "quantized": lambda: model.decode(io["quantized"]), "tokens": lambda: model.decode_code(io["tokens"]),
        "tokens and grid": lambda: model.decode_code(io["tokens"], grid),
        "pixels": lambda: model(io["pixel_values"]),
    }
    assert (ways[form]() - io["decoded"]).abs().max() <= 1e-4


@torch.no_grad()
def test_soft_codes(read, family):
    model, io = read
    soft, nearest = model.get_soft_code(io["pixel_values"], temp=0.7)
    assert torch.equal(nearest, io["tokens"]) and torch.equal(soft.argmax(-1), io["tokens"])
    distances = torch.cdist(model.quantize.flatten(model.latents(io["pixel_values"])), model.quantize.codes)
    distances = distances if family in ("movq", "paella_vq") else distances.square()
    assert (soft.flatten(0, 1) - (-distances / 0.7).softmax(-1)).abs().max() <= 1e-4
    published = io.get("soft_code_temp_0_7", soft)
    assert (soft - published).abs().max() <= 1e-4
    assert ("soft_code_temp_0_7" in io) == (family == "maskgit_vqgan")


@torch.no_grad()
def test_one_image_at_a_time(read):
    model, io = read
    assert torch.equal(torch.cat([model.get_code(image[None]) for image in io["pixel_values"]]), io["tokens"])


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same_model(golden, family, read, tmp_path):
    model, io = read
    model.save_pretrained(tmp_path)
    again, published = FAMILIES[family].from_pretrained(tmp_path), load_weights(golden / family)
    assert again.config == model.config
    assert (
        list(again.state_dict()) == list(model.state_dict()) and again.state_dict().keys() == published.keys()
    )
    assert all(torch.equal(published[name], tensor) for name, tensor in again.state_dict().items())
    assert torch.equal(again(io["pixel_values"]), model(io["pixel_values"]))


def test_it_learns_through_the_codes(read):
    model, io = read
    images, loss = model.train()(io["pixel_values"], return_loss=True)
    ((images - io["pixel_values"]).square().mean() + loss).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    expected = [".k.bias", "conv_in.bias"]  # softmax is blind to one, a group norm may be to the other
    assert not [name for name in silent if not name.endswith(tuple(expected))]


# Names and shapes of other configurations, by the rules that the published checkpoints show.

def block(name, a, b, shortcut_from, bias=True, norm=("",)):
    parts = {}
    for i, width in ((1, a), (2, b)):
        parts |= {f"{name}.norm{i}{part}": shape for part, shape in normed(width, norm).items()}
        parts |= conv(f"{name}.conv{i}", width, b, 3, bias)
    return parts if a == b else parts | conv(f"{name}.nin_shortcut", shortcut_from, b, 1, bias)


def conv(name, a, b, size, bias=True):
    return {f"{name}.weight": (b, a, size, size)} | ({f"{name}.bias": (b,)} if bias else {})


def normed(width, codes):
    "A norm's tensors; `codes` is the width of the codes where it reads them."
    if codes == ("",):
        return {".weight": (width,), ".bias": (width,)}
    tensors = {".norm_layer.weight": (width,), ".norm_layer.bias": (width,)}
    return tensors | conv(".conv_y", codes, width, 1) | conv(".conv_b", codes, width, 1)


def test_names_of_a_larger_maskgit_vqgan():
    model = MaskGitVQGAN(
        hidden_channels=32, channel_mult=(1, 2, 4), num_res_blocks=3, z_channels=8, quantized_embed_dim=8)
    expected, widths = {"quantize.embedding.weight": (1024, 8)}, (32, 64, 128)
    expected |= conv("encoder.conv_in", 3, 32, 3, bias=False) | conv("encoder.conv_out", 128, 8, 1)
    expected |= conv("decoder.conv_in", 8, 128, 3) | conv("decoder.conv_out", 32, 3, 3)
    for side, last in (("encoder", 128), ("decoder", 32)):
        expected |= {f"{side}.norm_out{part}": shape for part, shape in normed(last, ("",)).items()}
        for j in range(3):
            expected |= block(f"{side}.mid.{j}", 128, 128, 128, bias=False)
    for i, width in enumerate(widths):
        for side, before in (("encoder.down", widths[max(i - 1, 0)]), ("decoder.up", widths[min(i + 1, 2)])):
            for j in range(3):
                a = before if j == 0 else width
                expected |= block(f"{side}.{i}.block.{j}", a, width, width, bias=False)
        expected |= conv(f"decoder.up.{i}.upsample_conv", width, width, 3) if i else {}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_names_of_a_larger_movq():
    model = MOVQ(resolution=32, hidden_channels=32, channel_mult=(1, 2, 4), num_res_blocks=1,
                 attn_resolutions=(8, 16), num_embeddings=9)
    expected, widths = {"quantize.embedding.weight": (9, 4)}, (32, 64, 128)
    expected |= conv("quant_conv", 4, 4, 1) | conv("post_quant_conv", 4, 4, 1)
    expected |= conv("encoder.conv_in", 3, 32, 3) | conv("encoder.conv_out", 128, 4, 3)
    expected |= conv("decoder.conv_in", 4, 128, 3) | conv("decoder.conv_out", 32, 3, 3)

    def attention(name, width, codes):
        linear = {f"{name}.{part}.weight": (width, width) for part in ("q", "k", "v", "proj_out")}
        linear |= {name.replace("weight", "bias"): (width,) for name in linear}
        return linear | {f"{name}.norm{part}": shape for part, shape in normed(width, codes).items()}

    for side, codes, last, blocks in (("encoder", ("",), 128, 1), ("decoder", 4, 32, 2)):
        expected |= {f"{side}.norm_out{part}": shape for part, shape in normed(last, codes).items()}
        expected |= attention(f"{side}.mid.attn_1", 128, codes)
        for j in (1, 2):
            expected |= block(f"{side}.mid.block_{j}", 128, 128, 128, norm=codes)
        level, step = ("down", -1) if side == "encoder" else ("up", 1)
        for i, width in enumerate(widths):
            before = widths[min(max(i + step, 0), 2)]
            for j in range(blocks):
                a = before if j == 0 else width
                expected |= block(f"{side}.{level}.{i}.block.{j}", a, width, a, norm=codes)
                expected |= attention(f"{side}.{level}.{i}.attn.{j}", width, codes) if i else {}
            resampled = i < 2 if side == "encoder" else i > 0
            expected |= conv(f"{side}.{level}.{i}.{level}sample.conv", width, width, 3) if resampled else {}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


@torch.no_grad()
@pytest.mark.parametrize("model_class", (VQGANModel, MOVQ))
@pytest.mark.parametrize("num_res_blocks, run", ((1, False), (2, True)))
def test_a_single_attention_of_a_level_is_held_and_not_run(model_class, num_res_blocks, run):
    sizes = {
        "hidden_channels": 32,
        "channel_mult": (1, 1),
        "z_channels": 8,
        "num_embeddings": 4,
        "quantized_embed_dim": 4,
    }
    model = model_class(resolution=16, num_res_blocks=num_res_blocks, attn_resolutions=(16,), **sizes).eval()
    pixels = torch.rand(1, 3, 16, 16)
    before = model.latents(pixels)
    for attention in model.encoder.down[0].attn:
        attention.proj_out.weight.add_(1.0)
    assert len(model.encoder.down[0].attn) == num_res_blocks
    assert torch.equal(model.latents(pixels), before) != run


@pytest.mark.parametrize(
    "changes",
    (
        {"num_embeddings": 16, "quantized_embed_dim": 8},
        {"quantizer": "vq", "num_embeddings": 16, "quantized_embed_dim": 8},
        {"quantizer": "fsq", "quantizer_params": {"levels": [5, 4]}},
        {"quantizer": "lfq", "num_embeddings": 64},
    ),
)
def test_old_and_new_settings_of_vqgan(tmp_path, changes):
    old = {"hidden_channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "z_channels": 8}
    model = VQGANModel.from_config({"_class_name": "VQGANModel", **old, **changes}).eval()
    model.save_pretrained(tmp_path)
    again = VQGANModel.from_pretrained(tmp_path)
    assert again.config == model.config
    expected = {"fsq": (20, 2), "lfq": (64, 6)}.get(changes.get("quantizer"), (16, 8))
    assert (again.codebook_size, again.quantize.dim) == expected
    assert (again.config.num_embeddings, again.config.quantized_embed_dim) == expected
    ids = torch.arange(16).view(1, 16)
    with torch.no_grad():
        assert torch.equal(again.decode_code(ids), model.decode_code(ids))

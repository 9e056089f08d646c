"""Parity of Paella's tokenizer with the published implementation, in every way that leads to an id or an image."""
import pytest
import torch
from safetensors.torch import load_file

from musekit.models.paella_vq import PaellaVQModel


@pytest.fixture(scope="module")
def read(golden):
    "The model of the fixture and what the published implementation answered."
    return PaellaVQModel.from_pretrained(golden / "paella_vq"), load_file(golden / "paella_vq" / "io.safetensors")


@torch.no_grad()
def test_tokens_and_codes(read):
    model, io = read
    quantized, ids = model.encode(io["pixel_values"])
    assert torch.equal(ids, io["tokens"])
    assert (quantized - io["quantized"]).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("given", ("quantized", "tokens", "tokens and grid", "pixels"))
def test_images(read, given):
    model, io = read
    ways = {
        "quantized": lambda: model.decode(io["quantized"]), "tokens": lambda: model.decode_code(io["tokens"]),
        "tokens and grid": lambda: model.decode_code(io["tokens"], (8, 8)), "pixels": lambda: model(io["pixel_values"]),
    }
    assert (ways[given]() - io["decoded"]).abs().max() <= 1e-4


@torch.no_grad()
def test_one_image_at_a_time(read):
    model, io = read
    assert torch.equal(torch.cat([model.get_code(image[None]) for image in io["pixel_values"]]), io["tokens"])


@torch.no_grad()
def test_saved_and_loaded(read, tmp_path):
    model, io = read
    model.save_pretrained(tmp_path)
    loaded = PaellaVQModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys() and "vquantizer.codebook.weight" in loaded.state_dict()
    assert torch.equal(loaded(io["pixel_values"]), model(io["pixel_values"]))

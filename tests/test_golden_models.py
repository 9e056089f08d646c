"""Parity of the U-ViT with the published implementation, and reading and writing model files."""
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musekit.core.losses import masked_cross_entropy
from musekit.models.pretrained import PretrainedModel, load_weights
from musekit.models.uvit import MaskGiTUViT

UVITS = ("uvit", "uvit_downsample")
ROOT = Path(__file__).parent.parent


def read(golden, model_class, name):
    "The model of a fixture and what the published implementation answered."
    return model_class.from_pretrained(golden / name), load_file(golden / name / "io.safetensors")


def logits_of(model, io, **keywords):
    inputs = [io[key] for key in ("input_ids", "encoder_hidden_states", "cond_embeds", "micro_conds")]
    with torch.no_grad():
        return model(*inputs, **keywords)


@pytest.mark.parametrize("name", UVITS)
def test_uvit_logits(golden, name):
    model, io = read(golden, MaskGiTUViT, name)
    assert (logits_of(model, io) - io["logits"]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", UVITS)
def test_uvit_logits_of_masked_rows(golden, name):
    model, io = read(golden, MaskGiTUViT, name)
    masked = io["labels"] != -100
    assert (logits_of(model, io, token_mask=masked) - io["logits"][masked]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", UVITS)
def test_uvit_logits_in_halves_of_the_batch_and_with_a_grid(golden, name):
    model, io = read(golden, MaskGiTUViT, name)
    first = {key: value[:1] for key, value in io.items()}
    assert (logits_of(model, first, grid=(8, 8)) - io["logits"][:1]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", UVITS)
@pytest.mark.parametrize("rows", ("all positions", "labelled positions"))
def test_uvit_losses(golden, name, rows):
    model, io = read(golden, MaskGiTUViT, name)
    labels, keywords = io["labels"], {}
    if rows == "labelled positions":
        keywords, labels = {"token_mask": labels != -100}, labels[labels != -100]
    logits = logits_of(model, io, **keywords)
    plain = masked_cross_entropy(logits, labels)
    smoothed = masked_cross_entropy(logits, labels, label_smoothing=0.1)
    assert plain.item() == pytest.approx(io["loss"].item(), abs=1e-5)
    assert smoothed.item() == pytest.approx(io["loss_label_smoothing_0_1"].item(), abs=1e-5)


@pytest.mark.parametrize("name", UVITS)
def test_uvit_weighted_loss_over_all_tokens(golden, name):
    model, io = read(golden, MaskGiTUViT, name)
    logits, weights = logits_of(model, io), io["loss_weight"]
    loss = masked_cross_entropy(logits, io["image_tokens"], label_smoothing=0.1, loss_weight=weights)
    assert loss.item() == pytest.approx(io["loss_weighted_all_tokens_ls_0_1"].item(), abs=1e-5)


@pytest.mark.parametrize("name", UVITS)
def test_uvit_masks_with_its_last_id(golden, name):
    model, io = read(golden, MaskGiTUViT, name)
    assert model.config.mask_token_id == model.config.vocab_size - 1
    masked = io["labels"] != -100
    assert (io["input_ids"][masked] == model.config.mask_token_id).all()


@pytest.mark.parametrize("name", UVITS)
def test_saved_as_safetensors_it_is_the_same_model(golden, tmp_path, name):
    model = MaskGiTUViT.from_pretrained(golden / name)
    model.save_pretrained(tmp_path / "saved")
    again = MaskGiTUViT.from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    published = load_weights(golden / name)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"config.json", "model.safetensors"}
    assert published.keys() == again.state_dict().keys()
    assert all(torch.equal(published[key], value) for key, value in again.state_dict().items())


def test_a_published_checkpoint_cut_into_shards(golden, tmp_path):
    model, io = read(golden, MaskGiTUViT, "uvit")
    weights = load_weights(golden / "uvit")
    weight_map = {key: f"diffusion_pytorch_model-{i % 3}.safetensors" for i, key in enumerate(weights)}
    for file in set(weight_map.values()):
        save_file({key: weights[key] for key in weights if weight_map[key] == file}, tmp_path / file)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text((golden / "uvit/config.json").read_text())
    sharded = MaskGiTUViT.from_pretrained(tmp_path)
    assert torch.equal(logits_of(sharded, io), logits_of(model, io))


@torch.no_grad()
@pytest.mark.parametrize("without", [{"num_res_blocks": 0}, {"num_hidden_layers": 0}])
def test_a_uvit_without_blocks_or_layers_is_read_once_too(golden, without):
    torch.manual_seed(0)
    model = MaskGiTUViT.from_config(
        json.loads((golden / "uvit" / "config.json").read_text()) | without
    ).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    io = load_file(golden / "uvit" / "io.safetensors")
    conditions = [io[name] for name in ("encoder_hidden_states", "cond_embeds", "micro_conds")]
    logits = model(io["input_ids"], *conditions)
    assert logits.std() > 0.01
    torch.testing.assert_close(model(io["input_ids"], precomputed=model.precompute(*conditions)), logits)


def test_another_classs_folder_is_refused_by_name(golden):
    with pytest.raises(ValueError, match="settings of a VQGANModel"):
        MaskGiTUViT.from_pretrained(golden / "vqgan")


class Marker(PretrainedModel):
    def __init__(self, width=2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))


class Payload:
    "Unpickled, it creates a file."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    proof, folder = tmp_path / "executed", tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.is_dir(), "the payload must work, or the test proves nothing"
    proof.rmdir()
    for content in ({"weight": torch.zeros(2), "other": Payload(proof)}, Payload(proof)):
        torch.save(content, folder / "pytorch_model.bin")
        for strict in (True, False):
            with pytest.raises(ValueError, match="refused"):
                Marker.from_pretrained(folder, strict=strict)
        assert not proof.exists()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(proof), protocol=2))
    with pytest.raises(ValueError, match="refused"):
        Marker.from_pretrained(folder)
    assert not proof.exists()


def test_a_truncated_file_is_named(tmp_path):
    Marker().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        Marker.from_pretrained(tmp_path)


SAVE_AND_DIE = """
import os, sys
import musekit.models.weights
import musekit.models.pretrained as checkpoints

class Marker(checkpoints.PretrainedModel):
    def __init__(self, width=2):
        super().__init__()
        self.weight = checkpoints.nn.Parameter(checkpoints.torch.ones(width))

def dies(tensors, path, metadata=None):
    open(path, "wb").write(b"half a file")
    os._exit(9)

musekit.models.weights.save_file = dies
Marker().save_pretrained(sys.argv[1])
"""


def test_a_process_killed_while_saving_leaves_the_old_checkpoint(tmp_path):
    Marker().save_pretrained(tmp_path)
    died = subprocess.run([sys.executable, "-c", SAVE_AND_DIE, str(tmp_path)], cwd=ROOT)
    assert died.returncode == 9
    assert torch.equal(Marker.from_pretrained(tmp_path).weight, torch.zeros(2))
    Marker().save_pretrained(tmp_path)
    assert torch.equal(Marker.from_pretrained(tmp_path).weight, torch.zeros(2))


def test_models_are_imported_without_the_hub_and_without_a_figure():
    code = ("import sys, musekit.models.uvit, musekit.models.vqgan; print([name for name in "
            "('huggingface_hub', 'matplotlib', 'fastcore', 'transformers') if name in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr

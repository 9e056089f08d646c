"""MDLM's published checkpoints: equal log-probabilities from a folder, a file or the hub; others refused."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT
from hub_server import Hub
from musekit.models.mdlm import token_log_probs
from musekit.models.pretrained import load_model, read_config
from musekit.models.text_transformer import TextTransformer


@pytest.fixture
def io(golden):
    return load_file(golden / "mdlm" / "io.safetensors")


@torch.no_grad()
def largest_difference(model, io):
    """Of the log-probabilities; impossible tokens, about -1e6 there and -inf here, must be the same ones."""
    log_probs = token_log_probs(model, io["input_ids"])
    possible = io["log_probs"] > -1e5
    assert torch.equal(log_probs > -torch.inf, possible)
    return (log_probs - io["log_probs"])[possible].abs().max().item()


def test_a_folder(golden, io):
    for model in (load_model(golden / "mdlm"), TextTransformer.from_pretrained(golden / "mdlm")):
        assert type(model) is TextTransformer and not model.training
        assert largest_difference(model, io) <= 1e-5
    with torch.no_grad():
        assert (model(io["input_ids"]) - io["logits"][..., :-1]).abs().max() <= 1e-5


def test_the_mask_is_never_predicted_and_visible_tokens_stay(golden, io):
    model, ids = load_model(golden / "mdlm"), io["input_ids"]
    assert model.config.mask_token_id == model.config.codebook_size == 50
    assert model(ids).shape == (*ids.shape, 50)
    log_probs = token_log_probs(model, ids)
    assert (log_probs[..., 50] == -torch.inf)[ids == 50].all()
    visible = ids != 50
    assert torch.equal(log_probs[visible].exp(), torch.nn.functional.one_hot(ids[visible], 51).float())


def test_its_settings_are_those_of_a_text_transformer(golden):
    model, config = load_model(golden / "mdlm"), read_config(golden / "mdlm" / "config.json")
    assert config["_class_name"] == "TextTransformer"
    assert TextTransformer.from_config(config).config == model.config
    assert (model.config.max_length, model.config.num_hidden_layers, model.config.dropout) == (24, 3, 0.1)


@pytest.mark.parametrize("prefix", ["", "backbone.", "model.backbone.", "_orig_mod.backbone."])
@pytest.mark.parametrize("name", ["mdlm.safetensors", "mdlm.bin", "last.ckpt"])
def test_a_file_alone(golden, io, tmp_path, name, prefix):
    weights = load_file(golden / "mdlm" / "model.safetensors")
    weights = {f"{prefix}{name.removeprefix('backbone.')}": tensor for name, tensor in weights.items()}
    if name.endswith("safetensors"):
        save_file(weights, tmp_path / name)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if name == "last.ckpt" else weights, tmp_path / name)
    model = load_model(tmp_path / name)
    assert largest_difference(model, io) <= 1e-5
    assert (model.config.num_attention_heads, model.config.max_length) == (4, 1024)


FETCH = """
import sys
from musekit.models.pretrained import load_model
model = load_model("someone/mdlm-owt")
model.save_pretrained(sys.argv[1])
"""


def test_the_hub(golden, io, tmp_path):
    files = {path.name: path.read_bytes() for path in (golden / "mdlm").iterdir()}
    del files["io.safetensors"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with Hub({"someone/mdlm-owt": {"main": files}}) as hub:
        place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_TOKEN": "hf_none"}
        command = [sys.executable, "-c", FETCH, str(tmp_path / "saved")]
        done = subprocess.run(command, env=kept | place, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert largest_difference(TextTransformer.from_pretrained(tmp_path / "saved"), io) <= 1e-5


def test_half_precision(golden, io):
    model = load_model(golden / "mdlm", torch_dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and largest_difference(model, io) <= 0.1


@torch.no_grad()
def test_it_decodes_block_by_block_with_a_cache(golden):
    model = load_model(golden / "mdlm")
    ids = torch.randint(51, (2, 20), generator=torch.Generator().manual_seed(0))
    cache = model.cache()
    model(ids[:, :8], cache=cache, block_size=4)
    cached = model(ids[:, 8:12], cache=cache)
    assert (cached - model(ids[:, :12], block_size=4)[:, 8:]).abs().max() <= 1e-5


@pytest.fixture
def copy(golden, tmp_path):
    """A folder of the fixture that may be changed."""
    shutil.copytree(golden / "mdlm", tmp_path / "mdlm")
    for path in (tmp_path / "mdlm").iterdir():
        path.chmod(0o644)
    tmp_path.joinpath("mdlm").chmod(0o755)
    (tmp_path / "mdlm" / "io.safetensors").unlink()
    return tmp_path / "mdlm"


def refusal(path):
    with pytest.raises(ValueError) as error:
        load_model(path)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_wrong_tensors_are_refused_by_name(copy):
    weights = load_file(copy / "model.safetensors")

    def refused(**changes):
        changed = {name: changes.get(name.removeprefix("backbone."), weights[name]) for name in weights}
        changed = {name: tensor for name, tensor in changed.items() if tensor is not None}
        added = {f"backbone.{name}": tensor for name, tensor in changes.items() if "new" in name}
        save_file(changed | added, copy / "model.safetensors")
        return refusal(copy)

    assert "missing: blocks.2.norm2.weight. A published MDLM" in refused(**{"blocks.2.norm2.weight": None})
    assert "unexpected: new.weight. A published MDLM" in refused(**{"new.weight": torch.ones(2)})
    assert "norm1.weight is (2,), not (64,)" in refused(**{"blocks.0.norm1.weight": torch.ones(2)})
    assert "not an MDLM's: vocab_embed.embedding is missing" in refused(**{"vocab_embed.embedding": None})
    assert "is (4,), not a table" in refused(**{"vocab_embed.embedding": torch.ones(4)})
    assert "other frequencies" in refused(**{"rotary_emb.inv_freq": torch.ones(8)})
    assert "not finite" in refused(**{"blocks.0.mlp.2.weight": torch.full((64, 256), torch.nan)})


@pytest.mark.parametrize("changes, message", [
    ({"n_blocks": 10 ** 9}, "n_blocks is 3, not 1000000000"),
    ({"hidden_size": 128}, "hidden_size is 64, not 128"),
    ({"n_heads": 8}, "n_heads is 4, not 8"),
    ({"vocab_size": "many"}, "setting 'vocab_size' is 'many', but must be a whole number"),
    ({"time_conditioning": True}, "has the time as an input"),
    ({"model_type": "sedd"}, "unknown model class 'sedd'"),
])
def test_settings_of_another_model_are_refused(copy, changes, message):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    assert message in refusal(copy)


class Payload:
    "Unpickled, it creates a folder."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "alone.ckpt"])
def test_a_file_that_could_run_code_is_refused_and_not_run(copy, tmp_path, name):
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save({"state_dict": weights, "config": Payload(tmp_path / "ran")}, copy / name)
    assert "holds more than tensors" in refusal(copy / name if name == "alone.ckpt" else copy)
    assert not (tmp_path / "ran").exists()

"""Every family of tokenizers and every quantizer, trained on the spot by a run and given to another one."""
import pytest
import torch
from omegaconf import OmegaConf

from musekit.data.packing import write_shards
from musekit.recipes.text_to_image import Recipe, find_data, make_vq_model
from musekit.recipes.configure import configure
from commands import some_digits

SMALL = {
    "resolution": 16,
    "hidden_channels": 32,
    "channel_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "z_channels": 32,
}
FRESH = {
    "vqgan": {"num_embeddings": 16, "quantized_embed_dim": 8},
    "vqgan fsq": {"quantizer": "fsq", "quantizer_params": {"levels": [4, 4]}},
    "vqgan lfq": {"quantizer": "lfq", "num_embeddings": 4096},
    "maskgit_vqgan": {"num_embeddings": 16, "quantized_embed_dim": 32},
    "movq": {"num_embeddings": 16, "quantized_embed_dim": 4, "attn_resolutions": []},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(some_digits(range(20)), folder)
    return folder


def made_tokenizer(folder, shards, name, **section):
    "The folder of a run on small pictures, its data and its tokenizer."
    vq_model = {"type": name.split()[0], **section}
    text = {"type": "clip", "train": {"steps": 1, "hidden_size": 32, "layers": 1}}
    transformer = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "in_channels": 16,
        "block_out_channels": [16],
        "num_res_blocks": 1,
        "block_num_heads": 2,
        "micro_cond_encode_dim": 4,
        "micro_cond_embed_dim": 20,
    }
    settings = {
        "experiment": {"output_dir": str(folder)},
        "data": str(shards),
        "dataset": {"preprocessing": {"resolution": 16, "max_seq_length": 20}, "params": {"min_size": 0}},
        "model": {
            "vq_model": vq_model,
            "text_encoder": text,
            "architecture": "uvit",
            "transformer": transformer,
        },
        "training": {"max_train_steps": 1, "batch_size": 4, "encode_first": True},
    }
    OmegaConf.save(settings, folder / "run.yaml")
    recipe = Recipe(configure(folder / "run.yaml"), progress=False)
    data = find_data(recipe)
    return recipe.folder, data, make_vq_model(recipe, data)


@pytest.mark.parametrize("name", FRESH)
def test_made_by_one_run_and_given_to_another(tmp_path, shards, name):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    training = {"steps": 12, "log_every": 12}
    folder, data, trained = made_tokenizer(
        tmp_path / "first", shards, name, params=SMALL | FRESH[name], train=training
    )
    other, _, loaded = made_tokenizer(tmp_path / "second", shards, name, pretrained=str(folder / "vq_model"))
    pixels = next(data.pool.batches(4))["pixel_values"]
    ids = trained.get_code(pixels)
    assert torch.equal(loaded.get_code(pixels), ids) and not (other / "vq_model").exists()
    assert ids.shape == (4, 16) and 0 <= ids.min() and ids.max() < loaded.codebook_size
    assert trained.codebook_size == {"vqgan lfq": 4096}.get(name, 16)


def test_of_a_table_there_must_be_fewer_codes_than_tokens(tmp_path, shards):
    with pytest.raises(ValueError, match="fewer than the tokenizer's 4096 codes"):
        made_tokenizer(tmp_path, shards, "movq", params=SMALL | {"num_embeddings": 4096}, train={"steps": 1})

"""Run files and model files with the keys of published ones are accepted, and values that describe another
network are refused."""
import json
import warnings

import pytest
import torch
from omegaconf import OmegaConf

from conftest import ROOT
from musekit.recipes.memory import find_networks
from musekit.data.locate import expand_urls
from musekit.models.pretrained import find_model_class
from musekit.recipes.configure import configure
from musekit.models.weights import load_weights

PUBLISHED = ROOT / "tests" / "published"
RUNS = sorted(path.stem for path in PUBLISHED.glob("*.yaml") if path.stem != "joined_shards")
TWO_STAGES = {
    "cc12m_uvit_larger_paellavq_f8_clip",
    "coyo_f8_clip_embeds",
    "coyo_f8_preencoded",
    "laiona6plus_f8_preencoded",
    "laiona6plus_uvit_clip_f8",
}  # which the published U-ViT refuses as well
PATCHES = {"cc12m_uvit_paellavq", "cc12m_uvit_paellavq_larger"}  # two stages over patches of four tokens
TEMPLATE = [
    "wandb.entity=null",
    "experiment.name=mine",
    "experiment.project=muse",
    "experiment.output_dir=runs/mine",
    "experiment.max_train_examples=100",
    "data=a.tar",
    "dataset.params.eval_shards_path_or_url=b.tar",
    "dataset.params.shuffle_buffer_size=10",
    "dataset.params.num_workers=0",
    "optimizer.params.learning_rate=1e-4",
    "training.max_train_steps=10",
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    "The files that the runs name, beside an empty cache."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    (tmp_path / "validation_prompts").mkdir()
    (tmp_path / "validation_prompts" / "prompts.txt").write_text("a cat\n")
    (tmp_path / "classes.json").write_text('{"0": "cat", "1": "dog"}')
    (tmp_path / "weights").mkdir()
    return tmp_path


def read(name, *settings):
    "The configuration, and the warnings but the one about old keys."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        config = configure(PUBLISHED / f"{name}.yaml", list(settings))
    return config, [str(each.message) for each in caught if "Old keys" not in str(each.message)]


@pytest.mark.parametrize("name", RUNS)
def test_published_run_files(name, place):
    settings = TEMPLATE if name == "template_config" else []
    if name in TWO_STAGES | PATCHES:
        with pytest.raises(
            ValueError,
            match="patch_size=2 describes another network" if name in PATCHES else "one stage on each side",
        ):
            find_networks(read(name)[0])
        settings = ["model.transformer.block_out_channels=[1024]", "model.transformer.patch_size=1"]
        settings += ["model.transformer.hidden_size=1024", "model.transformer.num_attention_heads=16"]
    config, said = read(name, *settings)
    keys = OmegaConf.load(PUBLISHED / f"{name}.yaml").model.transformer
    unread = [
        key for key in keys if key not in config.model.transformer and key != "use_empty_embeds_for_uncond"
    ]
    about = [line for line in said if "Keys of model.transformer without effect" in line]
    assert len(about) <= 1
    if config.model.pretrained_model_path is None:
        assert bool(about) == bool(unread) and all(key in about[0] for key in unread)
        assert find_networks(config).transformer is not None


def test_what_is_built_otherwise_is_said(place):
    _, said = read("cc12m_uvit_clip")
    assert (
        sum(
            "It always has project_encoder_hidden_states=True, use_encoder_layernorm=False." in line
            for line in said
        )
        == 1
    )


def test_heads_fit_the_channels(place):
    config, _ = read("cc12m_uvit_clip")
    assert find_networks(config).transformer.config.block_num_heads == 16


@pytest.mark.parametrize(
    "setting",
    [
        "patch_size=2",
        "use_normformer=true",
        "add_cross_attention=false",
        "block_has_attention=[false]",
        "res_ffn_factor=2",
        "use_codebook_size_for_output=false",
        "num_classes=10",
        "ffn_type=vanilla",
        "use_vannilla_resblock=true",
        "learn_uncond_embeds=true",
        "use_position_embeddings=true",
        "use_quant_embeds=true",
    ],
)
def test_values_of_another_network(setting, place):
    key = setting.partition("=")[0]
    with pytest.raises(
        ValueError,
        match=rf"model\.transformer\.{key}=.* describes another network: a MaskGiTUViT supports {key}=",
    ):
        read("cc12m_uvit_clip", f"model.transformer.{setting}")


def test_the_plain_transformer_has_no_pooled_text(place):
    with pytest.raises(
        ValueError, match="add_cond_embeds=True describes another network: a MaskGitTransformer"
    ):
        read("cc12m", "model.transformer.add_cond_embeds=true")


def test_keys_that_moved(place):
    config, _ = read("research_run_512")
    assert (
        config.training.use_empty_embeds_for_uncond
        and "use_empty_embeds_for_uncond" not in config.model.transformer
    )
    config, _ = read("cc12m_uvit_clip", "model.transformer.use_empty_embeds_for_uncond=false")
    assert config.training.use_empty_embeds_for_uncond is False
    with pytest.raises(ValueError, match="contradict each other"):
        read(
            "cc12m_uvit_clip",
            "model.transformer.use_empty_embeds_for_uncond=false",
            "training.use_empty_embeds_for_uncond=true",
        )
    assert read("imagenet_text2image_movq_conv")[0].dataset.params.validation_prompts_file is None


def test_classes_without_a_layout(place):
    config, _ = read("imagenet")
    assert config.dataset.type == "classification" and config.model.text_encoder.type == "none"


def test_a_template_asks_for_what_it_leaves_open(place):
    with pytest.raises(ValueError, match="Missing: .*experiment.max_train_examples.*lr.*wandb.entity"):
        read("template_config")


@pytest.mark.parametrize("name", ["joined_shards", "joined_shards.yaml", str(PUBLISHED / "joined_shards")])
def test_a_list_of_shards_without_its_ending(name):
    urls = expand_urls(name, PUBLISHED)
    assert len(urls) == 6 and urls[-1] == "pipe:cat joined/1/00001.tar"


# What the first version of the published classes writes into config.json, beside the sizes.
FIRST_UVIT = {
    "_class_name": "MaskGiTUViT",
    "block_has_attention": [True],
    "ffn_type": "glu",
    "layer_norm_before_mlm": False,
    "layer_norm_embeddings": False,
    "learn_uncond_embeds": False,
    "max_position_embeddings": 256,
    "num_classes": None,
    "num_vq_tokens": 256,
    "patch_size": 1,
    "project_encoder_hidden_states": True,
    "res_ffn_factor": 4,
    "use_codebook_size_for_output": True,
    "use_empty_embeds_for_uncond": True,
    "use_encoder_layernorm": False,
    "use_normformer": False,
    "use_position_embeddings": False,
    "use_vannilla_resblock": False,
    "xavier_init_embed": True,
    "add_cross_attention": True,
    "initializer_range": 0.02,
}
FIRST_PLAIN = {
    "add_cond_embeds": False,
    "cond_embed_dim": None,
    "layer_norm_embeddings": False,
    "use_empty_embeds_for_uncond": False,
}
DERIVED = {"num_resolutions": 2, "reduction_factor": 2, "latent_size": 16}
OLDER = {
    "uvit": FIRST_UVIT,
    "transformer_text": FIRST_PLAIN,
    "transformer_class": FIRST_PLAIN,
    "vqgan": DERIVED,
    "movq": DERIVED,
    "maskgit_vqgan": DERIVED,
}


def stored(golden, family, folder, **changes):
    "A fixture with the configuration of an older checkpoint."
    config = json.loads((golden / family / "config.json").read_text()) | OLDER[family] | changes
    folder.mkdir(exist_ok=True)
    torch.save(load_weights(golden / family), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return find_model_class(config["_class_name"])


@pytest.mark.parametrize("family", OLDER)
def test_older_model_files_load(family, golden, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = stored(golden, family, tmp_path).from_pretrained(tmp_path)
    assert all(
        torch.equal(tensor, model.state_dict()[name])
        for name, tensor in load_weights(golden / family).items()
    )


@pytest.mark.parametrize("family, changes, message", [
    ("uvit", {"use_encoder_layernorm": True}, "use_encoder_layernorm=True describes another network"),
    ("uvit", {"block_has_attention": [False]}, "describes another network"),
    ("transformer_text", {"add_cond_embeds": True}, "add_cond_embeds=True describes another network"),
    ("vqgan", {"num_resolutions": 3}, "num_resolutions=3 contradicts"),
])
def test_model_files_of_other_networks(family, changes, message, golden, tmp_path):
    cls = stored(golden, family, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "family",
    [
        "uvit",
        "uvit_downsample",
        "transformer_text",
        "transformer_class",
        "vqgan",
        "maskgit_vqgan",
        "movq",
        "paella_vq",
    ],
)
def test_the_published_layout_is_written(family, golden, tmp_path):
    """Plain PyTorch reads the very tensors, config.json has the keys of the published class, and the model
    loads back."""
    config = json.loads((golden / family / "config.json").read_text())
    cls = find_model_class(config["_class_name"])
    model = cls.from_pretrained(golden / family)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]
    assert json.loads((tmp_path / "config.json").read_text()) == config
    tensors, published = torch.load(tmp_path / "pytorch_model.bin", weights_only=True), load_weights(
        golden / family
    )
    assert tensors.keys() == published.keys() and all(
        torch.equal(tensors[name], published[name]) for name in published
    )
    again = cls.from_pretrained(tmp_path)
    assert again.config == model.config and all(
        torch.equal(tensor, again.state_dict()[name]) for name, tensor in tensors.items()
    )


@pytest.mark.parametrize(
    "name, settings, message",
    [
        (
            "MaskGiTUViT",
            {
                "add_cond_embeds": False,
                "block_out_channels": [24],
                "block_num_heads": 3,
                "hidden_size": 16,
                "num_hidden_layers": 1,
            },
            "is always conditioned on pooled text",
        ),
        (
            "VQGANModel",
            {
                "quantizer": "fsq",
                "quantizer_params": {"levels": [5, 5]},
                "hidden_channels": 32,
                "channel_mult": [1, 1],
                "z_channels": 32,
                "num_res_blocks": 1,
            },
            "no quantizer 'fsq'",
        ),
    ],
)
def test_what_the_published_classes_do_not_have(name, settings, message, tmp_path):
    model = find_model_class(name).from_config(settings)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path, safe_serialization=False)

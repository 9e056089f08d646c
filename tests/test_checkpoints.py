"""Checkpoints from elsewhere: nothing in them runs, damage is named, and the hub is asked only where it
must be."""
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT
from hub_server import Hub
from musekit.models.maskgit_vqgan import MaskGitVQGAN
from musekit.models.movq import MOVQ
from musekit.models.paella_vq import PaellaVQModel
from musekit.models.transformer import MaskGitTransformer
from musekit.models.uvit import MaskGiTUViT
from musekit.models.vqgan import VQGANModel
from musekit.inference.pipeline import Pipeline
from musekit.training.ema import EMA, load_ema, save_ema
from musekit.models.weights import load_weights

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
TINY = dict(
    vocab_size=17,
    codebook_size=16,
    hidden_size=16,
    in_channels=16,
    block_out_channels=(16,),
    num_res_blocks=1,
    block_num_heads=2,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    encoder_hidden_size=8,
    cond_embed_dim=8,
    micro_cond_encode_dim=4,
    micro_cond_embed_dim=20,
    default_shape=(4, 4),
)


class Payload:
    "Creates a file when it is unpickled by a loader that trusts."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MaskGiTUViT(**TINY).eval()


@pytest.fixture
def saved(tmp_path, model):
    "A folder in our own layout."
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def as_bin(folder, **more):
    "Turns a folder into one with a pickle instead; gives its path."
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, **more}, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def equal(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        map(torch.equal, states[0].values(), states[1].values())
    )


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_does_not_run(tmp_path, saved, zipped, protocol):
    path, weights = as_bin(saved), torch.load(saved / "pytorch_model.bin", weights_only=True)
    torch.save(
        {**weights, "extra": Payload(tmp_path / "ran")},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(ValueError, match="was refused: loading it could run code"):
        MaskGiTUViT.from_pretrained(saved)
    with pytest.raises(ValueError, match="was refused"):
        MaskGiTUViT.from_pretrained(saved, strict=False)
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_does_not_run(tmp_path, saved):
    as_bin(saved).write_bytes(pickle.dumps({"weight": Payload(tmp_path / "ran")}))
    with pytest.raises(ValueError):
        MaskGiTUViT.from_pretrained(saved)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_among_shards_does_not_run(tmp_path, saved):
    weights = torch.load(as_bin(saved), weights_only=True)
    (saved / "pytorch_model.bin").unlink()
    torch.save(weights, saved / "one.bin")
    torch.save({"extra": Payload(tmp_path / "ran")}, saved / "two.bin")
    index = {"weight_map": dict.fromkeys(weights, "one.bin") | {"extra": "two.bin"}}
    (saved / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"two.bin holds more than tensors \(_?io.open\) and was refused"):
        MaskGiTUViT.from_pretrained(saved)
    assert not (tmp_path / "ran").exists()


def test_open_muse_layout(saved, model):
    as_bin(saved)
    config = json.loads((saved / "config.json").read_text()) | {
        "_class_name": "MaskGiTUViT_v2",
        "_version": "0.0.1",
        "mask_token_id": 16,
    }
    (saved / "config.json").write_text(json.dumps(config))
    assert equal(MaskGiTUViT.from_pretrained(saved), model)
    save_file(model.state_dict(), saved / "pytorch_model.safetensors")
    (saved / "pytorch_model.bin").unlink()
    assert equal(MaskGiTUViT.from_pretrained(saved), model)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_files_are_named(saved, name):
    path = as_bin(saved) if name.endswith("bin") else saved / name
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=name):
            MaskGiTUViT.from_pretrained(saved)
    for _ in range(20):
        path.write_bytes(bytes(torch.randint(256, (64,), generator=generator).tolist()))
        with pytest.raises(ValueError, match=name):
            MaskGiTUViT.from_pretrained(saved)


def test_shards_there_and_back(tmp_path, model):
    folder = tmp_path / "shards"
    model.save_pretrained(folder, max_shard_size="10KB")
    shards = sorted(path.name for path in folder.glob("model-*"))
    assert len(shards) > 3 and not (folder / "model.safetensors").exists()
    assert all((folder / name).stat().st_size < 20_000 for name in shards)
    assert equal(MaskGiTUViT.from_pretrained(folder), model)
    model.save_pretrained(folder, max_shard_size="40KB")
    assert equal(MaskGiTUViT.from_pretrained(folder), model)
    table = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(table.values()) == {path.name for path in folder.glob("model-*")} and len(
        set(table.values())
    ) < len(shards)
    model.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("../secret.safetensors", "not a plain file name"),
        ("/etc/passwd", "not a plain file name"),
        ("inner/x.safetensors", "not a plain file name"),
        ("..", "is missing"),
        ("absent.safetensors", "is missing; fetch that shard"),
        (3, "no weight_map"),
    ],
)
def test_an_index_cannot_point_elsewhere(tmp_path, saved, name, message):
    save_file({"secret": torch.zeros(1)}, tmp_path / "secret.safetensors")
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"secret": name}}))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_weights(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00"])
def test_damaged_json_is_named(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        MaskGiTUViT.from_pretrained(saved)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("hidden_size", "64", "a whole number"),
        ("hidden_size", 64.5, "a whole number"),
        ("hidden_size", None, "a whole number"),
        ("hidden_size", True, "a whole number"),
        ("use_bias", 1, "true or false"),
        ("layer_norm_eps", "1e-6", "a number"),
        ("norm_type", 3, "a text"),
        ("block_out_channels", ["16"], "a list"),
        ("hiden_size", 64, "'hidden_size'"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(saved, key, value, message):
    config = json.loads((saved / "config.json").read_text()) | {key: value}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{key}.*{message}"):
        MaskGiTUViT.from_pretrained(saved)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "key, value", [("num_attention_heads", 0), ("hidden_size", 0), ("intermediate_size", 0)]
)
def test_a_setting_of_which_nothing_can_be_built_is_named_alone(saved, key, value):
    config = json.loads((saved / "config.json").read_text()) | {key: value}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"do not describe a MaskGiTUViT \(.*\); change {key}=0\.$"):
        MaskGiTUViT.from_pretrained(saved)


def test_numbers_as_lists_of_one_are_read(saved, model):
    config = json.loads((saved / "config.json").read_text()) | {
        "block_num_heads": [2],
        "block_out_channels": 16,
    }
    (saved / "config.json").write_text(json.dumps(config))
    assert equal(MaskGiTUViT.from_pretrained(saved), model)


def test_wrong_names_shapes_and_types_are_listed(saved, model):
    weights = model.state_dict()
    cases = {
        "missing: encoder_proj.weight": {n: w for n, w in weights.items() if n != "encoder_proj.weight"},
        "unexpected: one_more": {**weights, "one_more": torch.zeros(1)},
        "wrong shape: encoder_proj.weight": {**weights, "encoder_proj.weight": torch.zeros(2, 2)},
        "wrong type: encoder_proj.weight is torch.int32": {
            **weights,
            "encoder_proj.weight": weights["encoder_proj.weight"].int(),
        },
    }
    for message, table in cases.items():
        save_file(table, saved / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            MaskGiTUViT.from_pretrained(saved)
        if message.startswith("wrong"):
            with pytest.raises(ValueError, match=message):
                MaskGiTUViT.from_pretrained(saved, strict=False)
        else:
            with pytest.warns(UserWarning, match="tensors are loaded"):
                assert MaskGiTUViT.from_pretrained(saved, strict=False).config.hidden_size == 16


PREFIXES = ("module.", "_orig_mod.", "model.", "transformer.", "vq_model.", "vae.", "module._orig_mod.net.")
PLAIN = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    vocab_size=17,
    codebook_size=16,
    num_vq_tokens=16,
    max_position_embeddings=16,
)
FAMILIES = {
    MaskGiTUViT: TINY,
    MaskGitTransformer: PLAIN,
    PaellaVQModel: dict(levels=2, c_hidden=16, codebook_size=16),
    **dict.fromkeys(
        (VQGANModel, MOVQ),
        dict(
            hidden_channels=32,
            channel_mult=(1,),
            num_res_blocks=1,
            resolution=8,
            attn_resolutions=(8,),
            z_channels=4,
            num_embeddings=16,
            quantized_embed_dim=4,
        ),
    ),
    MaskGitVQGAN: dict(
        hidden_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        z_channels=4,
        num_embeddings=16,
        quantized_embed_dim=4,
    ),
}


@pytest.mark.parametrize("cls", FAMILIES, ids=lambda cls: cls.__name__)
def test_names_with_a_prefix_load_in_every_family(tmp_path, cls):
    torch.manual_seed(0)
    network = cls.from_config(FAMILIES[cls]).eval()
    network.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for prefix in PREFIXES:
        save_file({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "model.safetensors")
        assert equal(cls.from_pretrained(tmp_path), network), prefix
    inside = {name.replace(".", "._fsdp_wrapped_module.", 1): tensor for name, tensor in weights.items()}
    torch.save(
        {"state_dict": {f"net.{name}": tensor for name, tensor in inside.items()}, "global_step": 3},
        tmp_path / "epoch=1.ckpt",
    )
    (tmp_path / "model.safetensors").unlink()
    assert equal(cls.from_pretrained(tmp_path), network) and equal(
        cls.from_pretrained(tmp_path / "epoch=1.ckpt"), network
    )
    (tmp_path / "epoch=1.ckpt").unlink()
    save_file(
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()},
        tmp_path / "model.fp16.safetensors",
    )
    for options in ({}, {"variant": "fp16"}):
        assert equal(
            cls.from_pretrained(tmp_path, torch_dtype=torch.float16, **options), network.half()
        ), options


@pytest.mark.parametrize("part", ["transformer", "vqvae"])
def test_names_with_a_prefix_load_from_diffusers_too(golden, tmp_path, part):
    cls = {"transformer": MaskGiTUViT, "vqvae": VQGANModel}[part]
    folder, weights = golden / "amused" / part, load_weights(golden / "amused" / part)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for prefix in PREFIXES:
        save_file(
            {prefix + name: tensor for name, tensor in weights.items()},
            tmp_path / "diffusion_pytorch_model.fp16.safetensors",
        )
        assert equal(cls.from_pretrained(tmp_path), cls.from_pretrained(folder)), prefix
    compiled = {
        name.replace("_block.", "_block._orig_mod.").replace("coder.", "coder._orig_mod."): tensor
        for name, tensor in weights.items()
    }
    save_file(compiled, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert compiled.keys() != weights.keys() and equal(
        cls.from_pretrained(tmp_path), cls.from_pretrained(folder)
    )


def test_a_file_of_a_whole_pipeline_gives_each_part_its_own(tmp_path, model):
    tokenizer = PaellaVQModel(levels=2, c_hidden=16, codebook_size=16).eval()
    together = {
        f"{part}.{name}": tensor
        for part, network in (("transformer", model), ("vq_model", tokenizer))
        for name, tensor in network.state_dict().items()
    }
    for network in (model, tokenizer):
        network.save_pretrained(tmp_path)
        save_file(together, tmp_path / "model.safetensors")
        with pytest.warns(
            UserWarning,
            match=f"{len(network.state_dict())} tensors under '.*' are loaded, .* others are ignored",
        ):
            assert equal(type(network).from_pretrained(tmp_path), network)


def test_averaged_weights_with_a_prefix_go_on(tmp_path, model):
    ema = EMA(model)
    save_ema(ema, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {f"_orig_mod.{name}": tensor + 1 for name, tensor in weights.items()}, tmp_path / "model.safetensors"
    )
    load_ema(ema, tmp_path)
    assert all(torch.equal(shadow, weights[name] + 1) for name, shadow in zip(ema.names, ema.shadow))
    compiled = EMA(torch.compile(model))
    load_ema(compiled, tmp_path)
    assert all(map(torch.equal, compiled.shadow, ema.shadow))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(saved, model, value):
    torch.nn.init.constant_(model.encoder_proj.weight, value)
    model.save_pretrained(saved)
    with pytest.raises(ValueError, match="saved: encoder_proj.weight of .* tensors not finite"):
        MaskGiTUViT.from_pretrained(saved)


def test_none_of_the_names_is_an_error_though_not_strict(saved):
    save_file({"up.weight": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="none of the file's 1 names"):
        MaskGiTUViT.from_pretrained(saved, strict=False)


@pytest.mark.parametrize("name", ["float16", "torch.bfloat16", torch.float64])
def test_types_by_name(saved, name):
    wanted = getattr(torch, name.removeprefix("torch.")) if isinstance(name, str) else name
    assert {p.dtype for p in MaskGiTUViT.from_pretrained(saved, torch_dtype=name).parameters()} == {wanted}


@pytest.mark.parametrize("name", ["int8", "fp7", torch.int64, 16])
def test_wrong_types_are_refused(saved, name):
    with pytest.raises(ValueError, match="torch_dtype="):
        MaskGiTUViT.from_pretrained(saved, torch_dtype=name)


ASK = """
import json, sys
from musekit.models.uvit import MaskGiTUViT

for action, name, options in json.loads(sys.argv[1]):
    try:
        if action == "push":
            print(MaskGiTUViT.from_pretrained(name).push_to_hub(**options))
        elif action == "command":
            from musekit import cli
            print("status", cli.main([name, *options]))
        elif action == "pipeline":
            from musekit.inference.pipeline import Pipeline
            pipeline = Pipeline.from_pretrained(name)
            print(type(pipeline.transformer).__name__, type(pipeline.vq_model).__name__, pipeline.grid)
        else:
            model = MaskGiTUViT.from_pretrained(name, **options)
            print("sum", sum(weight.double().sum().item() for weight in model.state_dict().values()))
    except (OSError, ValueError) as error:
        print(type(error).__name__, error)
"""


def ask(tmp_path, url, *requests, **environment):
    """What a fresh process answers that has a hub at this address and its cache in tmp_path, a line for
    each request."""
    hub = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_TOKEN": "hf_none",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", ASK, json.dumps(requests)]
    done = subprocess.run(command, env=kept | hub | environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def total(model):
    return f"sum {sum(weight.double().sum().item() for weight in model.state_dict().values())}"


def files_of(folder, prefix=""):
    return {prefix + path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_hub_and_its_cache(tmp_path, saved, model):
    other = {
        "vqvae/model.safetensors": b"not for us",
        "model.safetensors": b"neither",
        "transformer/pytorch_model.bin": b"nor this",
    }
    wanted = "load", "someone/model", {"subfolder": "transformer", "revision": "v1"}
    with Hub({"someone/model": {"main": other, "v1": {**files_of(saved, "transformer/"), **other}}}) as hub:
        missing, revision = ("load", "someone/nothing", {}), ("load", "someone/model", {"revision": "v2"})
        answers = ask(tmp_path, hub.url, wanted, missing, revision)
        fetched = {
            line.split("/resolve/")[1].split("/", 1)[1]
            for line in hub.requests
            if line.startswith("GET /someone")
        }
    assert answers[0] == total(model)
    assert fetched == {"transformer/config.json", "transformer/model.safetensors"}
    assert (
        answers[1].startswith("FileNotFoundError someone/nothing is no folder here")
        and "no such repository" in answers[1]
    )
    assert "has no revision 'v2'" in answers[2] and len(answers) == 3, "one line each"
    for environment in ({"HF_HUB_OFFLINE": "1"}, {}):  # nobody answers at this address any more
        answers = ask(tmp_path, hub.url, wanted, ("load", "someone/other", {}), **environment)
        assert answers[0] == total(model) and "not in the cache" in answers[1]


def test_pickles_and_shards_from_the_hub(tmp_path, saved, model):
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    as_bin(saved)
    with Hub(
        {"someone/shards": {"main": files_of(tmp_path / "shards")}, "someone/old": {"main": files_of(saved)}}
    ) as hub:
        assert ask(tmp_path, hub.url, ("load", "someone/shards", {}), ("load", "someone/old", {})) == 2 * [
            total(model)
        ]


def test_variants_on_the_hub(tmp_path, saved, model):
    "What is there twice is fetched once: plain, unless the variant is asked for or the only one."
    plain = files_of(saved)
    model.half().save_pretrained(saved)
    half = {
        "config.json": plain["config.json"],
        "model.fp16.safetensors": (saved / "model.safetensors").read_bytes(),
    }
    with Hub({"a/both": {"main": plain | half}, "a/half": {"main": half}}) as hub:
        requests = (
            ("a/both", {}),
            ("a/both", {"variant": "fp16"}),
            ("a/half", {}),
            ("a/half", {"variant": "bf16"}),
        )
        fetched = []
        for number, (name, options) in enumerate(requests):
            hub.requests.clear()
            answer, = ask(tmp_path / str(number), hub.url, ("load", name, options))
            names = {
                line.rsplit("/", 1)[1]
                for line in hub.requests
                if line.startswith("GET /a/") and line.endswith("safetensors")
            }
            fetched.append((names, answer == total(model.float()), answer))
    assert fetched[0][:2] == ({"model.safetensors"}, False) and fetched[0][2].startswith("sum")
    assert fetched[1][:2] == fetched[2][:2] == ({"model.fp16.safetensors"}, True)
    assert "no weights of variant 'bf16'" in fetched[3][2] and "there are: fp16" in fetched[3][2]


def test_push_to_hub(tmp_path, saved, model):
    def push(repository, **options):
        return "push", str(saved), {"repository": repository, **options}

    with Hub({}) as hub:
        pushed = push("me/new", facts={"loss": "1.5 after 40 steps"}, license="mit")
        answers = ask(tmp_path, hub.url, pushed, ("load", "me/new", {}), push("new"), push("locked/new"))
    uploaded = hub.repositories["me/new"]["main"]
    assert sorted(uploaded) == ["README.md", "config.json", "model.safetensors"]
    card = uploaded["README.md"].decode()
    assert (
        card.startswith("---\nlibrary_name: musekit\n")
        and "license: mit" in card
        and "| loss | 1.5 after 40 steps |" in card
    )
    assert 'model = load_model("me/new")' in card
    assert f"| total | {sum(weight.numel() for weight in model.state_dict().values()):,} |" in card
    assert answers[0].startswith(f"{hub.url}/me/new/commit/") and answers[1] == total(model)
    assert "no hub id" in answers[2] and "locked/new was not uploaded" in answers[3] and "403" in answers[3]
    answers = ask(tmp_path, hub.url, push("me/new"))
    assert answers[0].startswith("ValueError me/new was not uploaded") and len(answers) == 1


def test_a_pipeline_to_the_hub_and_back(tmp_path, model):
    run = tmp_path / "run"
    Pipeline(model, PaellaVQModel(levels=2, c_hidden=16, codebook_size=16)).save_pretrained(run / "pipeline")
    (run / "config.yaml").write_text("training: {seed: 7}\n")
    with Hub({}) as hub:
        answers = ask(
            tmp_path,
            hub.url,
            ("command", "push", [str(run), "me/whole", "--license", "apache-2.0"]),
            ("pipeline", "me/whole", {}),
            ("command", "push", [str(tmp_path), "me/whole"]),
        )
    uploaded = hub.repositories["me/whole"]["main"]
    assert {
        "pipeline.json",
        "README.md",
        "transformer/config.json",
        "transformer/model.safetensors",
        "vq_model/model.safetensors",
    } < set(uploaded)
    assert (
        "| seed | 7 |" in uploaded["README.md"].decode()
        and 'Pipeline.from_pretrained("me/whole")' in uploaded["README.md"].decode()
    )
    assert answers[0].startswith(f"{hub.url}/me/whole/commit/") and answers[1] == "status 0"
    assert answers[2] == "MaskGiTUViT PaellaVQModel (4, 4)" and answers[3] == "status 2"

"""What makes training and drawing fast must not change a number: operators counted, gradients compared."""
import pytest
import torch
import torch.nn.functional as F

from musekit.core.losses import masked_cross_entropy, saved_bytes
from musekit.models.uvit import MaskGiTUViT
from musekit.inference.pipeline import TokenPipeline

SETTINGS = dict(
    vocab_size=33,
    codebook_size=32,
    hidden_size=32,
    in_channels=24,
    block_out_channels=(24,),
    num_res_blocks=2,
    block_num_heads=3,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    encoder_hidden_size=12,
    cond_embed_dim=10,
    micro_cond_encode_dim=8,
    micro_cond_embed_dim=40,
    default_shape=(6, 6),
)
READERS = ("encoder_proj", "cond_embed.0", "down_blocks.0.attention_blocks.1.attention.key",
           "up_blocks.0.res_blocks.0.adaLN_modulation", "transformer_layers.1.crossattention.value")


def make_model(**changes):
    torch.manual_seed(0)
    model = MaskGiTUViT(**{**SETTINGS, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.15)
    return model


def conditions(rows=2):
    torch.manual_seed(1)
    return {"encoder_hidden_states": torch.randn(rows, 5, 12), "cond_embeds": torch.randn(rows, 10)}


def nothing():
    return {"encoder_hidden_states": torch.zeros(5, 12), "cond_embeds": torch.zeros(10)}


def counted(model, names):
    "How often these modules ran, and how many rows of the head's input were asked for."
    seen = dict.fromkeys((*names, "head"), 0)

    def note(name):
        def hook(module, inputs, output):
            seen[name] += inputs[0].numel() // inputs[0].shape[-1] if name == "head" else 1
        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(note(name))
    model.mlm_layer.register_forward_hook(note("head"))
    return seen


def test_a_generation_reads_its_conditions_once_and_asks_for_hidden_tokens_alone():
    model = make_model()
    seen = counted(model, READERS)
    pipeline = TokenPipeline(model, micro_conds=(48, 48, 0, 0, 5.0))
    _, records = pipeline.ids(
        conditions=conditions(), negative_prompt=nothing(), steps=6, seed=0, return_steps=True
    )
    hidden = [2 * 36] + [int(record["hidden"].sum()) for record in records[:-1]]
    assert {name: seen[name] for name in READERS} == dict.fromkeys(READERS, 1)
    assert len(records) == 6 and seen["head"] == 2 * sum(hidden) < 2 * 6 * 72


@pytest.mark.parametrize("grid", ((6, 6), (4, 10), (3, 7)))
def test_any_grid_and_batch_size_draws_what_raw_conditions_draw(grid):
    model = make_model()
    arguments = dict(
        conditions=conditions(),
        negative_prompt=nothing(),
        num_images_per_prompt=2,
        grid=grid,
        seed=3,
        steps=4,
    )
    ids = TokenPipeline(model, micro_conds=(48, 48, 0, 0, 5.0)).ids(**arguments)
    assert ids.shape == (4, grid[0] * grid[1]) and ids.max() < 32
    for batch_size in (1, 3):
        again = TokenPipeline(model, micro_conds=(48, 48, 0, 0, 5.0)).ids(**arguments, batch_size=batch_size)
        assert torch.equal(ids, again)
    raw = TokenPipeline(model, micro_conds=(48, 48, 0, 0, 5.0))
    raw.input_names.remove("precomputed")
    raw.input_names.remove("token_mask")
    assert torch.equal(raw.ids(**arguments), ids)


def step(model, precision=None):
    torch.manual_seed(2)
    ids, mask = torch.randint(32, (2, 36)), torch.rand(2, 36) < 0.6
    text = conditions()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
        logits = model(ids.masked_fill(mask, 32), **text, micro_conds=torch.ones(2, 5), token_mask=mask)
        loss = masked_cross_entropy(logits, ids[mask])
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


class Adapted(torch.nn.Linear):
    "Not nn.Linear itself, so that nothing may be fused with it."


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"use_bias": True},
        {"norm_type": "layernorm", "force_down_up_sample": True},
        {"ln_elementwise_affine": False},
    ),
)
def test_fused_and_plain_ways_have_the_same_gradients(changes):
    model = make_model(**changes)
    loss, fused = step(model)
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Adapted
    plain_loss, plain = step(model)
    assert (loss - plain_loss).abs() <= 1e-5 and (fused - plain).abs().max() <= 1e-4 * plain.abs().max()


def test_gradient_checkpointing_of_stages_and_layers_keeps_less_and_changes_nothing():
    model = make_model(num_res_blocks=3, num_hidden_layers=4)
    parameters = list(model.parameters())
    forward = lambda: model(torch.full((2, 36), 32), **conditions(), micro_conds=torch.ones(2, 5))
    (loss, plain), kept = step(model), saved_bytes(forward, exclude=parameters)
    model.gradient_checkpointing = True
    (again, sparing), less = step(model), saved_bytes(forward, exclude=parameters)
    assert torch.equal(loss, again) and torch.allclose(plain, sparing, atol=1e-6) and less < 0.5 * kept


def test_bfloat16_autocast_trains_close_to_float32():
    model = make_model()
    (loss, exact), (rounded, near) = step(model), step(model, torch.bfloat16)
    assert (loss - rounded).abs() < 0.05 * loss and F.cosine_similarity(exact, near, dim=0) > 0.99


def test_frozen_weights_get_no_gradient_and_the_others_the_same():
    model = make_model()
    _, everything = step(model)
    sizes = [parameter.numel() for parameter in model.parameters()]
    expected = dict(zip((name for name, _ in model.named_parameters()), everything.split(sizes)))
    trained = {name for name in expected if "attention.query" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(2)
    ids, mask = torch.randint(32, (2, 36)), torch.rand(2, 36) < 0.6
    logits = model(ids.masked_fill(mask, 32), **conditions(), micro_conds=torch.ones(2, 5), token_mask=mask)
    masked_cross_entropy(logits, ids[mask]).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained)
        if name in trained:
            assert torch.allclose(parameter.grad.flatten(), expected[name], atol=1e-6)

"""The text transformer against a slow one written out here, token by token and head by head."""
import math

import pytest
import torch
import torch.nn.functional as F

from musekit.core.losses import masked_cross_entropy
from musekit.models import layers
from musekit.models.layers import DocumentMask, attend
from musekit.models.pretrained import load_model
from musekit.models.text_transformer import TextTransformer, from_causal

SMALL = dict(vocab_size=20, max_length=24, hidden_size=24, num_hidden_layers=2, num_attention_heads=3)
VARIANTS = {
    "default": {},
    "tied, squared ReLU": {"tie_embeddings": True, "feed_forward": "relu2"},
    "as MDLM": {"norm_type": "layernorm", "use_bias": True, "feed_forward": "gelu", "qk_norm": False,
                "feed_forward_ratio": 3.0, "rotary_base": 500.0},
}


def random_model(**settings):
    """A model all of whose weights matter."""
    torch.manual_seed(0)
    model = TextTransformer(**SMALL | settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return model


@pytest.fixture(params=VARIANTS)
def settings(request):
    return VARIANTS[request.param]


@pytest.fixture
def ids():
    return torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(1))


def norm(x, weights, name, config):
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if config.norm_type == "layernorm":
        x = x - x.mean()
    x = x / (x.square().mean() + config.norm_eps).sqrt() * weight
    return x if bias is None else x + bias


def linear(x, weights, name):
    bias = weights.get(f"{name}.bias")
    return weights[f"{name}.weight"] @ x + (0 if bias is None else bias)


def turned(x, position, config):
    """The head's channels i and i + half as complex numbers, turned by the position's angle."""
    half = len(x) // 2
    speeds = config.rotary_base ** (-torch.arange(half, dtype=x.dtype) / half)
    pairs = torch.complex(x[:half], x[half:]) * torch.exp(1j * speeds * position)
    return torch.cat([pairs.real, pairs.imag])


def feed_forward(x, weights, name, config):
    hidden = linear(x, weights, f"{name}.wi_0")
    if config.feed_forward == "swiglu":
        hidden = hidden * hidden.sigmoid() * linear(x, weights, f"{name}.wi_1")
    elif config.feed_forward == "relu2":
        hidden = hidden.clamp(min=0) ** 2
    else:
        hidden = hidden / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden ** 3)))
    return linear(hidden, weights, f"{name}.wo")


@torch.no_grad()
def slow_logits(model, tokens, positions, sees):
    """Logits (N, V), float64, of one row; `sees(i, j)`: whether token i attends to token j."""
    config, weights = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    stream = [weights["embeddings.weight"][token] for token in tokens]
    size = config.hidden_size // config.num_attention_heads
    for number in range(config.num_hidden_layers):
        layer = f"transformer_layers.{number}"
        normed = [norm(x, weights, f"{layer}.attn_layer_norm", config) for x in stream]
        maps = {part: [linear(x, weights, f"{layer}.attention.{part}") for x in normed]
                for part in ("query", "key", "value")}
        mixed = [[] for _ in tokens]
        for start in range(0, config.hidden_size, size):
            heads = {part: [x[start:start + size] for x in rows] for part, rows in maps.items()}
            for part in ("query", "key"):
                if config.qk_norm:
                    unit = config | {"norm_type": "rmsnorm", "norm_eps": 1e-6}
                    name = f"{layer}.attention.{part}_norm"
                    heads[part] = [norm(x, weights, name, type(config)(unit)) for x in heads[part]]
                heads[part] = [turned(x, position, config) for x, position in zip(heads[part], positions)]
            for i, query in enumerate(heads["query"]):
                seen = [j for j in range(len(tokens)) if sees(i, j)]
                scores = torch.stack([query @ heads["key"][j] for j in seen]) / size ** 0.5
                mixed[i].append(sum(p * heads["value"][j] for p, j in zip(scores.softmax(0), seen)))
        stream = [x + linear(torch.cat(heads), weights, f"{layer}.attention.out")
                  for x, heads in zip(stream, mixed)]
        stream = [x + feed_forward(norm(x, weights, f"{layer}.ffn_layer_norm", config), weights,
                                   f"{layer}.ffn", config) for x in stream]
    stream = torch.stack([norm(x, weights, "last_layer_norm", config) for x in stream])
    if config.tie_embeddings:
        return stream @ weights["embeddings.weight"][:config.vocab_size].T
    return torch.stack([linear(x, weights, "to_logits") for x in stream])


def check(actual, model, tokens, sees, positions=None):
    expected = slow_logits(model, tokens.tolist(), positions or range(len(tokens)), sees)
    assert expected.std() > 0.1
    assert (actual - expected[:len(actual)]).abs().max() <= 1e-4


def test_masked_and_causal(settings, ids):
    ids[:, 3] = 20
    masked, causal = random_model(**settings), random_model(causal=True, **settings)
    check(masked(ids)[0], masked, ids[0], lambda i, j: True)
    check(causal(ids)[1], causal, ids[1], lambda i, j: j <= i)


@pytest.mark.parametrize("causal", [False, True])
def test_documents(settings, ids, causal):
    documents = torch.tensor([[4] * 5 + [7] * 4 + [9] * 3, [0] * 12])
    model = random_model(causal=causal, **settings)
    logits = model(ids, documents=documents)
    for row in range(2):
        numbers = documents[row]
        check(logits[row], model, ids[row], lambda i, j: numbers[i] == numbers[j] and not (causal and j > i))


@pytest.mark.parametrize("block_size", [1, 3, 5, 12])
def test_block_diffusion(settings, ids, block_size):
    """Noisy tokens 0..11 attend to their noisy block and earlier clean ones, 12..23 are the clean tokens."""
    model = random_model(**settings)
    noisy = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5, 20)

    def sees(i, j):
        block, other = i % 12 // block_size, j % 12 // block_size
        if i < 12:
            return other == block if j < 12 else other < block
        return j >= 12 and other <= block

    logits = model(noisy, clean_ids=ids, block_size=block_size)
    assert logits.shape == (2, 12, 20)
    check(logits[0], model, torch.cat([noisy[0], ids[0]]), sees, positions=[*range(12), *range(12)])


def test_blocks_of_one_are_the_chain_rule(ids):
    """Token by token: a mask at the end of the clean prefix, with nothing behind it."""
    model = random_model()
    logits = model(torch.full_like(ids, 20), clean_ids=ids, block_size=1)
    for i in range(12):
        text = torch.cat([ids[0, :i], torch.tensor([20])])
        expected = slow_logits(model, text.tolist(), range(i + 1), lambda i, j: j <= i)[-1]
        assert (logits[0, i] - expected).abs().max() <= 1e-4


def test_one_block_is_the_masked_model(ids):
    model = random_model()
    noisy = ids.index_fill(1, torch.tensor([2, 5, 6]), 20)
    check(model(noisy, clean_ids=ids, block_size=12)[0], model, noisy[0], lambda i, j: True)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 5], [12]])
def test_causal_decoding_with_a_cache(settings, ids, pieces):
    model = random_model(causal=True, **settings)
    cache = model.cache()
    logits = torch.cat([model(piece, cache=cache) for piece in ids.split(pieces, 1)], 1)
    assert (logits - model(ids)).abs().max() <= 1e-5 and cache.length == 12
    cache.length = 4  # the rest is forgotten, and written again
    assert (model(ids[:, 4:], cache=cache) - logits[:, 4:]).abs().max() <= 1e-5
    again = model(ids[:, 4:8].flip(0), cache=model.cache())
    assert (again - model(ids[:, 4:8].flip(0))).abs().max() <= 1e-5


@torch.no_grad()
def test_block_decoding_with_a_cache(settings, ids):
    model = random_model(**settings)
    cache = model.cache()
    model(ids[:, :8], cache=cache, block_size=4)
    noisy = torch.full_like(ids[:, 8:], 20)
    for step in range(4):  # a token more of the block at each step
        noisy[:, step] = ids[:, 8 + step]
        uncached = model(torch.cat([ids[:, :8], noisy], 1), block_size=4)[:, 8:]
        assert (model(noisy, cache=cache, update_cache=False) - uncached).abs().max() <= 1e-5
    assert cache.length == 8
    model(noisy, cache=cache)
    assert cache.length == 12
    following = torch.full_like(noisy, 20)
    uncached = model(torch.cat([ids, following], 1), block_size=4)[:, 12:]
    assert (model(following, cache=cache) - uncached).abs().max() <= 1e-5


def test_a_cache_holds_no_more_than_the_model(ids):
    model = random_model(max_length=12)
    with torch.no_grad():
        cache = model.cache()
        model(ids, cache=cache)
        with pytest.raises(ValueError, match="13 tokens is longer than the model's 12; cut it"):
            model(ids[:, :1], cache=cache)


def segments(query, key, value, bounds, other_bounds, longest, other_longest, *, window_size):
    """What `torch.nn.attention.varlen.varlen_attn` computes, one document at a time."""
    assert bounds.dtype == torch.int32 and longest == other_longest >= bounds.diff().max()
    assert torch.equal(bounds, other_bounds) and bounds[-1] == len(query)
    parts = []
    for start, end in zip(bounds, bounds[1:]):
        heads = (y[None, start:end].transpose(1, 2) for y in (query, key, value))
        part = F.scaled_dot_product_attention(*heads, is_causal=window_size == (-1, 0))
        parts.append(part.transpose(1, 2)[0])
    return torch.cat(parts)


@pytest.mark.parametrize("causal", [False, True])
def test_documents_by_their_bounds(monkeypatch, causal):
    """The path of a GPU, with its kernel replaced by a loop over documents."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [2, 2, 2, 2, 2, 2, 2, 3]])
    query, key, value = torch.randn(3, 2, 8, 3, 4)
    mask = DocumentMask(documents, causal)
    monkeypatch.setattr(layers, "varlen_attn", segments)
    by_bounds = layers._attend_documents(query, key, value, mask)
    assert (by_bounds - attend(query, key, value, mask)).abs().max() <= 1e-6


@pytest.mark.skipif(not torch.cuda.is_available() or not layers.varlen_attn,
                    reason="attention by the bounds of documents needs a GPU and a PyTorch with varlen_attn")
@pytest.mark.parametrize("causal", [False, True])
def test_documents_on_a_gpu(ids, causal):
    documents = torch.tensor([[4] * 5 + [7] * 4 + [9] * 3, [0] * 12])
    model = random_model(causal=causal, hidden_size=96)
    expected = model(ids, documents=documents)
    model = model.to("cuda", torch.bfloat16)
    logits = model(ids.cuda(), documents=documents.cuda()).float().cpu()
    assert (logits - expected).norm() <= 0.05 * expected.norm()


def test_it_starts_as_the_identity_at_the_loss_of_a_uniform_guess(ids):
    torch.manual_seed(0)
    fresh = TextTransformer(**SMALL)
    assert masked_cross_entropy(fresh(ids), ids).item() == pytest.approx(math.log(20), abs=1e-6)
    for layer in fresh.transformer_layers:
        assert not layer.attention.out.weight.any() and not layer.ffn.wo.weight.any()
        assert layer.attention.query.weight.std().item() == pytest.approx(24 ** -0.5, rel=0.2)
    wide = TextTransformer(initializer_range=1.0, use_bias=True, norm_type="layernorm", **SMALL)
    assert wide.embeddings.weight.std().item() == pytest.approx(1, rel=0.2)
    assert not any(weight.any() for name, weight in wide.named_parameters() if name.endswith("bias"))
    tied = TextTransformer(tie_embeddings=True, **SMALL)
    assert tied.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.2)
    hidden = torch.full_like(ids, 20)
    assert masked_cross_entropy(tied(hidden), ids).item() == pytest.approx(math.log(20), abs=0.05)


@pytest.mark.parametrize("kind", ["swiglu", "relu2", "gelu"])
def test_the_kinds_of_feed_forward_have_about_equal_parameters(kind):
    model = TextTransformer(**SMALL | {"hidden_size": 96, "feed_forward": kind})
    ffn = sum(parameter.numel() for parameter in model.transformer_layers[0].ffn.parameters())
    assert ffn == 8 * 96 * 96


def test_gradient_checkpointing(ids):
    model = random_model().train()

    def gradients(enabled):
        model.gradient_checkpointing = enabled
        model.zero_grad()
        masked_cross_entropy(model(ids, clean_ids=ids, block_size=4), ids).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    assert (gradients(False) - gradients(True)).abs().max() <= 1e-5


def test_dropout_only_in_training(ids):
    model = random_model(dropout=0.5)
    assert torch.equal(model(ids), model(ids))
    assert not torch.equal(model.train()(ids), model(ids))


def test_a_masked_model_continues_a_causal_one(ids, tmp_path):
    causal = random_model(causal=True)
    causal.save_pretrained(tmp_path)
    for source in (causal, tmp_path):
        masked = from_causal(source)
        assert masked.config == causal.config | {"causal": False}
        weights, others = masked.state_dict(), causal.state_dict()
        table, old_table = (state.pop("embeddings.weight") for state in (weights, others))
        assert all(torch.equal(weights[name], others[name]) for name in others)
        assert torch.equal(table[:20], old_table[:20])
        assert torch.allclose(table[20], table[:20].mean(0))
    check(masked(ids)[0], masked, ids[0], lambda i, j: True)
    with pytest.raises(ValueError, match="is a masked model already"):
        from_causal(masked)
    causal.save_pretrained(tmp_path / "again")
    assert load_model(tmp_path / "again").config.causal

"""How fast the text transformer trains, beside a plain GPT of the same size, in tokens a second.

    python tests/benchmarks/text_models.py            # the CPU, hidden 384, 6 layers, 8 texts of 256 tokens
    python tests/benchmarks/text_models.py --quick    # a small model, few repetitions: does everything run?
    python tests/benchmarks/text_models.py --device cuda --bf16 --hidden 768 --layers 12 --batch 32
    python tests/benchmarks/text_models.py --threads 1 --cpu-time   # on a machine busy with other things

The GPT is GPT-2's: learned positions, fused queries, keys and values, PyTorch's causal attention, GELU, an
output of its own. Ours has rotary positions, normalised queries and keys, and SwiGLU, with as many
parameters. All run in turn in one process, each with clipping and fused AdamW. The masked model computes the
logits of the masked tokens alone, half of them; a ratio is the GPT's time / ours of one pair.
"""
import argparse
import contextlib
import statistics
import time

import torch
import torch.nn.functional as F
from models import race, row
from torch import nn

from musekit.models.inspection import num_parameters
from musekit.models.text_transformer import TextTransformer


class Block(nn.Module):
    "A layer of GPT-2, without biases."

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))


class PlainGPT(nn.Module):
    def __init__(self, vocab_size, length, width, layers, heads):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_token_loss(model, ids):
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def masked_loss(model, ids):
    """Of a random half of the tokens."""
    mask = torch.rand(ids.shape, device=ids.device) < 0.5
    noisy = ids.masked_fill(mask, model.config.mask_token_id)
    return F.cross_entropy(model(noisy, token_mask=mask), ids[mask])


def block_loss(model, ids):
    """As `masked_loss`, in blocks of 16."""
    mask = torch.rand(ids.shape, device=ids.device) < 0.5
    noisy = ids.masked_fill(mask, model.config.mask_token_id)
    return F.cross_entropy(model(noisy, clean_ids=ids, block_size=16, token_mask=mask), ids[mask])


def document_loss(model, ids):
    """As `next_token_loss`, with four documents packed in each text."""
    documents = torch.arange(ids.shape[1], device=ids.device) * 4 // ids.shape[1]
    logits = model(ids, documents=documents.expand_as(ids))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def training_step(model, loss, ids, precision):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with precision():
            value = loss(model, ids)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoder(model, ids, cached):
    """A function that appends to the first 16 tokens, one a call of the model, up to 80 tokens."""
    @torch.no_grad()
    def decode():
        text, cache = ids[:, :16], model.cache() if cached else None
        while text.shape[1] < min(80, ids.shape[1]):
            new = text if not cached or not cache.length else text[:, -1:]
            logits = model(new, cache=cache) if cached else model(new)
            text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)

    return decode


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8, help="texts of a training step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; all by default")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of every measurement")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds of this process")
    parser.add_argument("--quick", action="store_true", help="a tiny model, three pairs")
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.layers, options.vocab, options.repeats = 64, 2, 256, 3
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device
    heads = options.hidden // 64 or 1
    clock = time.process_time if options.cpu_time else time.perf_counter
    bf16 = lambda: torch.autocast(device, torch.bfloat16)
    precision = bf16 if options.bf16 else contextlib.nullcontext

    torch.manual_seed(0)
    gpt = PlainGPT(options.vocab, options.length, options.hidden, options.layers, heads).to(device)
    sizes = dict(
        vocab_size=options.vocab, max_length=options.length, hidden_size=options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=heads,
    )
    ours = [TextTransformer(causal=causal, **sizes).to(device) for causal in (True, False)]
    ids = torch.randint(options.vocab, (options.batch, options.length), device=device)
    print(f"{num_parameters(gpt) / 1e6:.2f} and {num_parameters(ours[0]) / 1e6:.2f} million parameters, "
          f"{options.batch} texts of {options.length} tokens, {device}, {torch.get_num_threads()} threads, "
          f"PyTorch {torch.__version__}")

    named = {"left to right": (ours[0], next_token_loss), "packed documents": (ours[0], document_loss),
             "masked": (ours[1], masked_loss), "blocks of 16": (ours[1], block_loss)}
    steps = [training_step(gpt, next_token_loss, ids, precision)]
    steps += [training_step(model, loss, ids, precision) for model, loss in named.values()]
    print(f"\n{'':34s}{'GPT':>11s}{'musekit':>11s}{'ratio':>8s}   10 - 90 %     others' load")
    times, load = race(steps, options.repeats, device, clock)
    for who, name in enumerate(named, 1):
        row(f"training step, {name}", times, load, who)
    rates = {name: ids.numel() / statistics.median(of) for name, of in zip(("GPT", *named), times)}
    print("tokens a second: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
    decoders = [decoder(gpt.eval(), ids, False), decoder(ours[0].eval(), ids, True)]
    times, load = race(decoders, max(3, options.repeats // 3), device, clock)
    row("decoding, ours with a cache", times, load)


if __name__ == "__main__":
    main()

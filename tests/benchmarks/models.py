"""How fast the U-ViT trains and draws, and in how much memory, beside diffusers' UVit2DModel and
AmusedPipeline. (The text transformer beside a plain GPT: text_models.py.)

    python tests/benchmarks/models.py                  # the CPU, hidden 384, 6 layers, 256 tokens, batch 8
    python tests/benchmarks/models.py --quick          # a small model, few repetitions: does everything run?
    python tests/benchmarks/models.py --compile        # ours through torch.compile as well
    python tests/benchmarks/models.py --device cuda --bf16 --size amused --batch 32   # bfloat16 alone
    python tests/benchmarks/models.py --profile        # and where the time goes, operator by operator
    python tests/benchmarks/models.py --threads 1 --cpu-time   # on a machine that is busy with other things

Both models have the same weights, are checked to give the same logits, and run in turn in one process, so
that whatever else the machine is doing meets both; in float32, and again under bfloat16 autocast. A ratio is
theirs / ours of one pair; median and 10-90 % of the pairs are printed. The peer's step is what its users
write: logits for all tokens, F.cross_entropy with ignore_index, clipping, AdamW with its defaults. Ours is
the trainer's: logits of masked tokens, masked_cross_entropy, the same clipping, AdamW with fused=True
(optimizer.name: fused_adamw). Generation is 12 guided steps from given text states to tokens; no image is
decoded on either side.
"""
import argparse
import contextlib
import math
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from musekit.core.guidance import GenerationConfig
from musekit.core.losses import masked_cross_entropy, saved_bytes
from musekit.core.masking import MaskingConfig, mask_tokens
from musekit.models.diffusers import uvit_from_diffusers
from musekit.models.uvit import MaskGiTUViT
from musekit.inference.pipeline import TokenPipeline

try:
    from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel
except ImportError:
    UVit2DModel = None

# "target" is aMUSEd-256 with every width times 0.375 (three residual blocks a stage, as published) and 6 of
# 22 layers
SIZES = {
    "tiny": dict(
        hidden_size=64,
        in_channels=48,
        block_out_channels=48,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=176,
        sample_size=8,
    ),
    "target": dict(
        hidden_size=384,
        in_channels=288,
        block_out_channels=288,
        num_res_blocks=3,
        block_num_heads=6,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1056,
        sample_size=16,
    ),
    "amused": dict(sample_size=16),
}
TEXT_LENGTH, STEPS, GUIDANCE = 77, 12, 10.0


# ---- the two models, and what they are given ----

def make_pair(size, device):
    """Theirs and ours with equal random weights, none of them zero."""
    torch.manual_seed(0)
    theirs = UVit2DModel(**SIZES[size])
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.03)
    config, weights = uvit_from_diffusers(dict(theirs.config), theirs.state_dict())
    ours = MaskGiTUViT.from_config(config)
    ours.load_state_dict(weights)
    return theirs.to(device), ours.to(device)


def make_batch(model, rows, device, seed):
    """Ids masked with the cosine schedule, labels, and random text states."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    ids = torch.randint(config.codebook_size, (rows, math.prod(model.default_shape)), generator=generator)
    masking = MaskingConfig(config.mask_token_id, config.codebook_size)
    batch = dict(zip(("states", "pooled"), random_text(config, rows, generator)))
    batch["tokens"] = mask_tokens(ids, masking, generator=generator)
    batch["sizes"] = torch.tensor([256.0, 256, 0, 0, 6]).expand(rows, -1)
    tokens = batch.pop("tokens")
    batch |= {"ids": tokens.input_ids, "labels": tokens.labels, "mask": tokens.mask}
    return {name: value.to(device) for name, value in batch.items()}


def random_text(config, rows, generator):
    """Text states and pooled text."""
    states = torch.randn(rows, TEXT_LENGTH, config.encoder_hidden_size, generator=generator)
    return states, torch.randn(rows, config.cond_embed_dim, generator=generator)


def their_logits(model, batch):
    side = math.isqrt(batch["ids"].shape[1])
    return model(batch["ids"].unflatten(1, (side, side)), batch["states"], batch["pooled"], batch["sizes"])


def our_logits(model, batch, **options):
    return model(batch["ids"], batch["states"], batch["pooled"], batch["sizes"], **options)


def their_loss(model, batch):
    logits = their_logits(model, batch)
    return F.cross_entropy(
        logits.float(), batch["labels"].view(len(logits), *logits.shape[2:]), ignore_index=-100
    )


def our_loss(model, batch):
    logits = our_logits(model, batch, token_mask=batch["mask"])
    return masked_cross_entropy(logits, batch["labels"][batch["mask"]])


class Training:
    """A model, its optimizer and its batches; calling it makes a training step."""

    def __init__(self, model, loss, batches, precision, **options):
        self.model, self.loss, self.batches, self.precision, self.count = model, loss, batches, precision, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **options)

    def forward(self):
        with self.precision():
            return self.loss(self.model, self.batches[self.count % len(self.batches)])

    def __call__(self):
        self.forward().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1


def generators(theirs, ours, rows, device):
    """Two functions that decode `rows` images from the same text."""
    generator = torch.Generator().manual_seed(1)
    text, nothing = (
        [part.to(device) for part in random_text(ours.config, rows, generator)] for _ in range(2)
    )
    scheduler = AmusedScheduler(mask_token_id=ours.config.mask_token_id)
    peer = AmusedPipeline(None, None, None, theirs, scheduler)
    peer.set_progress_bar_config(disable=True)
    side = 8 * default_shape(ours)[0]
    how = GenerationConfig(STEPS, GUIDANCE, temperature=(2.0, 0.0))
    pipeline = TokenPipeline(
        ours, generation=how, micro_conds=(side, side, 0, 0, 6.0), grid=default_shape(ours)
    )
    names = "encoder_hidden_states", "cond_embeds"
    options = dict(guidance_scale=GUIDANCE, num_inference_steps=STEPS, output_type="latent")
    return (
        lambda: peer(
            prompt_embeds=text[1],
            encoder_hidden_states=text[0],
            negative_prompt_embeds=nothing[1],
            negative_encoder_hidden_states=nothing[0],
            **options,
        ),
        lambda: pipeline.ids(
            conditions=dict(zip(names, text)), negative_prompt=dict(zip(names, nothing)), seed=0
        ),
    )


def default_shape(model):
    return getattr(model, "_orig_mod", model).default_shape


# ---- measuring ----

def _cpu_seconds():
    """Of the machine (without idle and waiting time) and of this process."""
    times = os.times()
    with open("/proc/stat") as stat:
        ticks = [int(field) for field in stat.readline().split()[1:8]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), times.user + times.system


def timed(function, device, clock=time.perf_counter):
    """Seconds of the clock, and how many processors others used meanwhile (0 where unknown)."""
    watched = os.path.exists("/proc/stat")
    before, since, started = _cpu_seconds() if watched else (0, 0), time.perf_counter(), clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, passed = clock() - started, time.perf_counter() - since
    after = _cpu_seconds() if watched else (0, 0)
    return seconds, max(0.0, (after[0] - before[0] - after[1] + before[1]) / passed)


def race(contenders, repeats, device, clock):
    """Each contender's seconds in every round, all once a round, in alternating order; and others' load."""
    for function in contenders:
        function()
    rounds, loads = [], []
    for index in range(repeats):
        order = list(enumerate(contenders))
        measured = {
            who: timed(function, device, clock) for who, function in (order if index % 2 else order[::-1])
        }
        rounds.append([measured[who][0] for who in range(len(contenders))])
        loads.append(statistics.mean(load for _, load in measured.values()))
    return list(zip(*rounds)), statistics.median(loads)


def row(name, times, load, who=1):
    """A line of the table: both medians, the ratio of the pairs and its spread."""
    ratios = sorted(theirs / ours for theirs, ours in zip(times[0], times[who]))
    low, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.1, 0.9))
    seconds = [statistics.median(times[0]), statistics.median(times[who])]
    print(f"{name:34s}{seconds[0]:9.3f} s{seconds[1]:9.3f} s{statistics.median(ratios):8.2f}"
          f"   {low:.2f} - {high:.2f}   {load:.1f}", flush=True)


def peak_bytes(function, device):
    """The most that is allocated while the function runs, beyond what there is before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def matrix_rate(device, precision, clock):
    """The machine's rate in matrix products of sizes like the model's, the best of several, in FLOP/s."""
    best = 0
    with precision():
        for m, k, n in ((2048, 384, 1056), (2048, 1152, 288), (1024, 1024, 1024), (2048, 2048, 2048)):
            a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
            seconds = min(timed(lambda: a @ b, device, clock)[0] for _ in range(50))
            best = max(best, 2 * m * k * n / seconds)
    return best


def matrix_flops(training):
    """Floating-point operations of one step's matrix products, attention's included, depthwise
    convolutions not."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        training.forward().backward()
    training.optimizer.zero_grad()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in counts.items() if "conv" not in str(operator))


def print_profile(name, function, device, rows=22):
    """The device's own time by operator, in three runs."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
    spent = lambda event: event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
    with profile(activities=activities) as profiler:
        for _ in range(3):
            function()
    events = sorted(profiler.key_averages(), key=lambda event: -spent(event))
    total = sum(map(spent, events))
    print(f"\n{name}: {total / 3e6:.2f} s a step")
    for event in events[:rows]:
        share = spent(event) / total
        print(f"  {event.key[:52]:54s}{spent(event) / 3e3:9.1f} ms {share:6.1%} {event.count // 3:6d} x")


# ---- the benchmark ----

def check(theirs, ours, batch):
    """Raises SystemExit unless both give the same logits and losses."""
    with torch.no_grad():
        expected, logits_of_ours = their_logits(theirs, batch).flatten(2).mT, our_logits(ours, batch)
        precomputed = ours.precompute(batch["states"], batch["pooled"], batch["sizes"])
        once = ours(batch["ids"], precomputed=precomputed)
        losses = their_loss(theirs, batch), our_loss(ours, batch)
    off = max((expected - logits).abs().max().item() for logits in (logits_of_ours, once))
    apart = (losses[0] - losses[1]).abs().item()
    print(
        f"largest difference of logits {off:.1e} (their spread {expected.std():.2f}), of losses {apart:.1e}"
    )
    if off > 1e-4 or apart > 1e-5:
        sys.exit("The two models do not compute the same; times would mean nothing.")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="target")
    parser.add_argument("--batch", type=int, default=8, help="rows of a training step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; all by default")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of every measurement")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast alone, without float32")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help=(
            "count processor seconds of this process, of all "
            "its threads, not the clock's: with --threads 1 the load of others hardly shows"
        ),
    )
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile too")
    parser.add_argument("--profile", action="store_true", help="where the time of a training step goes")
    parser.add_argument("--quick", action="store_true", help="a tiny model, three pairs")
    options = parser.parse_args()
    if UVit2DModel is None:
        sys.exit("This compares with diffusers, which is not installed here: pip install diffusers==0.42.1")
    size, repeats = ("tiny", 3) if options.quick else (options.size, options.repeats)
    device = options.device
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    precisions = {"": contextlib.nullcontext, ", bf16": lambda: torch.autocast(device, torch.bfloat16)}
    if options.bf16:
        del precisions[""]
    precision = next(iter(precisions.values()))  # of the memory and the matrix products

    theirs, ours = make_pair(size, device)
    batches = [make_batch(ours, options.batch, device, seed) for seed in range(4)]
    grid = "x".join(map(str, ours.default_shape))
    print(
        f"{size}: {sum(p.numel() for p in ours.parameters()) / 1e6:.1f} million parameters, grid {grid},"
        f" batch {options.batch}, {device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    )
    print(", ".join(f"{name} {value}" for name, value in SIZES[size].items()))
    check(theirs, ours, batches[0])
    models = [ours, torch.compile(ours)] if options.compile else [ours]

    rate = matrix_rate(device, precision, clock)
    steps = [Training(theirs, their_loss, batches, precision)]
    steps += [Training(model, our_loss, batches, precision, fused=True) for model in models]
    flops = matrix_flops(steps[1])

    print(f"\n{'':34s}{'diffusers':>11s}{'musekit':>11s}{'ratio':>8s}   10 - 90 %     others' load")
    seconds = []
    for label, context in precisions.items():
        for step in steps:
            step.precision = context
        times, load = race(steps, repeats, device, clock)
        for who in range(1, len(steps)):
            row("training step" + label + ", compiled" * (who - 1), times, load, who)
        seconds = seconds or [min(of) for of in times[:2]]
    for label, context in precisions.items():
        with torch.no_grad(), context():
            forwards = [lambda: their_logits(theirs, batches[0]), lambda: our_logits(ours, batches[0])]
            times, load = race(forwards, repeats, device, clock)
            row("forward pass, all logits" + label, times, load)
            for rows in (1, 4):
                contenders = [*generators(theirs, ours, rows, device)]
                contenders += [generators(theirs, model, rows, device)[1] for model in models[1:]]
                times, load = race(contenders, max(3, repeats // 2), device, clock)
                for who in range(1, len(contenders)):
                    name = f"{STEPS} guided steps, batch {rows}{label}" + ", compiled" * (who - 1)
                    row(name, times, load, who)

    for step in steps:
        step.precision = precision
    print(f"\n{'memory of a training step, MB':34s}{'diffusers':>11s}{'musekit':>11s}   musekit / diffusers")
    parameters = [list(model.parameters()) for model in (theirs, ours)]
    kept = [saved_bytes(step.forward, exclude=own) for step, own in zip(steps, parameters)]
    for step in steps[:2]:
        step.optimizer.zero_grad()
    peaks = [peak_bytes(lambda: step.forward().backward(), device) for step in steps[:2]]
    grads = sum(parameter.nbytes for parameter in ours.parameters())
    lines = {"kept for the backward pass": kept, "peak of both passes": peaks,
             "peak without the gradients": [peak - grads for peak in peaks]}
    ours.gradient_checkpointing = True
    checkpointed = saved_bytes(steps[1].forward, exclude=parameters[1])
    ours.gradient_checkpointing = False
    lines["kept, ours with checkpointing"] = [kept[0], checkpointed]
    for name, (their, our) in lines.items():
        print(f"{name:34s}{their / 2**20:11.0f}{our / 2**20:11.0f}   {our / their:.2f}")

    print(
        f"\nmatrix products: {rate / 1e9:.0f} GFLOP/s at best; those of our step are {flops / 1e9:.0f} GFLOP:"
        f" {flops / rate:.3f} s at this rate, {flops / rate / seconds[1]:.0%} of our fastest step"
        f" ({seconds[1]:.3f} s) and {flops / rate / seconds[0]:.0%} of diffusers' ({seconds[0]:.3f} s).\nA"
        f" step of nothing but these products would be {seconds[0] * rate / flops:.2f} times as fast as"
        " diffusers'."
    )
    if options.profile:
        for name, step in zip(("diffusers", "musekit"), steps):
            print_profile(name, step, options.device)


if __name__ == "__main__":
    main()

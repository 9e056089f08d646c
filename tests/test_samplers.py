"""Samplers on a joint distribution that is known exactly, and noise that must have all of its bits."""
import argparse
import math
import re

import pytest
import torch

from musekit.core import noise
from musekit.commands.generate import add_generate
from musekit.core.guidance import GenerationConfig, generate_guided
from musekit.core.decoding import generate_ids, model_calls
from musekit.core.likelihood import EnumerableSource, exact_law
from musekit.core.samplers import (
    SamplerState, get_sampler, halton_ranks, hide_lowest, register_sampler, sampler_names,
)
from musekit.core.schedules import get_schedule
from musekit.core.noise import exact_noise, gumbel_noise, sample_tokens

V = N = 3
STATES = torch.cartesian_prod(*[torch.arange(V)] * N)
JOINT = (1.5 * torch.randn(len(STATES), generator=torch.Generator().manual_seed(5))).softmax(0)
ONE_HOT = torch.nn.functional.one_hot(STATES, V).float()
BUILT_IN = (
    "confidence", "confidence_threshold", "entropy", "entropy_bounded", "first_hitting", "halton",
    "left_to_right", "random", "remasking",
)
SOURCE = EnumerableSource(JOINT.view(V, V, V))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def exact_logits(ids, hidden, step):
    "The conditionals of JOINT given what is visible."
    posterior = ((ids[:, None] == STATES) | (ids[:, None] == V)).all(-1) * JOINT
    return (torch.einsum("bs,snv->bnv", posterior, ONE_HOT) / posterior.sum(-1)[:, None, None]).log()[hidden]


def counts_of(sampler, steps, rows=12_000, temperature=1.0):
    ids = generate_ids(
        exact_logits,
        torch.full((rows, N), V),
        V,
        steps=steps,
        schedule="linear",
        temperature=temperature,
        generator=seeded(),
        sampler=sampler,
        grid=(1, N),
    )
    return (ids @ torch.tensor([V**2, V, 1])).bincount(minlength=len(STATES))


def p_value(counts, probabilities):
    "Pearson's chi-square: the probability of counts at least this far off, if the probabilities are right."
    expected = probabilities.double() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(
        torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2)
    )


def total_variation(counts):
    return float((counts / counts.sum() - JOINT).abs().sum() / 2)


@pytest.mark.parametrize("name", ("random", "halton", "entropy", "first_hitting", "left_to_right"))
def test_one_token_at_a_time_in_an_order_blind_to_the_draws_is_exact(name):
    assert p_value(counts_of(name, N), JOINT) > 1e-3
    assert p_value(counts_of(name, 1), JOINT) < 1e-6  # the test notices the product of the marginals


def test_first_hitting_is_exact_with_more_steps_than_tokens_too():
    assert p_value(counts_of("first_hitting", 7), JOINT) > 1e-3


def law_of(name, steps=N, **options):
    "The exact law of a sampler without randomness, on the conditionals of JOINT."
    sampler = get_sampler(name, **options)
    return exact_law(lambda state: [(torch.ones(len(state.hidden)).double(), sampler(state))], SOURCE, steps)


def divergence(law):
    "KL divergence of a law from the source, in nats."
    return float((SOURCE.weights * (SOURCE.weights / law).log()).sum())


@pytest.mark.parametrize(
    "name, options",
    (
        ("left_to_right", {}),
        ("entropy_bounded", {"gamma": 0.0}),
        ("confidence_threshold", {"threshold": 1.0}),
    ),
)
def test_the_exact_law_of_one_token_a_step_is_the_source(name, options):
    assert (law_of(name, **options) - SOURCE.weights).abs().sum() < 1e-12
    assert divergence(law_of(name, steps=2, **options)) > 0.01  # steps is the most: the last reveals the rest


def test_all_tokens_at_once_are_the_product_of_the_marginals():
    product = law_of("left_to_right", steps=1)
    for law in (law_of("entropy_bounded", gamma=math.inf), law_of("confidence_threshold", threshold=0.0)):
        assert torch.equal(law, product)


def test_gamma_bounds_the_divergence_from_the_source():
    "Of three tokens, only one step can reveal several, and its error is below gamma."
    gammas = (0.5, 0.8, 1.0, 1.5)
    divergences = {gamma: divergence(law_of("entropy_bounded", gamma=gamma)) for gamma in gammas}
    assert all(-1e-12 < divergences[gamma] < gamma for gamma in divergences)
    assert min(divergences[gamma] for gamma in (0.8, 1.0, 1.5)) > 0.01


def test_likely_ids_above_the_threshold_are_the_mode_of_the_joint_distribution():
    "With n tokens above 1 - epsilon and (n + 1) epsilon at most 1."
    num_revealed = 0
    for seed in range(50):
        table = (6 * torch.randn(V, V, V, generator=seeded(seed))).flatten().softmax(0).view(V, V, V).double()
        marginals = [table.sum([other for other in range(N) if other != token]) for token in range(N)]
        state = SamplerState(
            0, 9, get_schedule("linear"), torch.tensor([2]), 0.0, torch.ones(1, N).bool(),
            torch.ones(1, N).bool(), torch.ones(1, N), torch.stack(marginals).log(),
        )
        if not get_sampler("confidence_threshold", threshold=N / (N + 1))(state).any():
            num_revealed += 1
            likely = [int(marginal.argmax()) for marginal in marginals]
            assert STATES[table.argmax()].tolist() == likely
    assert 5 < num_revealed < 45


def test_rows_of_an_adaptive_sampler_end_by_themselves():
    "Each row needs its own number of calls, in any company and in batches; complete rows are not computed."
    config = GenerationConfig(
        steps=20, guidance_scale=1.0, sampler="confidence_threshold", sampler_params={"threshold": 0.6}
    )
    computed = []

    def forward(ids, conditions, hidden):
        computed.append(len(ids))
        return exact_logits(ids, hidden, 0)

    start = torch.full((6, N), V)
    start[1, :2], start[4] = 1, torch.tensor([0, 1, 2])
    how = dict(seed=list(range(6)), return_steps=True, grid=(1, N))
    ids, records = generate_guided(forward, start, V, V, {}, {}, config, batch_size=4, **how)
    calls = model_calls(records)
    assert (ids[4] == start[4]).all() and calls[4] == 0 and calls[1] == 1
    assert sum(computed) == calls.sum() and len(records) == calls.max() <= N and len(set(calls.tolist())) > 2
    for row in range(6):
        alone, own = generate_guided(
            forward, start[[row]], V, V, {}, {}, config, seed=[row], return_steps=True, grid=(1, N)
        )
        assert torch.equal(alone[0], ids[row]) and len(own) == calls[row]


def test_the_help_of_generate_names_every_sampler():
    parser = add_generate(argparse.ArgumentParser().add_subparsers())
    described = next(action.help for action in parser._actions if action.dest == "sampler")
    assert set(BUILT_IN) <= set(re.findall(r"\w+", described))


def test_confidence_looks_at_the_draw_and_leans_to_the_mode():
    counts = counts_of("confidence", N, temperature=0.0)
    assert p_value(counts, JOINT) < 1e-6 and counts[JOINT.argmax()] / counts.sum() > JOINT.max() + 0.02


def test_remasking_comes_near_with_many_steps():
    gentle = get_sampler("remasking", eta=0.1, kind="rescale")
    few, more, many = (total_variation(counts_of(gentle, steps)) for steps in (3, 12, 40))
    assert few > 2 * more > 3 * many and many < 0.04


@pytest.mark.parametrize("name", BUILT_IN)
def test_known_tokens_stay_and_nothing_is_left_hidden(name):
    assert name in sampler_names()
    ids = torch.arange(40).view(4, 10) % 5
    start, visible = ids.clone(), torch.rand(4, 10, generator=seeded()) < 0.5
    start[~visible] = 5
    flat = lambda ids, hidden, step: torch.zeros(int(hidden.sum()), 5)
    for steps in (1, 3, 20):
        drawn, records = generate_ids(
            flat, start, 5, steps=steps, sampler=name, grid=(2, 5), generator=seeded(), return_steps=True
        )
        assert (drawn < 5).all() and torch.equal(drawn[visible], ids[visible])
        assert torch.equal(
            drawn, generate_ids(flat, start, 5, steps=steps, sampler=name, grid=(2, 5), generator=seeded())
        )
        revealed = torch.stack([record["hidden"] for record in records])
        if name != "remasking":
            assert not (revealed[1:] & ~revealed[:-1]).any()


def rounded(dtype):
    "The kit's uniform numbers as that type would have them."
    exact = exact_noise

    def noise(shape, generator=None, device=None):
        bits = {torch.float16: 11, torch.float32: 24}[dtype]
        return (exact(shape, generator, device) * 2**bits).floor() / 2**bits

    return noise


SKEWED = torch.cat([torch.zeros(4), torch.full((1020,), -9.0)])  # rare ids, together 3 per cent


def rare_draws(rows=4_000):
    "Of that many draws by the largest of noisy logits, how many are rare."
    return int(((SKEWED + gumbel_noise((rows, len(SKEWED)), seeded())).argmax(-1) >= 4).sum())


def test_gumbel_noise_draws_rare_ids_as_often_as_it_should_and_half_precision_never(monkeypatch):
    share = float(SKEWED.softmax(-1)[4:].sum())
    deviation = (4_000 * share * (1 - share)) ** 0.5
    assert abs(rare_draws() - 4_000 * share) < 4 * deviation
    monkeypatch.setattr(noise, "exact_noise", rounded(torch.float16))
    assert rare_draws() < 4_000 * share - 6 * deviation


def fine_bits(noise):
    "Share of numbers that single precision could not tell from their neighbours."
    return float(((noise * 2**24) % 1 != 0).double().mean())


def test_noise_has_more_bits_than_single_precision():
    assert exact_noise((1000,), seeded()).dtype == torch.float64
    assert fine_bits(exact_noise((1000,), seeded())) > 0.99
    assert fine_bits(rounded(torch.float32)((1000,), seeded())) == 0
    assert fine_bits(torch.exp(-torch.exp(-gumbel_noise((1000,), seeded())))) > 0.99


@pytest.mark.parametrize("dtype, reached", ((None, True), (torch.float32, False), (torch.float16, False)))
def test_an_id_far_out_on_the_line_is_reached_with_double_precision_alone(monkeypatch, dtype, reached):
    "Between 1 - 2^-28 and 1 lies an id; u = 1 - 2^-30 falls on it, unless u has lost its last bits."
    bits = {None: 53, torch.float32: 24, torch.float16: 11}[dtype]
    near_one = math.floor((1 - 2.0**-30) * 2**bits) / 2**bits
    monkeypatch.setattr(
        noise, "exact_noise", lambda shape, *rest: torch.full(shape, near_one, dtype=torch.float64)
    )
    logits = torch.tensor([[0.0, -28 * math.log(2)]])
    assert bool(sample_tokens(logits)[0] == 1) == reached


def test_half_precision_noise_breaks_the_exactness_of_first_hitting(monkeypatch):
    "The share at which the first of 64 tokens is revealed is the 64th root of a uniform number."
    first = lambda: exact_noise((20_000, 64), seeded()).amax(-1) ** 64
    assert p_value((first() * 20).long().bincount(minlength=20), torch.ones(20) / 20) > 1e-3
    coarse = rounded(torch.float16)((20_000, 64), seeded()).amax(-1) ** 64
    assert p_value((coarse * 20).long().bincount(minlength=20), torch.ones(20) / 20) < 1e-6


def test_halton_ranks_of_any_grid_are_a_permutation_spread_evenly():
    for grid in ((1, 1), (1, 9), (7, 3), (32, 32)):
        assert torch.equal(halton_ranks(grid).sort().values, torch.arange(grid[0] * grid[1]))
    quarters = (halton_ranks((16, 16)) < 64).view(2, 8, 2, 8).sum((1, 3))
    assert quarters.min() >= 15 and quarters.max() <= 17


def test_a_sampler_of_ones_own_is_a_setting():
    @register_sampler("last_first")
    def last_first(state, *, stop=1.0):
        place = torch.arange(state.hidden.shape[1]).float() * stop
        return hide_lowest(place.masked_fill(~state.hidden, math.inf), state.counts)

    settings = GenerationConfig(sampler="last_first", sampler_params={"stop": 2.0})
    flat = lambda ids, hidden, step: torch.zeros(int(hidden.sum()), 2)
    _, records = generate_ids(
        flat,
        torch.full((1, 4), 2),
        2,
        steps=4,
        schedule="linear",
        sampler=settings.token_sampler(),
        return_steps=True,
    )
    assert [record["hidden"][0].int().tolist() for record in records] == [
        [1, 1, 1, 0],
        [1, 1, 0, 0],
        [1, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    with pytest.raises(ValueError, match="takes \\['stop'\\]"):
        settings.override(sampler_params={"start": 1})

"Finite time and scores: recorded numbers of the originals, identities, bounds and laws by enumeration."

import itertools
import math

import pytest
import torch
from golden import case
from test_diffusion import Recorded
from test_models import from_golden
from test_sampling import passes
from torch.nn.functional import one_hot

from dlm.data.packing import Packing
from dlm.diffusion.corruption import Absorbing, Uniform
from dlm.diffusion.finite import D3PM, step_ends, without_mask
from dlm.diffusion.objectives import MDLM, reverse_law, spread
from dlm.diffusion.schedules import Cosine, CosineMD4, Geometric, Linear, LogLinear, Polynomial
from dlm.diffusion.scores import (
    SEDD,
    log_expm1,
    rate,
    rate_into,
    reverse_rate,
    score_entropy,
    score_of,
    score_scale,
    staggered_score,
    transition,
    transition_into,
)
from dlm.foundations.configuration import build, describe
from dlm.models.dit import DiTConfig
from dlm.sampling.ancestral import Ancestral, last
from dlm.sampling.canvas import blank, infill
from dlm.sampling.categorical import Categorical, Greedy, LegacyFloat32
from dlm.sampling.scores import Analytic, Euler, euler, score_at, tweedie
from dlm.training.run import Run, check_fit

SCHEDULES = [LogLinear(), Cosine(), CosineMD4(), Linear(), Geometric(), Polynomial(2.0)]


def masked_process(golden):
    return Absorbing(golden.config["mask_index"], golden.config["vocab_size_with_mask"])


# Recorded numbers: SEDD's chain, losses and samplers


def chain_of(golden):
    tokens, size = golden.config["tokens"], golden.config["graph_dim"]
    return Absorbing(tokens, size) if golden.config["graph"] == "absorb" else Uniform(size)


SEDD_CASES = pytest.mark.parametrize("name", ["sedd_absorb", "sedd_uniform"])


def number_in(golden, prefix):
    "The noise written into a tensor's name, and the name"
    name = next(n for n in golden.tensors if n.startswith(prefix))
    return float(name.removeprefix(prefix)), name


@SEDD_CASES
def test_golden_sedd_chain(name):
    golden = case(name)
    chain = chain_of(golden)
    states = torch.arange(chain.vocab_size)
    golden.compare(rate(chain, states), "rate")
    golden.compare(rate_into(chain, states), "transp_rate")
    sigma, full = number_in(golden, "transp_transition_sigma")
    golden.compare(transition_into(chain, states, torch.tensor(sigma).double()), full)
    torch.testing.assert_close(
        transition(chain, states, torch.tensor(sigma).double()).T, golden[full].double(), rtol=1e-5, atol=1e-6
    )
    if name == "sedd_uniform":
        sigma, full = number_in(golden, "transition_sigma")
        golden.compare(transition(chain, states, torch.tensor(sigma).double()), full)


@SEDD_CASES
def test_golden_sedd_loss(name):
    golden = case(name)
    chain, log_score, x, z = chain_of(golden), golden["log_score"], golden["x0"], golden["x"]
    entropy = score_entropy(chain, log_score, x, z, spread(golden["sigma"], x))
    golden.compare(entropy, "score_entropy")
    golden.compare((entropy * golden["dsigma"][:, None]).sum(1), "loss")
    objective = SEDD(chain)
    scale = score_scale(chain, objective.schedule.sigma(golden["t"]))
    loss = objective.token_loss(log_score - scale[:, None, None], x, z, golden["t"])
    golden.compare(loss.sum(1), "loss")


@SEDD_CASES
def test_golden_sedd_scores(name):
    golden = case(name)
    chain, score, z = chain_of(golden), golden["log_score"].double().exp(), golden["x"]
    golden.compare(reverse_rate(chain, score, z), "reverse_rate")
    dsigma, full = number_in(golden, "staggered_score_dsigma")
    golden.compare(staggered_score(chain, score, dsigma), full)


@SEDD_CASES
def test_golden_sedd_steps(name):
    golden = case(name)
    chain, score, z = chain_of(golden), golden["log_score"].double().exp(), golden["x"]
    schedule, dt = LogLinear(), golden.info["scalars"]["sampler_dt"]
    t = golden["sampler.t"].double()
    dsigma = schedule.sigma(t) - schedule.sigma(t - dt)
    weights = dict(
        analytic=tweedie(chain, score, z, dsigma),
        euler=euler(chain, score, z, schedule.dsigma(t) * dt),
        denoise=tweedie(chain, score, z, schedule.sigma(golden["denoise.t"].double())),
    )
    if isinstance(chain, Absorbing):
        weights["denoise"] = weights["denoise"][..., : chain.mask_id]
    for step, value in weights.items():
        golden.compare(value, f"{step}.unnormalised")
        golden.compare(LegacyFloat32().at(value, golden[f"{step}.uniforms"]), f"{step}.sample")


@SEDD_CASES
def test_golden_sedd_steps_are_those_of_the_samplers(name):
    "What a sampler draws from is the recorded law, without what is negative"
    golden = case(name)
    chain, z, dt = chain_of(golden), golden["x"], golden.info["scalars"]["sampler_dt"]
    t, objective = golden["sampler.t"][:, 0].double(), SEDD(chain)
    for sampler, step in ((Analytic(), "analytic"), (Euler(), "euler")):
        for b in range(len(z)):
            alive, scale = chain.alive(z[b]), score_scale(chain, objective.schedule.sigma(t[b]))
            if not alive.any():
                continue
            law = sampler.law(objective, golden["log_score"][b].double() - scale, z[b], t[b], t[b] - dt)
            want = golden[f"{step}.unnormalised"][b].double().clamp_min(0)
            tolerance = golden.info["tensors"][f"{step}.unnormalised"]["tolerance"]
            torch.testing.assert_close(law[alive], want[alive], **tolerance)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sedd_dit_absorb", "sedd_dit_uniform"])
def test_golden_sedd_dit_objective(name):
    golden = case(name)
    size = len(golden["weights.vocab_embed.embedding"])
    chain = Absorbing(size - 1, size) if golden.config["scale_by_sigma"] else Uniform(size)
    objective, model = SEDD(chain), from_golden(golden, size, time_conditioning=True)
    ids, sigma = golden["input_ids"], golden["sigma"]
    t = objective.schedule.time(torch.exp(-sigma.double()))
    golden.compare(objective.log_score(model(ids, sigma), ids, t), "log_score")


@pytest.mark.parametrize("schedule, name", [(LogLinear(), "loglinear"), (Geometric(1e-3, 10.0), "geometric")])
def test_golden_mdlm_losses_sedd(schedule, name):
    golden = case("mdlm_losses")
    objective = SEDD(masked_process(golden), schedule)
    loss = objective.token_loss(golden["raw_logits_xt"], golden["x0"], golden["xt"], golden["t"])
    golden.compare(loss, f"sedd.{name}")


def test_golden_duo_absorbing_losses():
    golden = case("duo_absorbing_losses")
    process, data = masked_process(golden), (golden["raw_logits"], golden["x0"], golden["xt"])
    golden.compare(MDLM(process).token_loss(*data, golden["t"]), "mdlm.nll")
    golden.compare(SEDD(process).token_loss(*data, golden["t"]), "sedd.nll")
    # there t is the noise itself, (1 - eps) t, and the step is 1/T of it; alpha_s of the original is wrong
    objective = D3PM(process, LogLinear(0.0), steps=golden.config["T_d3pm"])
    noise = LogLinear().noise(golden["t"].double())
    torch.testing.assert_close(1 - noise[:, None], golden["alpha_t"].double(), rtol=1e-5, atol=1e-6)
    loss = objective.token_loss(golden["raw_logits"].double(), golden["x0"], golden["xt"], noise)
    loss = loss + objective.reconstruction(golden["raw_logits_x0"].double(), golden["x0"])
    torch.testing.assert_close(loss, golden["d3pm.nll_correct"], rtol=1e-4, atol=1e-4)


# Recorded numbers: D3PM


@pytest.mark.parametrize("never_mask", [False, True])
def test_golden_mdlm_losses_d3pm(never_mask):
    golden = case("mdlm_losses")
    ending, x = "_subs_masking" if never_mask else "", golden["x0"]
    names = [n for n in golden.tensors if n.startswith("d3pm_T") and n.endswith("_subs_masking") == never_mask]
    assert names
    for name in names:
        steps = int(name.removeprefix("d3pm_T").removesuffix(ending))
        t = golden[f"finite_T{steps}.t_discrete"]
        golden.compare(((golden["t_finite"] * steps).floor() + 1) / steps, f"finite_T{steps}.t_discrete")
        objective = D3PM(masked_process(golden), LogLinear(0.0), steps=steps, never_mask=never_mask)
        named = objective.reconstruction(golden["raw_logits_x0"], x)
        golden.compare(objective.token_loss(golden["raw_logits_xt"], x, golden["xt"], t) + named, name)
        if not never_mask:
            golden.compare(named, "d3pm.reconstruction")


@pytest.mark.parametrize("never_mask", [False, True])
def test_golden_mdlm_losses_d3pm_is_finite_at_the_first_grid_point(never_mask):
    "At t = 1/T the original divides zero by zero; the divergence there is -log of the chance to find the token"
    golden = case("mdlm_losses")
    process, x, z, steps = masked_process(golden), golden["x0"], golden["xt"], 20
    assert golden["edge_t_is_1_over_T.d3pm" + "_subs_masking" * never_mask].isnan().all()
    objective = D3PM(process, LogLinear(0.0), steps=steps, never_mask=never_mask)
    logits, t = golden["raw_logits_xt"].double(), torch.full_like(golden["t"], 1 / steps)
    law = process.posterior(
        objective.log_x0(logits, z).exp(), z, *(a[:, None] for a in step_ends(LogLinear(0.0), t, 20))
    )
    want = steps * -law.gather(-1, x[..., None])[..., 0].log() * (z == process.mask_id)
    loss = objective.token_loss(logits, x, z, t)
    assert loss.isfinite().all()
    torch.testing.assert_close(loss, torch.where(z == process.mask_id, want, 0.0))


def test_golden_mdlm_dit_heads():
    golden = case("mdlm_dit")
    process, z, t = masked_process(golden), golden["input_ids"], LogLinear().time(torch.exp(-golden["sigma"].double()))
    for never_mask, name in ((False, "d3pm_logprobs"), (True, "d3pm_logprobs_subs_masking")):
        objective = D3PM(process, steps=10, never_mask=never_mask)
        log_x0 = objective.log_x0(golden["logits"], z)
        if never_mask:
            assert log_x0[..., process.mask_id].isneginf().all() and golden[name][..., process.mask_id].max() < -1e5
        real = torch.arange(process.vocab_size) != process.mask_id if never_mask else None
        golden.compare(log_x0, name, real)
    golden.compare(SEDD(process).log_score(golden["logits"], z, t), "sedd_logscore")


# Recorded numbers: the analytic step of guesses


def test_golden_mdlm_samplers_analytic():
    golden = case("mdlm_samplers")
    objective, z = MDLM(masked_process(golden)), golden["xt"]
    chain, schedule, log_x0 = objective.corruption, objective.schedule, objective.log_x0(golden["raw_logits"], z)
    t, dt = golden["t"].double(), golden.config["dt"]
    score = score_of(chain, log_x0.double(), z, schedule.alpha(t))
    golden.compare(score, "analytic.score")
    step = tweedie(chain, score, z, schedule.sigma(t) - schedule.sigma(t - dt))
    golden.compare(step, "analytic.unnormalised")
    golden.compare(step / step.sum(-1, keepdim=True), "analytic.probs")
    golden.compare(LegacyFloat32().at(step.float(), golden["analytic.uniforms"]), "analytic.sample")
    t = golden["t_final"].double()
    score = score_of(chain, log_x0.double(), z, schedule.alpha(t))
    end = without_mask(chain, tweedie(chain, score, z, schedule.sigma(t))).clamp_min(0)
    golden.compare(end, "denoise_analytic.unnormalised")
    golden.compare(end / end.sum(-1, keepdim=True), "denoise_analytic.probs")
    golden.compare(LegacyFloat32().at(end.float(), golden["denoise_analytic.uniforms"]), "denoise_analytic.sample")


def test_golden_duo_mdlm_samplers_analytic():
    golden = case("duo_mdlm_samplers")
    objective, z = MDLM(masked_process(golden)), golden["xt"]
    t, dt, schedule = golden["t"].double(), golden.config["dt"], objective.schedule
    score = score_of(objective.corruption, objective.log_x0(golden["raw_logits"], z).double(), z, schedule.alpha(t))
    step = tweedie(objective.corruption, score, z, schedule.sigma(t) - schedule.sigma(t - dt))
    golden.compare(step, "analytic.probs")


# Worked numbers (specification, appendix A)


def test_worked_numbers():
    t = torch.tensor([0.5], dtype=torch.float64)
    sigma, dsigma = LogLinear().sigma(t), LogLinear().dsigma(t)
    assert sigma.item() == pytest.approx(0.6921476802268618) and dsigma.item() == pytest.approx(1.9960039960039961)
    ratios, two, mask = (
        torch.tensor([[0.3, 0.2, 0.9, 0.1, 1.0]], dtype=torch.float64),
        torch.tensor([2]),
        torch.tensor([4]),
    )
    entropy = score_entropy(Absorbing(4, 5), ratios.log(), two, mask, sigma)
    assert entropy.item() == pytest.approx(0.6055734502911089, rel=1e-12)
    assert (entropy * dsigma).item() == pytest.approx(1.2087270266549806, rel=1e-12)
    score, level = torch.tensor([[0, -0.5, 0.3, -1.0]], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    for x, want in ((0, 0.24767004567526675), (2, 0.8251744881683462)):
        got = score_entropy(Uniform(4), score, torch.tensor([x]), torch.tensor([0]), level)
        assert got.item() == pytest.approx(want, rel=1e-12)
    guess = torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.1]], dtype=torch.float64)
    loss = D3PM(Absorbing(4, 5), LogLinear(0.0), steps=1000).token_loss(guess.log(), two, mask, t)
    assert loss.item() == pytest.approx(2.234995836735, rel=1e-12)
    guess = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0]], dtype=torch.float64)
    step = tweedie(Absorbing(4, 5), score_of(Absorbing(4, 5), guess.log(), mask, torch.exp(-sigma)), mask, 0.2)
    want = torch.tensor([[0.022184601, 0.044369201, 0.066553802, 0.088738403, 0.778153993]], dtype=torch.float64)
    torch.testing.assert_close(step, want, rtol=0, atol=1e-9)


# Identities


def by_hand(corruption, log_x0, x, z, alpha_s, alpha_t):
    "The divergence from the two distributions written out, in float64"
    truth = one_hot(x, corruption.vocab_size).double()
    q, p = (corruption.posterior(probs, z, alpha_s, alpha_t) for probs in (truth, log_x0.double().exp()))
    return torch.where(q > 0, q * (q / p).log(), 0.0).sum(-1)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("corruption", [Absorbing(2, 6), Uniform(6)], ids=str)
def test_d3pm_is_T_times_the_divergence(corruption, schedule, steps):
    g = torch.Generator().manual_seed(steps)
    objective = D3PM(corruption, schedule, steps=steps)
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    x = torch.randint(3, 6, (steps, 20), generator=g)
    z = torch.where(torch.rand(x.shape, generator=g) < 0.5, x, torch.randint(6, x.shape, generator=g))
    z = torch.where(z == x, z, 2) if isinstance(corruption, Absorbing) else z
    logits = 2 * torch.randn(steps, 20, 6, generator=g, dtype=torch.float64)
    ends = [a[:, None].expand(x.shape) for a in step_ends(schedule, t, steps)]
    want = steps * by_hand(corruption, objective.log_x0(logits, z), x, z, *ends)
    torch.testing.assert_close(objective.token_loss(logits, x, z, t), want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("corruption", [Absorbing(499, 500), Uniform(500)], ids=str)
def test_d3pm_keeps_its_digits_in_single_precision(corruption):
    g = torch.Generator().manual_seed(0)
    objective = D3PM(corruption, steps=1000)
    t = torch.linspace(0.001, 1, 300, dtype=torch.float64).mul(1000).round() / 1000
    x = torch.randint(499, (300,), generator=g)
    z = corruption.corrupt(x, objective.schedule.alpha(t), g)
    for scale in (0.1, 3.0, 10.0):
        logits = scale * torch.randn(300, 500, generator=g)
        logits[torch.arange(300), x] += scale
        want = objective.token_loss(logits.double(), x, z, t)
        got = objective.token_loss(logits, x, z, t)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)
        assert objective.token_loss(logits.bfloat16(), x, z, t).dtype == torch.float32


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_d3pm_becomes_mdlm(schedule):
    g = torch.Generator().manual_seed(0)
    process, x = Absorbing(5, 6), torch.randint(5, (4, 8), generator=g)
    z = process.corrupt(x, torch.tensor(0.5), g)
    logits, t = torch.randn(4, 8, 6, generator=g, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75, 1.0]).double()

    def finite(steps):
        return D3PM(process, schedule, steps=steps, never_mask=True).token_loss(logits, x, z, t)

    for steps in (4, 100):
        torch.testing.assert_close(finite(steps), MDLM(process, schedule, steps=steps).token_loss(logits, x, z, t))
    limit = MDLM(process, schedule).token_loss(logits, x, z, t)
    torch.testing.assert_close(finite(2**20), limit, rtol=1e-5, atol=10 / 2**20)
    coarse, fine = ((finite(n) - limit).abs().max() for n in (2**10, 2**16))
    assert fine < coarse / 32 + 1e-9  # the error is of order 1/T; none for a log-linear schedule


def test_d3pm_at_the_true_token_costs_nothing():
    for corruption in (Absorbing(5, 6), Uniform(6)):
        x = torch.arange(5).repeat(6)
        z = torch.arange(6).repeat_interleave(5)
        z = torch.where(z == x, z, 5) if isinstance(corruption, Absorbing) else z
        sure = torch.where(one_hot(x, 6) > 0, 0.0, -torch.inf)
        for steps, t in ((4, 0.25), (4, 1.0), (1000, 0.5)):
            loss = D3PM(corruption, steps=steps).token_loss(sure, x, z, torch.full((30,), t))
            torch.testing.assert_close(loss, torch.zeros(30), rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES[:5], ids=str)
def test_sedd_with_normalised_ratios_is_mdlm(schedule):
    g = torch.Generator().manual_seed(0)
    process, x = Absorbing(2, 6), torch.randint(3, 6, (4, 8), generator=g)
    z = process.corrupt(x, torch.tensor(0.5), g)
    logits, t = (
        torch.randn(4, 8, 6, generator=g, dtype=torch.float64),
        torch.rand(4, generator=g).double() * 0.99 + 0.01,
    )
    masked, scores = MDLM(process, schedule), SEDD(process, schedule)
    raw = logits.index_fill(-1, torch.tensor(2), -torch.inf).log_softmax(-1) + math.log(5)
    want = masked.token_loss(logits, x, z, t)
    torch.testing.assert_close(scores.token_loss(raw, x, z, t), want)
    torch.testing.assert_close(scores.log_x0(raw, z, t), masked.log_x0(logits, z))
    hidden = z == 2
    for change in (-0.2, 0.2):
        assert (scores.token_loss(raw + change, x, z, t) > want)[hidden].all()


@pytest.mark.parametrize("chain", [Absorbing(2, 5), Uniform(5)], ids=str)
def test_score_entropy_is_its_definition(chain):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(3, 5, (400,), generator=g)
    sigma = torch.rand(400, generator=g, dtype=torch.float64) * 5 + 1e-3
    z = chain.corrupt(x, torch.exp(-sigma), g)
    log_score = torch.randn(400, 5, generator=g, dtype=torch.float64)
    way = rate_into(chain, z).scatter(-1, z[:, None], 0.0)
    truth = transition(chain, x, sigma)
    r = truth / truth.gather(-1, z[:, None])
    terms = log_score.exp() - r * log_score + torch.where(r > 0, r * (r.log() - 1), 0.0)
    torch.testing.assert_close(score_entropy(chain, log_score, x, z, sigma), (way * terms).sum(-1))
    true = score_entropy(chain, r.log(), x, z, sigma)
    torch.testing.assert_close(true, torch.zeros(400).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("chain", [Absorbing(499, 500), Uniform(500)], ids=str)
@pytest.mark.parametrize("schedule", [LogLinear(), Geometric(), Linear(1e-3, 1e8)], ids=str)
def test_sedd_keeps_its_digits_in_single_precision(chain, schedule):
    g = torch.Generator().manual_seed(0)
    objective, x = SEDD(chain, schedule), torch.randint(499, (200,), generator=g)
    t = torch.linspace(1e-3, 1, 200, dtype=torch.float64)
    z, logits = chain.corrupt(x, schedule.alpha(t), g), torch.randn(200, 500, generator=g)
    got, want = objective.token_loss(logits, x, z, t), objective.token_loss(logits.double(), x, z, t)
    assert got.dtype == torch.float32 and got.isfinite().all()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_log_expm1_at_both_ends():
    sigma = torch.tensor([1e-6, 1e-3, 1.0, 50.0, 1000.0], dtype=torch.float64)
    want = [math.log(math.expm1(s)) if s < 700 else s for s in sigma.tolist()]
    assert log_expm1(sigma).tolist() == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(log_expm1(sigma.float()).double(), log_expm1(sigma), rtol=1e-6, atol=1e-6)


OBJECTIVES = [
    MDLM(Absorbing(2, 6), Cosine()),
    D3PM(Absorbing(2, 6), Cosine(), steps=5),
    D3PM(Uniform(6), steps=5),
    SEDD(Absorbing(2, 6), Geometric()),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{type(o).__name__}-{type(o.corruption).__name__}")
def test_analytic_step_is_the_ancestral_one_for_a_guess(objective):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 6, generator=g, dtype=torch.float64)
    z = torch.full((40,), 2) if isinstance(objective.corruption, Absorbing) else torch.randint(6, (40,), generator=g)
    log_x0 = objective.log_x0(logits, z, torch.tensor(0.7).double())
    for t, s in ((0.7, 0.3), (1.0, 0.999), (0.01, 1e-5)):
        t, s = torch.tensor(t).double(), torch.tensor(s).double()
        want = reverse_law(objective, log_x0, z, t, s)
        score = score_of(objective.corruption, log_x0, z, objective.schedule.alpha(t))
        step = tweedie(objective.corruption, score, z, objective.schedule.sigma(t) - objective.schedule.sigma(s))
        torch.testing.assert_close(step, want, rtol=1e-6, atol=1e-7)


def test_the_guess_behind_a_score_under_a_uniform_corruption():
    g = torch.Generator().manual_seed(0)
    objective, guess = SEDD(Uniform(7)), torch.rand(50, 7, generator=g, dtype=torch.float64)
    guess, z, t = guess / guess.sum(-1, keepdim=True), torch.randint(7, (50,), generator=g), torch.rand(50).double()
    raw = score_of(objective.corruption, guess.log(), z, objective.schedule.alpha(t)).log()
    torch.testing.assert_close(objective.log_x0(raw, z, t).exp(), guess, rtol=1e-6, atol=1e-9)
    wild = objective.log_x0(5 * torch.randn(50, 7, generator=g), z, t)
    torch.testing.assert_close(wild.exp().sum(-1), torch.ones(50))
    assert not wild.isnan().any()


# The call


@pytest.mark.parametrize("objective", [*OBJECTIVES, SEDD(Uniform(6))], ids=lambda o: type(o).__name__)
def test_call_equals_token_loss(objective):
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(5, 9, 6, generator=g), torch.randint(3, 6, (5, 9), generator=g)
    valid = torch.rand(5, 9, generator=g) < 0.7
    t = objective.times(5, g)
    loss = objective(Recorded(logits), ids, valid, torch.Generator().manual_seed(3), t)
    alpha = objective.schedule.alpha(t)[:, None]
    z = objective.corruption.corrupt(ids, alpha, torch.Generator().manual_seed(3))
    want = objective.token_loss(logits.double(), ids, z, t)
    if isinstance(objective, D3PM):
        want = want + objective.reconstruction(logits.double(), ids)
    torch.testing.assert_close(loss.per_token.double(), want * valid, rtol=1e-4, atol=1e-4)
    assert torch.equal(loss.valid, valid)


def test_reconstruction_is_asked_with_the_clean_text_and_no_noise():
    class Watching(Recorded):
        def hidden(self, ids, sigma=None, positions=None):
            asked.append((ids, sigma))
            return super().hidden(ids, sigma, positions)

    asked, ids = [], torch.randint(5, (3, 4))
    D3PM(Absorbing(5, 6), steps=10)(Watching(torch.randn(3, 4, 6)), ids)
    assert len(asked) == 2 and torch.equal(asked[1][0], ids) and (asked[1][1] == 0).all() and (asked[0][1] > 0).all()


@pytest.mark.parametrize("objective", [*OBJECTIVES, SEDD(Uniform(6))], ids=lambda o: type(o).__name__)
def test_gradients_are_finite(objective):
    ids = torch.randint(3, 6, (16, 8), generator=torch.Generator().manual_seed(0))
    logits = torch.zeros(16, 8, 6, requires_grad=True)
    objective(Recorded(logits), ids, generator=torch.Generator().manual_seed(0)).mean().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
    if objective.steps:
        logits = torch.zeros(objective.steps, 8, 6, requires_grad=True)
        t = torch.arange(1, objective.steps + 1) / objective.steps
        z = torch.tensor(2 if isinstance(objective.corruption, Absorbing) else 5).expand(objective.steps, 8)
        objective.token_loss(logits, ids[: objective.steps], z, t).sum().backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("objective", [D3PM(Uniform(6), steps=4), SEDD(Absorbing(5, 6)), SEDD(Uniform(6))], ids=str)
def test_vocabulary_sized_rows_are_made_in_slices(objective, monkeypatch):
    import dlm.diffusion.cross_entropy as module

    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(4, 6), torch.randn(50, 4, requires_grad=True)
    x, z, t = torch.randint(5, (50,)), torch.randint(6, (50,)), torch.full((50,), 0.5)
    whole = objective.rows(head, hidden, x, z, t)
    grad = torch.autograd.grad(whole.sum(), hidden)
    sizes = []
    monkeypatch.setattr(module, "FUSED_FROM", 60)
    sliced = objective.rows(lambda h: sizes.append(len(h)) or head(h), hidden, x, z, t)
    assert sizes == [50]  # a head of unknown size is not sliced
    head.register_forward_hook(lambda m, a, out: sizes.append(len(out)))
    sliced = objective.rows(head, hidden, x, z, t)
    torch.testing.assert_close(sliced, whole)
    torch.testing.assert_close(torch.autograd.grad(sliced.sum(), hidden), grad)
    assert max(sizes[1:]) == 10


# Bounds by enumeration


class Table:
    "Random logits for every text and noise level"

    head = staticmethod(lambda h: h)

    def __init__(self, size, length, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.size = size
        self.base, self.slope = torch.randn(2, *[size] * length, length, size, generator=g, dtype=torch.float64)

    def hidden(self, ids, sigma=None, positions=None):
        sigma = torch.as_tensor(sigma).double().reshape(-1, 1, 1)
        logits = self.base[tuple(ids.T)] + torch.tanh(sigma) * self.slope[tuple(ids.T)]
        return logits if positions is None else logits[positions]


def texts(size, length):
    return torch.tensor(list(itertools.product(range(size), repeat=length)))


def spread_law(rows, states):
    "Transition matrix of texts whose tokens jump independently, from the laws of their tokens [S, L, V]"
    jump = torch.ones(len(states), len(states), dtype=torch.float64)
    for place in range(states.shape[1]):
        jump *= rows[:, place][:, states[:, place]]
    return jump


def noisy_law(objective, x, states, t):
    "Chance of each noisy text at time t given each clean text, [K, S]"
    V, alpha = objective.corruption.vocab_size, objective.schedule.alpha(t)
    rows = alpha * one_hot(x, V) + (1 - alpha) * objective.corruption.prior_probs(torch.empty(0, dtype=torch.float64))
    return torch.stack([rows[:, i][:, states[:, i]] for i in range(x.shape[1])]).prod(0)


def expected_loss(objective, logits, x, states, t):
    "Loss of each clean text in nats, averaged over all its noisy texts at time t, [K]"
    shape, given = (len(x), *states.shape), noisy_law(objective, x, states, t)
    ids, z = x[:, None].expand(shape), states.expand(shape)
    loss = objective.token_loss(logits.expand(*shape, -1), ids, z, t).sum(-1)
    return torch.where(given > 0, given * loss, 0.0).sum(1)


def prior_law(objective, states):
    prior = objective.corruption.prior_probs(torch.empty(0, dtype=torch.float64))
    return prior[states].prod(-1)


@pytest.mark.parametrize("schedule", [LogLinear(0.0), Polynomial(2.0)], ids=str)
@pytest.mark.parametrize("corruption, letters", [(Absorbing(2, 3), 2), (Uniform(3), 3)], ids=str)
@pytest.mark.parametrize("steps", [1, 3, 12])
def test_d3pm_is_a_bound(corruption, letters, schedule, steps):
    objective, V = D3PM(corruption, schedule, steps=steps), corruption.vocab_size
    network, states = Table(V, 2, seed=steps), texts(V, 2)
    law, bound = prior_law(objective, states), torch.zeros(len(states), dtype=torch.float64)
    for i in range(steps, 0, -1):
        t = torch.tensor(i / steps, dtype=torch.float64)
        logits = network.hidden(states, schedule.sigma(t))
        ends = [a.expand(states.shape) for a in step_ends(schedule, t, steps)]
        law = law @ spread_law(corruption.posterior(objective.log_x0(logits, states).exp(), states, *ends), states)
        bound += expected_loss(objective, logits, states, states, t) / steps
    logits = network.hidden(states, schedule.sigma(torch.tensor(0.0)))
    named = spread_law(objective.log_x0(logits, states).exp(), states)
    bound += objective.reconstruction(logits, states).sum(1)
    clean = (states < letters).all(1)
    nll = -(law @ named).log()
    assert (bound[clean] >= nll[clean] - 1e-9).all()
    if steps == 1 and isinstance(corruption, Uniform):
        # one leap from pure noise: the texts before it tell nothing, so the bound is an average of divergences
        leap = objective.log_x0(network.hidden(states, schedule.sigma(torch.tensor(1.0))), states)
        x = states[4]
        want = -(leap[:, torch.arange(2), x].sum(1) * prior_law(objective, states)).sum()
        assert bound[4].item() == pytest.approx((want + objective.reconstruction(logits, states)[4].sum()).item())


@pytest.mark.parametrize("corruption, letters", [(Absorbing(2, 3), 2), (Uniform(3), 3)], ids=str)
def test_sedd_is_a_bound(corruption, letters):
    "The reversed chain with the network's rates, as a product of short matrix exponentials"
    objective, V, pieces = SEDD(corruption, Geometric(1e-3, 8.0)), corruption.vocab_size, 400
    schedule, network, states = objective.schedule, Table(V, 2), texts(V, 2)
    law, bound = prior_law(objective, states), torch.zeros(len(states), dtype=torch.float64)
    for i in range(pieces, 0, -1):
        t = torch.tensor((i - 0.5) / pieces, dtype=torch.float64)
        logits = network.hidden(states, schedule.sigma(t))
        score = objective.log_score(logits, states, t).exp()
        rates = reverse_rate(corruption, score, states)
        jump = torch.zeros(len(states), len(states), dtype=torch.float64)
        for place in (0, 1):
            other = states[:, 1 - place]
            jump += rates[:, place][:, states[:, place]] * (other[:, None] == other[None])
        law = law @ torch.matrix_exp(jump * schedule.dsigma(t) / pieces)
        bound += expected_loss(objective, logits, states, states, t) / pieces
    assert law.sum().item() == pytest.approx(1)
    # the end: from the noise that is left at t = 0 the text is read as it stands
    clean = (states < letters).all(1)
    left = -torch.expm1(-schedule.sigma(torch.tensor(0.0).double())).item()
    nll = -law.log()
    assert (bound[clean] >= nll[clean] - 20 * left - 1e-3).all()


@pytest.mark.parametrize("corruption, letters", [(Absorbing(2, 3), 2), (Uniform(3), 3)], ids=str)
def test_sedd_is_tight_for_the_true_score(corruption, letters):
    "With the ratios of the noisy law itself the bound of each text is its negative log-probability"
    objective, V, pieces = SEDD(corruption, Geometric(1e-5, 12.0)), corruption.vocab_size, 1500
    states, schedule = texts(V, 2), objective.schedule
    clean = (states < letters).all(1).nonzero()[:, 0]
    p = torch.rand(len(clean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, bound = p / p.sum(), torch.zeros(len(clean), dtype=torch.float64)
    index = (torch.arange(V) * V)[:, None] + torch.arange(V)  # number of each text
    for i in range(pieces):
        t = torch.tensor((i + 0.5) / pieces, dtype=torch.float64)
        noisy = p @ noisy_law(objective, states[clean], states, t)
        table = noisy[index]
        near = torch.stack([table[:, states[:, 1]].T, table[states[:, 0]]], 1)  # other tokens at each place, [S, 2, V]
        raw = near.log() - noisy.log()[:, None, None] - score_scale(corruption, schedule.sigma(t))
        bound += expected_loss(objective, raw, states[clean], states, t) / pieces
    torch.testing.assert_close(bound, -p.log(), rtol=5e-3, atol=0)


# Laws of whole walks


def chain_law(sampler, network, objective, start):
    "Law over all texts after the walk and its end, by multiplying transition matrices"
    V = objective.corruption.vocab_size
    states = texts(V, network.base.dim() - 2)
    given = [i for i, token in enumerate(start) if token is not None]
    law = prior_law(objective, states)
    if given:
        free = [i for i in range(states.shape[1]) if i not in given]
        prior = objective.corruption.prior_probs(torch.empty(0, dtype=torch.float64))
        law = prior[states[:, free]].prod(-1)
        for i in given:
            law = law * (states[:, i] == start[i])
    times = sampler.times()
    for t, s in itertools.pairwise([*times, 0 * times[0]]):
        logits = network.hidden(states, objective.schedule.sigma(t).float())
        rows = sampler.law(objective, logits.flatten(0, 1), states.flatten(), t, s).view(*states.shape, V)
        still = ~objective.corruption.alive(states)
        still[:, given] = True
        rows = torch.where(still[..., None], one_hot(states, V).double(), rows)
        law = law @ spread_law(rows / rows.sum(-1, keepdim=True), states)
    assert law.sum().item() == pytest.approx(1)
    return states, law


def counted(ids, states):
    V = int(states.max()) + 1
    weights = V ** torch.arange(ids.shape[1] - 1, -1, -1)
    return (ids * weights).sum(1).bincount(minlength=len(states))


WALKS = [
    MDLM(Absorbing(2, 3)),
    D3PM(Absorbing(2, 3), Cosine(), steps=5),
    D3PM(Uniform(3), steps=5),
    SEDD(Absorbing(2, 3)),
    SEDD(Uniform(3), Geometric(1e-3, 8.0)),
]


@pytest.mark.parametrize("sampler", [Analytic(1), Analytic(6), Euler(3), Euler(16)], ids=str)
@pytest.mark.parametrize("objective", WALKS, ids=lambda o: f"{type(o).__name__}-{type(o.corruption).__name__}")
def test_law_of_walks_by_scores(objective, sampler):
    network = Table(3, 2, seed=4)
    states, law = chain_law(sampler, network, objective, (None, None))
    ids = last(sampler.states(network, objective, blank(20_000, 2), torch.Generator().manual_seed(1))).ids
    assert passes(counted(ids, states), law)
    if isinstance(objective.corruption, Absorbing):
        assert not (ids == 2).any()


@pytest.mark.parametrize("sampler", [Analytic(4), Euler(10)], ids=str)
@pytest.mark.parametrize("objective", WALKS[2:], ids=lambda o: f"{type(o).__name__}-{type(o.corruption).__name__}")
def test_given_tokens_stay_and_shape_the_rest(objective, sampler):
    network = Table(3, 2, seed=5)
    canvas = infill(torch.tensor([[1, -1]]).expand(20_000, 2), hole=-1)
    ids = last(sampler.states(network, objective, canvas, torch.Generator().manual_seed(2))).ids
    assert (ids[:, 0] == 1).all()
    states, law = chain_law(sampler, network, objective, (1, None))
    assert passes(counted(ids, states), law)


@pytest.mark.parametrize("objective", [WALKS[1], WALKS[2]], ids=lambda o: type(o.corruption).__name__)
def test_ancestral_walk_of_d3pm_leaves_no_mask_and_follows_the_chain(objective):
    network, steps = Table(3, 2, seed=6), 4

    class Law(Analytic):
        def law(self, objective, logits, z, t, s, shape=None):
            return objective.step_law(logits, z, t, s)

    states, law = chain_law(Law(steps), network, objective, (None, None))
    ids = last(Ancestral(steps).states(network, objective, blank(20_000, 2), torch.Generator().manual_seed(3))).ids
    assert passes(counted(ids, states), law)
    _, same = chain_law(Analytic(steps), network, objective, (None, None))
    torch.testing.assert_close(law, same, rtol=1e-6, atol=1e-9)


def test_nucleus_and_greedy_act_on_the_guess():
    objective, t = SEDD(Uniform(4)), torch.tensor(0.5).double()
    guess = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).double()
    z = torch.tensor([2])
    raw = score_of(objective.corruption, guess.log(), z, objective.schedule.alpha(t)).log()
    for choose, kept in ((Categorical(top_p=0.7), [0.625, 0.375, 0, 0]), (Greedy(), [1, 0, 0, 0])):
        want = score_of(objective.corruption, torch.tensor([kept]).double().log(), z, objective.schedule.alpha(t))
        torch.testing.assert_close(score_at(objective, raw, z, t, choose.shape), want)
    law = Analytic().law(objective, raw, z, t, 0 * t, Greedy().shape)
    torch.testing.assert_close(law / law.sum(), torch.tensor([[1.0, 0, 0, 0]]).double())


# Refusals, and what is written down


@pytest.mark.parametrize(
    "objective", [SEDD(Absorbing(9, 10)), D3PM(Absorbing(9, 10), steps=5)], ids=lambda o: type(o).__name__
)
def test_a_network_that_is_not_told_the_time_is_refused(objective):
    def run(timed):
        return Run(objective, DiTConfig(vocab_size=10, length=16, time_conditioning=timed), packing=Packing(16))

    check_fit(run(True), range(9))
    name = type(objective).__name__
    with pytest.raises(ValueError, match=f"{name} needs_time True and DiTConfig time_conditioning False"):
        check_fit(run(False), range(9))


@pytest.mark.parametrize("objective", [*WALKS, D3PM(Absorbing(2, 3), steps=3, never_mask=True)], ids=str)
def test_objectives_are_written_down_and_built_again(objective):
    assert build(describe(objective)) == objective
    assert objective.needs_time == (not isinstance(objective, MDLM))


@pytest.mark.parametrize("sampler", [Analytic(5, eps=1e-3), Euler(7)], ids=str)
def test_samplers_are_written_down_and_built_again(sampler):
    assert build(describe(sampler)) == sampler


REFUSED = {
    "steps=None": lambda: D3PM(Absorbing(2, 3)),
    "steps=0": lambda: D3PM(Uniform(3), steps=0),
    "use MDLM": lambda: D3PM(Absorbing(2, 3)),
    "use UDLM": lambda: D3PM(Uniform(3)),
    "steps=10: score entropy": lambda: SEDD(Uniform(3), steps=10),
    "or Ancestral": lambda: last(
        Analytic(2).states(Table(3, 2), MDLM(Absorbing(2, 3), LogLinear(0.0)), blank(1, 2)),
    ),
    "eps above 0": lambda: last(Euler(2).states(Table(3, 2), SEDD(Uniform(3), Polynomial(2.0)), blank(1, 2))),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_name_both_sides(message):
    with pytest.raises(ValueError, match=message) as error:
        REFUSED[message]()
    assert "\n" not in str(error.value)


def test_positions_first_only_where_no_guess_is_a_mask():
    assert not D3PM(Absorbing(2, 3), steps=3).positions_first and not D3PM(Uniform(3), steps=3).positions_first
    assert D3PM(Absorbing(2, 3), steps=3, never_mask=True).positions_first and SEDD(Absorbing(2, 3)).positions_first
    network, objective = Table(3, 2), D3PM(Absorbing(2, 3), steps=3, never_mask=True)
    ids = last(Ancestral(3).states(network, objective, blank(20_000, 2), torch.Generator().manual_seed(0))).ids
    states, law = chain_law(Analytic(3), network, objective, (None, None))
    assert passes(counted(ids, states), law)


@pytest.mark.parametrize("objective", WALKS, ids=lambda o: f"{type(o).__name__}-{type(o.corruption).__name__}")
def test_laws_are_made_where_the_logits_are(objective):
    "A walk keeps its times on the CPU; the tensors of a text may be anywhere"
    logits, z = torch.empty(7, 3, device="meta"), torch.empty(7, dtype=torch.long, device="meta")
    t, s = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    for sampler in (Analytic(), Euler()):
        for time in (s, 0 * s):
            assert sampler.law(objective, logits, z, t, time).device.type == "meta"
    assert objective.step_law(logits, z, t, s).device.type == "meta"
    assert objective.token_loss(logits, z, z, torch.empty(7, device="meta")).device.type == "meta"

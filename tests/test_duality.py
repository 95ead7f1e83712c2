"Gaussian latents, their operator and the curriculum: the recorded numbers of DUO, exact laws, and what is refused"

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from golden import case
from scipy.integrate import quad
from scipy.optimize import curve_fit
from scipy.stats import chi2, norm

from dlm.diffusion.corruption import Uniform
from dlm.diffusion.curriculum import (
    DUO,
    Cooling,
    Curriculum,
    dense_mixture,
    log_mean_exp_below,
    sparse_mixture,
    top_mixture,
)
from dlm.diffusion.duality import Duality, distinct, largest, latents, operator, operator_table, walk, win
from dlm.diffusion.schedules import LogLinear
from dlm.diffusion.uniform import UDLM, uniform_nats
from dlm.foundations.configuration import build, describe
from dlm.models.dit import DiT, DiTConfig


def close(actual, expected, rtol=1e-7, atol=1e-10):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=rtol, atol=atol)


def passes(counts, law):
    "Whether counts come from a law, by a chi-squared test that an exact sampler passes 9,999 times in 10,000"
    want = counts.sum() * law.double()
    return ((counts - want) ** 2 / want).sum().item() < chi2.ppf(0.9999, len(law) - 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# The operator

SIZES = ["N27", "N1000", "N30522", "N50257"]


@pytest.mark.parametrize("name", SIZES)
def test_golden_duo_operator(name):
    golden, V = case("duo_operator"), int(name[1:])
    for value, expected in zip(win(golden["gamma"], V), ("pt", "grad_pt"), strict=True):
        golden.compare(value, f"{name}.{expected}")
    for value, expected in zip(operator(golden["gamma"], V), ("alpha", "dalpha_dgamma"), strict=True):
        close(value, golden[f"{name}.{expected}"], rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("name, more", [("gpt2", 0), ("bert-base-uncased", 1)])
def test_golden_duo_operator_shipped_tables(name, more):
    "The table shipped for BERT is labelled 30,522 ids but holds the numbers of one more"
    golden = case("duo_operator")
    V = golden.info["scalars"][f"shipped_cache.{name}"]["vocab_size"]
    for value, expected in zip(win(golden[f"shipped.{name}.gamma"], V + more), ("pt", "grad_pt"), strict=True):
        golden.compare(value, f"shipped.{name}.{expected}")


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased"])
def test_golden_duo_operator_looked_up(name):
    golden = case("duo_operator")
    scalars = golden.info["scalars"]
    duality = Duality(scalars[f"shipped_cache.{name}"]["vocab_size"], -3.5, -1.75)
    t = (golden[f"cached.{name}.gamma"].double() + 3.5) / 1.75
    golden.compare(duality.alpha(t), f"cached.{name}.alpha")
    golden.compare(duality.dalpha(t), f"cached.{name}.dalpha")
    ends = duality.alpha(torch.tensor([0.0, 1.0]).double())
    close(ends, torch.tensor(scalars[f"alpha_at_t0_t1.{name}"]), rtol=3e-4, atol=3e-5)
    q = ends[1] + (1 - ends[1]) / duality.vocab_size
    prior = q * (duality.vocab_size * q).log() + (1 - q) * (1 - ends[1]).log()
    assert prior.item() == pytest.approx(scalars[f"prior_loss.{name}"], rel=1e-3)


def test_golden_duo_operator_series():
    golden = case("duo_operator")
    duality = Duality(golden.info["scalars"]["fit_vocab_size"], -3.5, -1.75)
    t = (golden["series.gamma"].double() + 3.5) / 1.75
    golden.compare(duality.alpha(t), "series.alpha")
    golden.compare(duality.dalpha(t), "series.dalpha")


@pytest.mark.parametrize("name", ["poly3", "poly5", "poly9"])
def test_golden_duo_operator_polynomial_fits(name):
    "The published polynomials are the least-squares fits of our curve"
    golden = case("duo_operator")
    duality = Duality(golden.info["scalars"]["fit_vocab_size"], -3.5, -1.75)
    t = np.linspace(0, 1, 100_000)
    fit = np.polynomial.Polynomial.fit(t, duality.alpha(torch.tensor(t)).numpy(), int(name[4:]))
    at = golden["fit.t"].double().numpy()
    golden.compare(torch.tensor(fit(at)), f"fit.{name}.alpha")
    golden.compare(torch.tensor(fit.deriv()(at)), f"fit.{name}.dalpha")
    close(torch.tensor(fit.deriv()(at)), golden[f"fit.{name}.dalpha_true"], rtol=1e-4, atol=1e-4)


def tanh_curve(t, a, b, c, d):
    "A scaled and shifted hyperbolic tangent"
    return a * (np.tanh(b * t + c) + 1) / 2 + d


def edge_curve(t, a, b, c, d, e, f, h):
    "The same, with a correction that vanishes around one point"
    return tanh_curve(t, a, b, c, d) + h * (t - 0.5) * np.tanh(e * t + f) ** 2


@pytest.mark.parametrize("name, curve", [("sigmoid", tanh_curve), ("sigmoid-edge-corrected", edge_curve)])
def test_golden_duo_operator_sigmoid_fits(name, curve):
    "The published curves are least-squares fits of ours; the slope published with them is half of theirs"
    golden = case("duo_operator")
    scalars, coefficients = golden.info["scalars"], golden[f"fit.{name}.coefficients"].numpy()
    duality, t = Duality(scalars["fit_vocab_size"], -3.5, -1.75), np.linspace(0, 1, 20_000)
    exact = duality.alpha(torch.tensor(t)).numpy()
    fit = curve_fit(curve, t, exact, p0=coefficients)[0] if name == "sigmoid" else coefficients
    at = golden["fit.t"].double().numpy()
    golden.compare(torch.tensor(curve(at, *fit)), f"fit.{name}.alpha")
    assert np.abs(curve(t, *fit) - exact).max() == pytest.approx(scalars[f"fit.{name}.max_abs_error_alpha"], rel=0.01)
    slope = torch.tensor((curve(at + 1e-6, *fit) - curve(at - 1e-6, *fit)) / 2e-6)
    close(slope, golden[f"fit.{name}.dalpha_true"], rtol=1e-4, atol=1e-4)
    ours = duality.dalpha(golden["fit.t"].double())
    bug, right = golden[f"fit.{name}.dalpha"].double(), golden[f"fit.{name}.dalpha_true"]
    assert (ours - right).abs().mean() < (ours - bug).abs().mean() / 2


@pytest.mark.parametrize("V", [2, 5, 50258])
def test_operator_is_its_integral(V):
    for gamma in (-4.0, -1.0, 0.5):
        mu = math.exp(-gamma / 2)
        exact = quad(lambda z, mu=mu: norm.pdf(z - mu) * norm.cdf(z) ** (V - 1), mu - 12, mu + 12, epsabs=1e-13)[0]
        assert win(torch.tensor([gamma]), V)[0].item() == pytest.approx(exact, abs=1e-11)


def test_two_ids_have_a_closed_form():
    gamma = torch.linspace(-3, 3, 13).double()
    close(win(gamma, 2)[0], torch.special.ndtr(torch.exp(-gamma / 2) / math.sqrt(2)), atol=1e-13)


# The schedule

RANGES = [Duality(30522, -3.5, -1.75), Duality(50258), Duality(50258, -4.0, -1.0), Duality(27, -3.0, 2.0)]


@pytest.mark.parametrize("duality", RANGES, ids=str)
def test_schedule_agrees_with_the_operator_between_its_points(duality):
    t = torch.cat([torch.rand(300, generator=generator(), dtype=torch.float64), torch.tensor([0.0, 1.0])])
    alpha, slope = operator(duality.gamma(t), duality.vocab_size)
    close(duality.alpha(t), alpha, rtol=0, atol=1e-10)
    close(duality.noise(t), 1 - alpha, rtol=0, atol=1e-10)
    close(duality.dalpha(t), slope * (duality.gamma_max - duality.gamma_min), rtol=0, atol=1e-7)
    close(duality.time(alpha), t, rtol=0, atol=1e-8)
    assert duality.alpha(t.float()).dtype == torch.float32
    close(duality.alpha(t.float()).double(), alpha, rtol=0, atol=1e-5)
    close(duality.sigma(t), -alpha.log(), rtol=1e-8)
    close(duality.alpha_tilde(t) ** 2 + duality.sigma_tilde(t) ** 2, torch.ones_like(t))
    close((duality.alpha_tilde(t) / duality.sigma_tilde(t)).log() * -2, duality.gamma(t))


@pytest.mark.parametrize(
    "ends, gammas, V",
    [((0.9417, 0.0487), (-3.5, -1.75), 30522), ((0.9455, 0.0493), (-3.55, -1.85), 50258)],
)
def test_published_ranges(ends, gammas, V):
    assert Duality(V, *gammas).alpha(torch.tensor([0.0, 1.0]).double()).tolist() == pytest.approx(ends, abs=6e-5)


def test_published_slopes():
    t = torch.linspace(0, 1, 5).double()
    want = dict(
        lm1b=(-0.5589, -1.3733, -1.1614, -0.5571, -0.2027), openwebtext=(-0.5285, -1.3565, -1.1846, -0.5767, -0.2098)
    )
    for name, slopes in want.items():
        assert getattr(DUO, name)().duality.dalpha(t).tolist() == pytest.approx(slopes, abs=7e-3)


def test_a_table_is_kept_for_each_shape_it_may_have():
    a, b = operator_table(20, -3.0, -1.0, 64), operator_table(21, -3.0, -1.0, 64)
    assert a is operator_table(20, -3.0, -1.0, 64) and not torch.equal(a, b)
    assert not torch.equal(a, operator_table(20, -3.0, -1.5, 64))


@pytest.mark.parametrize(
    "args, message",
    [
        ((10, 0.0, 0.0), "gamma_min=0.0 is not below gamma_max=0.0"),
        ((10, -1.0, -2.0), "noise grows with gamma"),
        ((10, float("nan"), 0.0), "noise grows with gamma"),
        ((10, -30.0, 0.0), "gamma_min=-30.0 keeps a share of 1 of 10"),
        ((10, 0.0, 200.0), "gamma_max=200.0 keeps a share of"),
        ((1, -1.0, 0.0), "vocab_size=1"),
    ],
)
def test_ranges_without_noise_are_refused(args, message):
    with pytest.raises(ValueError, match=message) as caught:
        Duality(*args)
    assert "\n" not in str(caught.value)


# Draws


@pytest.mark.parametrize("V, k", [(5, 4), (12, 3)])
def test_largest_normals_have_the_law_of_sorted_ones(V, k):
    n = 200_000
    top = largest((n,), V - 1, k, generator())
    dense = torch.randn(n, V - 1, generator=generator(1), dtype=torch.float64).topk(k).values
    assert (top.diff(dim=-1) <= 0).all()
    for i in range(k):
        inner = dense[:, i].quantile(torch.linspace(0.1, 0.9, 9).double())
        counts = torch.bincount(torch.bucketize(top[:, i].contiguous(), inner), minlength=10)
        other = torch.bincount(torch.bucketize(dense[:, i].contiguous(), inner), minlength=10)
        assert ((counts - other) ** 2 / (counts + other)).sum().item() < chi2.ppf(0.9999, 9)


def test_largest_of_very_many_is_finite_and_where_it_should_be():
    top = largest((20_000,), 10**6, 2, generator())[:, 0]
    median = norm.isf(-math.expm1(-math.log(2) / 10**6))
    assert top.isfinite().all() and abs((top > median).double().mean().item() - 0.5) < 0.015


def test_distinct_ids_come_in_every_order_and_never_the_one_left_out():
    V, k = 5, 3
    x = torch.arange(V).repeat(24_000)
    ids = distinct(x, V, k, generator())
    assert (ids != x[:, None]).all() and (ids.sort(-1).values.diff(dim=-1) > 0).all()
    relative = ids - (ids > x[:, None]).long()
    counts = torch.bincount((relative * torch.tensor([16, 4, 1])).sum(-1), minlength=64)
    assert (counts > 0).sum() == 24 and passes(counts[counts > 0], torch.full((24,), 1 / 24))


def law_of(duality, t, x):
    law = torch.full((duality.vocab_size,), duality.noise(t).item() / duality.vocab_size)
    law[x] += duality.alpha(t).item()
    return law


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_winners_have_the_law_of_uniform_diffusion(t):
    duality, t, x = Duality(6, -2.0, 1.0), torch.tensor(t).double(), torch.full((100_000,), 2)
    levels = duality.alpha_tilde(t), duality.sigma_tilde(t)
    draws = {
        "dense": latents(x, *levels, 6, generator()).argmax(-1),
        "walk": walk(x, [duality.gamma(t)], 6, generator())[0],
        "mixture": dense_mixture(x, *levels, 0.1, 6, generator(1)).winner,
    } | {k: sparse_mixture(x, *levels, 0.1, 6, k, generator(k)).winner for k in (1, 2, 3, 5)}
    for name, z in draws.items():
        assert passes(torch.bincount(z, minlength=6), law_of(duality, t, 2)), name


def test_a_shared_draw_has_the_joint_law_of_shared_noise():
    duality, V, n = Duality(4, -2.0, 1.0), 4, 100_000
    x, times = torch.full((n,), 1), [torch.tensor(0.2), torch.tensor(0.7)]
    noise = torch.randn(n, V, generator=generator())
    dense = [latents(x, duality.alpha_tilde(t), duality.sigma_tilde(t), V, noise=noise).argmax(-1) for t in times]
    ours = walk(x, [duality.gamma(t) for t in times], V, generator(1))
    seen, want = (torch.bincount(s * V + t, minlength=V * V).double() for s, t in (ours, dense))
    assert (seen[want == 0] == 0).all()
    seen, want = seen[want > 0], want[want > 0]
    assert ((seen - want) ** 2 / (seen + want)).sum().item() < chi2.ppf(0.9999, len(seen) - 1)


def test_noise_levels_may_differ_between_texts_and_tokens():
    duality, x = Duality(50, -3.5, 0.0), torch.zeros(2, 20_000, dtype=torch.long)
    t = torch.tensor([[0.0], [1.0]]).double()
    shares = [
        (z == 0).double().mean(-1)
        for z in (
            sparse_mixture(x, duality.alpha_tilde(t), duality.sigma_tilde(t), 0.1, 50, 2, generator()).winner,
            walk(x, [duality.gamma(t)], 50, generator())[0],
        )
    ]
    for share in shares:
        close(share, win(duality.gamma(t[:, 0]), 50)[0], rtol=0, atol=0.02)


# Mixtures


def test_golden_duo_curriculum_topk():
    golden = case("duo_curriculum_topk")
    x, V, k = golden["x0"], golden.config["vocab_size"], golden.config["k"]
    raw, others = golden["raw_ids"], golden["topk_others"]
    assert others.shape[-1] == k
    ids = raw + (raw >= x[..., None])
    alpha, sigma = golden["alpha"][:, None], golden["sigma"][:, None]
    own = alpha + sigma * golden["extra_noise"].double()
    tau = 1 / golden.info["scalars"]["inverse_temperature"]
    mixture = top_mixture(x, own, others, ids, sigma.expand_as(own), tau, V)
    golden.compare(mixture.weights, "softmax_approx")
    golden.compare(mixture.ids, "topk_ids")
    # the original lets the clean token win as soon as it is among the first k
    biased = torch.where((mixture.ids == x[..., None]).any(-1), x, ids[..., 0])
    golden.compare(biased, "xt_usdm")
    right = torch.where(own > others.max(-1).values, x, ids.gather(-1, others.argmax(-1, keepdim=True))[..., 0])
    assert torch.equal(mixture.winner, right)
    wrong = golden.info["scalars"]["fraction_xt_usdm_not_argmax"]
    assert (biased != right).double().mean().item() == pytest.approx(wrong)


def test_golden_duo_curriculum_topk_tail():
    golden = case("duo_curriculum_topk")
    s = torch.tensor(1.7).double()
    golden.compare(log_mean_exp_below(golden["trunc.c"], s), "trunc.log_mean_exp")


@pytest.mark.parametrize("s", [0.3, 5.0, 400.0, 1e6])
def test_mean_below_keeps_its_digits(s):
    from mpmath import erfc, log, mp, mpf, sqrt

    mp.dps = 60
    for z in (-3.0, 0.0, 4.5):
        c = z * s
        exact = mpf(s) ** 2 / 2 + log(erfc((mpf(s) - mpf(c) / s) / sqrt(2))) - log(erfc(-mpf(c) / s / sqrt(2)))
        ours = log_mean_exp_below(*torch.tensor([c, s], dtype=torch.float64)).item()
        assert ours == pytest.approx(float(exact), rel=1e-11, abs=1e-11)


def test_all_coordinates_drawn_are_the_dense_mixture():
    "With k = V - 1 and the clean token not among them nothing is left to be averaged"
    V, tau, n = 6, 0.3, 2000
    g, x = generator(), torch.full((n,), 2)
    noise = torch.randn(n, V, generator=g, dtype=torch.float64)
    a, s = torch.tensor(0.6).double(), torch.tensor(0.8).double()
    dense = dense_mixture(x, a, s, tau, V, noise=noise)
    w = latents(x, a, s, V, noise=noise)
    others, places = w[:, [0, 1, 3, 4, 5]].sort(descending=True)
    ids = torch.tensor([0, 1, 3, 4, 5])[places]
    sparse = top_mixture(x, w[:, 2], others, ids, s.expand(n), tau, V)
    assert torch.equal(sparse.winner, dense.winner)
    outside = w[:, 2] <= others[:, -1]
    assert outside.any() and not outside.all()
    close(sparse.weights[outside], dense.weights.gather(-1, ids)[outside], rtol=1e-10)
    got, want = sparse.weights[~outside], dense.weights.gather(-1, sparse.ids)[~outside]
    # one coordinate is known by its mean only
    assert (got - want).abs().max() < 0.3 and ((got - want).mean(0).abs() < 0.01).all()


def test_weights_have_the_means_of_the_dense_ones():
    duality, t, x, n = Duality(20, -3.0, -1.0), torch.tensor(0.5).double(), torch.full((100_000,), 7), 3
    levels = duality.alpha_tilde(t), duality.sigma_tilde(t)
    dense = dense_mixture(x, *levels, 0.05, 20, generator()).weights
    sparse = sparse_mixture(x, *levels, 0.05, 20, 6, generator(1))
    top, ours = dense.topk(n).values.double(), sparse.weights.topk(n).values
    error = (top.std(0) ** 2 / len(x) + ours.std(0) ** 2 / len(x)).sqrt()
    assert ((top.mean(0) - ours.mean(0)).abs() < 4 * error).all()
    mine, own = dense[:, 7].double(), (sparse.weights * (sparse.ids == 7)).sum(-1)
    assert abs((mine.mean() - own.mean()).item()) < 4 * math.sqrt((mine.var() + own.var()).item() / len(x)) + 1e-3


@pytest.mark.parametrize("tau", [1.0, 1e-3, 1e-10])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_weights_are_shares(k, tau):
    duality, x = Duality(8, -2.0, 1.0), torch.randint(8, (3, 500), generator=generator())
    t = torch.rand(3, 1, generator=generator(), dtype=torch.float64)
    mixture = sparse_mixture(x, duality.alpha_tilde(t), duality.sigma_tilde(t), tau, 8, k, generator())
    total = mixture.weights.sum(-1)
    assert mixture.weights.isfinite().all() and (mixture.weights >= 0).all() and (total <= 1 + 1e-9).all()
    if tau == 1e-10 and k > 1:
        hard = mixture.ids.gather(-1, mixture.weights.argmax(-1, keepdim=True))[..., 0]
        assert torch.equal(hard, mixture.winner)
        close(mixture.weights.max(-1).values, torch.ones_like(total), rtol=1e-6)


# The curriculum


def from_golden(golden, length):
    "The recorded network"
    shape = {k: golden.config[k] for k in ("vocab_size", "hidden_size", "n_blocks", "n_heads", "cond_dim")}
    model = DiT(DiTConfig(**shape, length=length, time_conditioning=True)).eval()
    names = [n for n in golden.names("weights.") if n != "rotary_emb.inv_freq"]
    model.load_state_dict({n: golden[f"weights.{n}"] for n in names}, strict=True)
    return model


@torch.no_grad()
def test_golden_duo_dit_mixtures():
    golden = case("duo_dit")
    model, sigma = from_golden(golden, golden.config["length"]), golden["sigma"]
    V = golden.config["vocab_size"]
    mix = model.vocab_embed.mix
    logits = model(golden["input_ids"], sigma)
    golden.compare(logits, "logits")
    golden.compare(UDLM(Uniform(V)).log_x0(logits, golden["input_ids"]), "log_x_theta")
    golden.compare(model(mix(golden["soft_input_logits"].softmax(-1)), sigma), "logits_soft")
    golden.compare(model(mix(golden["topk_weights"], golden["topk_ids"]), sigma), "logits_topk")


@dataclass(frozen=True)
class Coarse(Duality):
    "The original's look-up: the nearest of 1000 points, and a forward difference"

    pt: torch.Tensor = None

    def nearest(self, gamma):
        i = ((len(self.pt) - 1) * (gamma + 5) / 4).clamp(0, len(self.pt) - 1).round().long()
        return (self.vocab_size * self.pt[i] - 1) / (self.vocab_size - 1)

    def both(self, t):
        gamma = self.gamma(t)
        alpha = self.nearest(gamma)
        slope = (self.nearest(gamma + 1e-3) - alpha) * 1000
        return alpha, slope * (self.gamma_max - self.gamma_min)


@dataclass(frozen=True)
class Recorded(DUO):
    "Latents made of recorded noise"

    noise: torch.Tensor = None

    def soften(self, x, t, tau, generator=None):
        levels = self.duality.alpha_tilde(t), self.duality.sigma_tilde(t)
        return dense_mixture(x, *levels, tau, self.duality.vocab_size, noise=self.noise)


def golden_curriculum():
    golden = case("duo_curriculum")
    c = golden.config
    cooling = Cooling(
        10 ** c["gumbel_tau_log10_start"], 10 ** c["gumbel_tau_log10_end"], c["curriculum_start"], c["curriculum_end"]
    )
    coarse = Coarse(c["vocab_size"], c["gamma_min"], c["gamma_max"], pt=golden["cache.pt"])
    objective = Recorded(Uniform(c["vocab_size"]), duality=coarse, tau=cooling, noise=golden["epsilon"])
    return golden, objective, from_golden(golden, golden["x0"].shape[1])


def test_golden_duo_curriculum_noise_levels():
    "The original's coarse table is ours at its points; between them only ours is exact"
    golden, objective, _ = golden_curriculum()
    t, coarse = golden["t"], objective.duality
    p, slope = win(torch.linspace(-5, -1, golden.config["integral_cache_points"]).double(), coarse.vocab_size)
    close(p, golden["cache.pt"], rtol=1e-6, atol=1e-8)
    close(slope, golden["cache.grad_pt"], rtol=1e-6, atol=1e-8)
    alpha, dalpha = coarse.both(t)
    golden.compare(alpha[:, None], "usdm_alpha_t")
    golden.compare(dalpha[:, None], "usdm_dalpha_t")
    golden.compare(-alpha.log()[:, None], "sigma")
    exact = Duality(coarse.vocab_size, coarse.gamma_min, coarse.gamma_max)
    close(exact.alpha(t.double()), golden["exact_alpha"], rtol=1e-6)
    close(exact.dalpha(t.double()), golden["exact_dalpha_dt"], rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("step", [0, 150, 200])
def test_golden_duo_curriculum(step):
    golden, objective, model = golden_curriculum()
    x, t, duality = golden["x0"], golden["t"], objective.duality
    training = objective.in_training(step)
    assert isinstance(training, Curriculum)
    assert 1 / training.tau == pytest.approx(golden.info["scalars"][f"inverse_tau.step{step}"])
    levels = duality.alpha_tilde(t)[:, None], duality.sigma_tilde(t)[:, None]
    w = latents(x, *levels, duality.vocab_size, noise=golden["epsilon"])
    golden.compare(w / training.tau, f"step{step}.relaxed_latent")
    mixture = dense_mixture(x, *levels, training.tau, duality.vocab_size, noise=golden["epsilon"])
    golden.compare(mixture.winner, "argmax_xt")
    close(mixture.weights, (w / training.tau).softmax(-1))
    logits = model(model.vocab_embed.mix(mixture.weights), golden["sigma"][:, 0].float())
    golden.compare(objective.log_x0(logits, x), f"step{step}.log_x_theta")
    golden.compare(training(model, x, t=t).per_token, f"step{step}.nll")


def small(V=20, **changes):
    torch.manual_seed(0)
    model = DiT(
        DiTConfig(vocab_size=V, hidden_size=16, n_blocks=1, n_heads=2, cond_dim=8, length=8, time_conditioning=True)
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
    return model, DUO(Uniform(V), **dict(duality=Duality(V, -3.0, -1.0), tau=Cooling(last=100)) | changes)


def test_the_curriculum_ends_after_its_last_step():
    _, objective = small()
    assert isinstance(objective.in_training(0), Curriculum) and isinstance(objective.in_training(100), Curriculum)
    assert objective.in_training(101) is objective
    assert [objective.tau(s) for s in (0, 99, 100)] == pytest.approx([1e-3, 1e-3, 1e-10])


@torch.no_grad()
def test_called_it_is_the_bound_of_uniform_diffusion():
    model, objective = small()
    ids = torch.randint(20, (4, 8), generator=generator())
    ours, plain = (o(model, ids, generator=generator(1)) for o in (objective, UDLM(Uniform(20))))
    assert torch.equal(ours.per_token, plain.per_token)


@torch.no_grad()
@pytest.mark.parametrize("top_k", [None, 2])
def test_hard_input_is_the_loss_of_the_winner_at_the_dual_noise_level(top_k):
    model, objective = small(top_k=top_k)
    ids, t = torch.randint(20, (4, 8), generator=generator()), torch.rand(4, generator=generator()).double()
    valid = torch.rand(4, 8, generator=generator()) < 0.7
    loss = Curriculum(objective, 1e-10)(model, ids, valid, generator=generator(1), t=t)
    z = objective.soften(ids, t[:, None].expand(4, 8), 1e-10, generator(1)).winner
    alpha, dalpha = objective.duality.both(t)
    logits = model(z, -alpha.log().float())
    want = uniform_nats(logits, ids, z, alpha[:, None].expand(4, 8), dalpha[:, None].expand(4, 8))
    torch.testing.assert_close(loss.per_token, want * valid, rtol=1e-4, atol=1e-5)
    assert torch.equal(loss.valid, valid) and (z != ids).any()


@pytest.mark.parametrize("top_k", [None, 1, 5])
def test_gradients_reach_the_embedding_through_the_mixture(top_k):
    model, objective = small(top_k=top_k)
    ids = torch.randint(20, (4, 8), generator=generator())
    Curriculum(objective, 0.3)(model, ids, generator=generator()).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


@torch.no_grad()
def test_dense_and_sparse_curriculum_have_the_same_loss_on_average():
    model, objective = small()
    ids, t = torch.randint(20, (2000, 8), generator=generator()), torch.linspace(0, 1, 2000).double()
    found = []
    for top_k in (None, 2):
        loss = Curriculum(replace(objective, top_k=top_k), 0.01)(model, ids, generator=generator(3), t=t)
        text = loss.per_token.mean(-1)
        found.append((text.mean().item(), text.std().item() / math.sqrt(len(text))))
    (a, da), (b, db) = found
    assert abs(a - b) < 4 * math.hypot(da, db)


def test_same_seed_same_loss():
    model, objective = small()
    ids = torch.randint(20, (4, 8), generator=generator())
    a, b, c = (objective.in_training(0)(model, ids, generator=generator(s)).mean().item() for s in (1, 1, 2))
    assert a == b != c


def test_written_down_and_built_again():
    for objective in (DUO.lm1b(100), DUO.openwebtext(100, top_k=None), small()[1]):
        assert build(describe(objective)) == objective
    assert build(describe(DUO(Uniform(50)))) == DUO(Uniform(50))
    schedule = Duality(50, -3.0, -1.0)
    assert build(describe(UDLM(Uniform(50), schedule))) == UDLM(Uniform(50), schedule)


def test_a_duality_is_a_schedule_of_the_bound():
    model, _ = small()
    ids = torch.randint(20, (4, 8), generator=generator())
    a, b = (
        UDLM(Uniform(20), s)(model, ids, generator=generator()).mean() for s in (Duality(20, -3.0, -1.0), LogLinear())
    )
    assert a.isfinite() and a != b


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DUO(Uniform(5), top_k=5), "top_k=5 of 4 other ids"),
        (lambda: DUO(Uniform(5), top_k=0), "top_k=0"),
        (lambda: DUO(Uniform(5), duality=Duality(6)), "6 ids and a corruption of 5"),
        (lambda: DUO(Uniform(5), steps=4), "D3PM"),
        (lambda: Cooling(start=0.0), "must be above zero"),
        (lambda: Cooling(end=-1.0), "must be above zero"),
        (lambda: Cooling(first=10, last=5), "steps must be in order"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)

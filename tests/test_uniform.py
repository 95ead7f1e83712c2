"Uniform diffusion: the recorded numbers of the originals, the definition, its limits, and enumeration"

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from golden import case
from torch.nn.functional import one_hot

from dlm.diffusion import cross_entropy
from dlm.diffusion.corruption import Absorbing, Uniform
from dlm.diffusion.objectives import diffusion_loss
from dlm.diffusion.schedules import CosineMD4, CosineSquared, Linear, LogLinear, Stratified
from dlm.diffusion.uniform import UDLM, uniform_nats, uniform_rows
from dlm.foundations.configuration import build, describe

SCHEDULES = [LogLinear(), CosineMD4(), CosineSquared(), Linear(1e-3, 5.0)]


def literal(x0_probs, x, z, alpha, dalpha):
    "The bound as it is defined (UDLM): the cost of a jump process with the guessed ratios"
    V = x0_probs.shape[-1]
    rho, guess = (V * alpha[..., None] * p + 1 - alpha[..., None] for p in (one_hot(x, V).double(), x0_probs))
    rho, guess = (r / r.gather(-1, z[..., None]) for r in (rho, guess))
    return -dalpha / (V * alpha) * (guess - rho + rho * (rho / guess).log()).sum(-1)


def cases(n, V, seed=0, scale=3.0):
    "Random logits, tokens and noise levels, a third of the tokens clean"
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, V, generator=g, dtype=torch.float64)
    x, z = torch.randint(V, (2, n), generator=g)
    z[::3] = x[::3]
    return logits, x, z, torch.rand(n, generator=g, dtype=torch.float64), -torch.rand(n, generator=g).double()


# The recorded numbers


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("schedule", ["log-linear", "cosine"])
def test_golden_duo_nelbo(schedule, precision):
    golden = case("duo_nelbo")
    alpha, dalpha = (golden[f"{schedule}.{name}_t.{precision}"] for name in ("alpha", "dalpha"))
    logits = golden["raw_logits"].to(alpha.dtype)
    shape = golden["x0"].shape
    nats = uniform_nats(logits, golden["x0"], golden["xt"], alpha.expand(shape), dalpha.expand(shape))
    assert nats.dtype == alpha.dtype
    golden.compare(nats, f"{schedule}.nll.{precision}")


class Fixed:
    "A network that answers what was recorded and remembers what noise it was told"

    def __init__(self, logits):
        self.logits = logits

    def hidden(self, ids, sigma=None, positions=None):
        self.sigma = sigma
        return self.logits[positions]

    def head(self, hidden):
        return hidden.clone()


@dataclass(frozen=True)
class Replayed(Uniform):
    "A corruption that returns recorded noisy ids"

    noisy: torch.Tensor = None

    def corrupt(self, x, alpha, generator=None):
        return self.noisy


def test_golden_duo_nelbo_from_ids_to_nats():
    golden = case("duo_nelbo")
    network = Fixed(golden["raw_logits"])
    objective = UDLM(Replayed(golden.config["vocab_size"], golden["xt"]))
    golden.compare(objective(network, golden["x0"], t=golden["t"]).per_token, "nll_full_path")
    golden.compare(network.sigma, "sigma_seen")


# Values worked out by hand, and identities


@pytest.mark.parametrize("z, value", [(2, 0.5814816299491316), (0, 2.034097914310132), (3, 3.796137286956814)], ids=str)
def test_known_values(z, value):
    logits, level = torch.tensor([0.1, 0.2, 0.3, 0.4]).double().log(), torch.tensor([0.6, -1.0]).double()
    nats = uniform_nats(logits, torch.tensor(2), torch.tensor(z), *level)
    assert nats.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("V", [2, 3, 50])
def test_is_the_definition_and_never_negative(V):
    logits, x, z, alpha, dalpha = cases(20_000, V)
    nats = uniform_nats(logits, x, z, alpha, dalpha)
    torch.testing.assert_close(nats, literal(logits.softmax(-1), x, z, alpha, dalpha), rtol=1e-9, atol=1e-10)
    assert (nats >= 0).all()


def test_nothing_is_lost_by_a_right_guess_that_is_certain():
    _, x, z, alpha, dalpha = cases(1000, 9)
    nats = uniform_nats(1e4 * one_hot(x, 9).double(), x, z, alpha, dalpha)
    torch.testing.assert_close(nats, torch.zeros_like(nats), rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_is_the_limit_of_many_steps(schedule):
    logits, x, z, t, _ = cases(500, 6)
    t = 0.05 + 0.9 * t
    nats, process = UDLM(Uniform(6), schedule).token_loss(logits, x, z, t), Uniform(6)

    def steps(T):
        "T times the divergence of the posteriors"
        alpha_s, alpha_t = schedule.alpha(t - 1 / T), schedule.alpha(t)
        q, p = (process.posterior(probs, z, alpha_s, alpha_t) for probs in (one_hot(x, 6).double(), logits.softmax(-1)))
        return T * (q * (q / p).log()).sum(-1)

    coarse, fine = (steps(T) - nats for T in (1e4, 2e4))
    torch.testing.assert_close(fine, torch.zeros_like(fine), rtol=0, atol=0.02 * nats.max().item())
    large = coarse.abs() > 1e-3
    torch.testing.assert_close((coarse / fine)[large], torch.full_like(fine[large], 2.0), rtol=0.1, atol=0)


# Precision


@pytest.mark.parametrize("t", [1e-7, 1e-3, 0.5, 1.0])
def test_single_precision_keeps_its_digits_over_a_large_vocabulary(t):
    g = torch.Generator().manual_seed(0)
    V, schedule = 50_000, LogLinear()
    x, logits = torch.randint(V, (6,), generator=g), 2 * torch.randn(6, V, generator=g)
    logits[torch.arange(6), x] += torch.linspace(0, 25, 6)
    objective, t = UDLM(Uniform(V), schedule), torch.full((6,), t, dtype=torch.float64)
    for z in (x, (x + 1) % V):
        exact = objective.token_loss(logits.double(), x, z, t)
        unit = exact.maximum(-schedule.dalpha(t) / schedule.noise(t))
        for nats in objective.token_loss(logits, x, z, t), objective.rows(torch.clone, logits, x, z, t):
            assert nats.dtype == torch.float32
            assert ((nats - exact) / unit).abs().max() < 3e-5


def test_ends_of_time_are_finite():
    logits, x, z, *_ = cases(30, 5)
    for alpha in (0.0, 1.0):
        alpha = torch.full((30,), alpha).double()
        same = x == z
        nats = uniform_nats(logits[same], x[same], z[same], alpha[same], -torch.ones(int(same.sum())).double())
        assert nats.isfinite().all() and (nats > -1e-6).all()


def test_half_precision_logits_are_widened():
    logits, x, z, alpha, dalpha = cases(30, 2000)
    half = logits.bfloat16()
    nats = uniform_nats(half, x, z, alpha, dalpha)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats.double(), uniform_nats(half.double(), x, z, alpha, dalpha), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(uniform_rows(torch.clone, half, x, z, alpha, dalpha), nats, rtol=1e-4, atol=1e-5)


# The lean form


def gradients(nats, hidden, head, weight):
    "Loss and gradients of a weighted sum"
    h = hidden.clone().requires_grad_()
    loss = nats(h)
    return [loss.detach(), *torch.autograd.grad((loss * weight).sum(), [h, head.weight, head.bias])]


@pytest.mark.parametrize("slices", [False, True])
def test_one_buffer_has_the_gradient_of_the_plain_form(monkeypatch, slices):
    torch.manual_seed(0)
    monkeypatch.setattr(cross_entropy, "FUSED_FROM", 100 if slices else 2**26)
    head, hidden, weight = torch.nn.Linear(8, 20).double(), torch.randn(30, 8).double(), torch.randn(30).double()
    _, *rest = cases(30, 20)
    plain = gradients(lambda h: uniform_nats(head(h), *rest), hidden, head, weight)
    for a, b in zip(plain, gradients(lambda h: uniform_rows(head, h, *rest), hidden, head, weight), strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_is_that_of_finite_differences():
    logits, *rest = cases(12, 5)
    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(uniform_rows(torch.clone, leaf, *rest).sum(), leaf)
    for j in range(5):
        step = 1e-6 * one_hot(torch.tensor(j), 5)
        up, down = (uniform_rows(torch.clone, logits + sign * step, *rest) for sign in (1, -1))
        torch.testing.assert_close(grad[:, j], (up - down) / 2e-6, rtol=1e-6, atol=1e-7)


def test_a_second_backward_pass_is_an_error_and_not_a_wrong_gradient():
    logits, *rest = cases(6, 5)
    nats = uniform_rows(torch.clone, logits.requires_grad_(), *rest).sum()
    nats.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        nats.backward()


def test_evaluation_leaves_the_logits_alone():
    logits, *rest = cases(6, 5)
    kept = logits.clone()
    uniform_rows(lambda h: h, logits, *rest)
    assert (logits == kept).all()


# The objective


def test_is_written_down_and_built_again():
    objective = UDLM(Uniform(7), CosineMD4(), Stratified(1e-4))
    assert build(describe(objective)) == objective


def test_refusals():
    with pytest.raises(ValueError, match="UDLM needs a Uniform corruption, got Absorbing"):
        UDLM(Absorbing(3, 4))
    with pytest.raises(ValueError, match="steps=100.*D3PM"):
        UDLM(Uniform(4), steps=100)


class Table:
    "A network whose logits are a function of the whole noisy text and the time"

    def __init__(self, guess, V):
        self.guess, self.V = guess, V

    def hidden(self, ids, sigma=None, positions=None):
        return self.guess(ids, torch.exp(-sigma.double()))[positions]

    def head(self, hidden):
        return hidden.clone()


V, L = 3, 2
WORDS = torch.tensor(list(itertools.product(range(V), repeat=L)))
DATA = torch.tensor([0.3, 0.02, 0.08, 0.05, 0.25, 0.02, 0.02, 0.06, 0.2]).double()


def marginal(alpha):
    "Chance of each noisy word given each clean one, [clean, noisy]"
    kept = torch.eye(V).double() * alpha + (1 - alpha) / V
    return torch.einsum("ab,cd->acbd", kept, kept).reshape(V**L, V**L)


def exact_guess(ids, alpha):
    "What each clean token is, given the other noisy tokens, by Bayes: these guesses give the true jump rates"
    kept = alpha[0] * torch.eye(V).double() + (1 - alpha[0]) / V
    first = DATA.view(V, V) @ kept
    second = DATA.view(V, V).T @ kept
    return torch.stack([first[:, ids[:, 1]].T, second[:, ids[:, 0]].T], 1).log()


def wrong_guess(ids, alpha):
    "Some fixed function of text and time"
    noise = torch.sin(3.0 * (ids[..., None] + 2 * ids.flip(-1)[..., None] + torch.arange(V))).double()
    return noise + alpha[:, None, None] * one_hot(ids, V)


def integral(guess, schedule, nodes=200):
    "The bound of each clean word: expectation over noisy words, integral over time by Gauss and Legendre"
    import numpy as np

    t, weight = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(nodes))
    # u^3 puts more nodes where a replaced token is nearly impossible
    t, weight = ((t + 1) / 2) ** 3, weight / 2 * 3 * ((t + 1) / 2) ** 2
    objective, total = UDLM(Uniform(V), schedule), torch.zeros(len(WORDS)).double()
    x, z = WORDS.repeat_interleave(len(WORDS), 0), WORDS.repeat(len(WORDS), 1)
    for time, w in zip(t, weight, strict=True):
        alpha = schedule.alpha(time)
        logits = guess(WORDS, alpha.expand(len(WORDS))).repeat(len(WORDS), 1, 1)
        nats = objective.token_loss(logits, x, z, time.expand(len(x))).sum(-1).view(len(WORDS), -1)
        total += w * (marginal(alpha.item()) * nats).sum(-1)
    return total


def generated(guess, schedule, steps):
    "Law of the words that the reverse process writes"
    objective, law = UDLM(Uniform(V), schedule), torch.ones(len(WORDS)).double() / len(WORDS)
    for i in range(steps, 0, -1):
        t, s = (torch.tensor((j / steps) ** 2).double() for j in (i, i - 1))
        logits = guess(WORDS, schedule.alpha(t).expand(len(WORDS)))
        one = objective.step_law(logits, WORDS, t, s)
        law = law @ (one[:, 0, :, None] * one[:, 1, None, :]).reshape(len(WORDS), -1)
    return law


def test_bound_is_the_entropy_for_the_exact_guess():
    "Averaged over the data, noise to the end: bound = H(data), and no guess does better"
    schedule = LogLinear(0.0)
    entropy = -(DATA * DATA.log()).sum().item()
    assert (DATA * integral(exact_guess, schedule)).sum().item() == pytest.approx(entropy, abs=1e-4)
    assert (DATA * integral(wrong_guess, schedule)).sum().item() > entropy + 0.1


def test_bound_with_its_prior_term():
    "Noise that stops short of the end: what is left of the text at t = 1 is paid by the prior term"
    schedule = LogLinear(0.2)
    left = marginal(schedule.alpha(torch.tensor(1.0)).item())
    prior = (left * (left * V**L).log()).sum(-1)
    seen = (DATA @ left * (DATA @ left * V**L).log()).sum()
    bound = (DATA * (prior + integral(exact_guess, schedule))).sum()
    entropy = -(DATA * DATA.log()).sum()
    assert bound.item() == pytest.approx((entropy + seen).item(), abs=1e-4) and seen > 1e-3


def test_bound_is_above_the_likelihood_of_the_words_that_are_written():
    schedule = LogLinear(0.0)
    bound, law = integral(wrong_guess, schedule), generated(wrong_guess, schedule, 2000)
    assert law.sum().item() == pytest.approx(1, abs=1e-9)
    gap = bound + law.log()
    assert (gap > -2e-3).all() and gap.max() > 0.01
    written = generated(exact_guess, schedule, 400)
    torch.testing.assert_close(written, DATA, atol=5e-3, rtol=0)


def test_loss_of_a_batch_estimates_the_integral():
    schedule, g = LogLinear(0.0), torch.Generator().manual_seed(0)
    x = WORDS[torch.multinomial(DATA, 4000, replacement=True, generator=g)]
    objective = UDLM(Uniform(V), schedule, Stratified(1e-4))
    loss = diffusion_loss(objective, Table(wrong_guess, V), x, generator=g)
    words = (x * torch.tensor([V, 1])).sum(-1)
    found, error = loss.per_token.sum(-1), integral(wrong_guess, schedule)[words]
    spread = (found - error).std().item() / math.sqrt(len(x))
    assert abs((found - error).mean().item()) < 4 * spread

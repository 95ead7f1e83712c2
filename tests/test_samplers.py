"The family of samplers: recorded steps of the originals, exact laws by enumeration, identities, given tokens."

import itertools
import math
import re

import pytest
import torch
from golden import case
from scipy.stats import chi2

from dlm.diffusion.corruption import Absorbing, Uniform
from dlm.diffusion.finite import D3PM
from dlm.diffusion.objectives import MDLM, reverse_law
from dlm.diffusion.schedules import Cosine, CosineBD3, Geometric, LogLinear
from dlm.diffusion.uniform import UDLM
from dlm.foundations.configuration import build, describe
from dlm.sampling.ancestral import Ancestral, Stepwise, grid, last
from dlm.sampling.canvas import blank, infill, prompted
from dlm.sampling.categorical import Categorical, Greedy, LegacyFloat32, nucleus
from dlm.sampling.orders import (
    AlongSchedule,
    Confidence,
    Entropy,
    Evenly,
    FirstHitting,
    Margin,
    RandomOrder,
    TopProbability,
    surest,
)
from dlm.sampling.psi import ByConfidence, Coins, Psi, Waits, doubt
from dlm.sampling.remasking import (
    AtAlpha,
    AtTime,
    Cap,
    Constant,
    FlowCorrector,
    ForwardBackward,
    Loop,
    Phases,
    Rescale,
    RescaleTwice,
    largest_sigma,
    looped,
    written_chance,
)
from dlm.sampling.scores import Analytic, Euler

# Steps as the originals took them


def draw(law, uniforms):
    "What the originals draw from a law with recorded uniforms"
    return LegacyFloat32().at(law, uniforms)


def uniform_case():
    golden = case("duo_samplers")
    objective = UDLM(Uniform(golden.config["vocab_size"]))
    z, t = golden["xt"], golden["t"].double()
    return golden, objective, objective.log_x0(golden["raw_logits"], z), z, t, t - golden.config["dt"]


@pytest.mark.parametrize("last_step", [False, True])
def test_golden_duo_samplers_ancestral(last_step):
    golden, objective, log_x0, z, t, s = uniform_case()
    golden.compare(log_x0.double().exp(), "p_x0")
    law = reverse_law(objective, log_x0, z, t, s * (not last_step))
    golden.compare(law, "ancestral_final.probs" if last_step else "ancestral.probs")
    if not last_step:
        golden.compare(draw(law, golden["ancestral.uniforms"]), "ancestral.sample")
    one_hot = torch.nn.functional.one_hot(golden["x0"], golden.config["vocab_size"]).double()
    alpha = objective.schedule.alpha
    golden.compare(objective.corruption.posterior(one_hot, z, alpha(s), alpha(t)), "posterior_onehot")


def test_golden_duo_samplers_ends():
    golden, objective, log_x0, z, t, _ = uniform_case()
    law = reverse_law(objective, log_x0, z, torch.full_like(t, 1e-5), 0 * t)
    golden.compare(law, "noise_removal_ancestral.probs")
    golden.compare(draw(law, golden["noise_removal_ancestral.uniforms"]), "noise_removal_ancestral.sample")
    greedy = reverse_law(objective, log_x0, z, torch.full_like(t, 1e-5), 0 * t, shape=Greedy().shape)
    golden.compare(greedy.argmax(-1), "noise_removal_greedy.sample")
    assert (greedy.amax(-1) > 1 - 1e-12).all()


def test_golden_duo_samplers_greedy_tail_of_a_walk():
    golden, objective, _, z, _, _ = uniform_case()

    class Recorded:
        head = staticmethod(lambda h: h)

        def hidden(self, ids, sigma=None, positions=None):
            return golden["raw_logits"][positions]

    now = torch.ones_like(z, dtype=torch.bool)
    ids, _ = Ancestral(4, final=Greedy()).leap(Recorded(), objective, z, now, torch.tensor(1e-5).double(), None, None)
    golden.compare(ids, "noise_removal_greedy.sample")


def test_golden_duo_samplers_nucleus():
    golden, objective, log_x0, z, t, s = uniform_case()
    for name in golden.names("nucleus"):
        top_p, kind = float(name.rsplit(".", 1)[0]), name.rsplit(".", 1)[1]
        choose = Categorical.keeping_crossing(top_p)
        made = dict(
            p_x0=lambda choose=choose: choose.shape(log_x0.double()).softmax(-1),
            probs=lambda choose=choose: reverse_law(objective, log_x0, z, t, s, shape=choose.shape),
        )
        golden.compare(made[kind](), f"nucleus{name}")
    assert golden.names("nucleus")


@pytest.mark.parametrize("name", ["duo_samplers", "duo_mdlm_samplers"])
def test_golden_duo_samplers_psi(name):
    golden = case(name)
    z, t = golden["xt"], golden["t"].double()
    if name == "duo_samplers":
        objective = UDLM(Uniform(golden.config["vocab_size"]))
    else:
        objective = MDLM(Absorbing(golden.config["mask_index"], golden.config["vocab_size_with_mask"]))
    log_x0 = objective.log_x0(golden["raw_logits"], z)
    names = golden.names("psi.kappa")
    for rest in names:
        law = reverse_law(objective, log_x0, z, t, t - golden.config["dt"], float(rest.removesuffix(".probs")))
        golden.compare(law, f"psi.kappa{rest}")
    assert len(names) >= 2


def test_golden_duo_mdlm_samplers_ancestral():
    golden = case("duo_mdlm_samplers")
    objective = MDLM(Absorbing(golden.config["mask_index"], golden.config["vocab_size_with_mask"]))
    z, t = golden["xt"], golden["t"].double()
    log_x0 = objective.log_x0(golden["raw_logits"], z)
    law = reverse_law(objective, log_x0, z, t, t - golden.config["dt"])
    golden.compare(law, "ancestral.probs")
    golden.compare(draw(law, golden["ancestral.uniforms"]), "ancestral.sample")


MODES = {
    "pure-posterior": lambda: Constant(1.0),
    "pure-pc": lambda: Constant(0.0),
    "constant": Constant,
    "max-capped": Cap,
    "max-rescale": RescaleTwice,
    "constant-remdm": Cap,
}


def test_golden_duo_samplers_kappas():
    golden = case("duo_samplers")
    names = golden.names("kappas.middle_")
    for name in names:
        mode, *value = [name] if name in MODES else name.rsplit("-", 1)
        phases = Phases(middle=MODES[mode](*map(float, value)))
        kappas = phases.kappas(grid(len(golden[f"kappas.middle_{name}"]) - 1), LogLinear())
        golden.compare(kappas.clamp(0, 1), f"kappas.middle_{name}")
    assert names


def test_golden_duo_samplers_time_profiles():
    golden = case("duo_samplers")
    names = golden.names("time_profile.")
    for name in names:
        profile, steps = name.split(".steps")
        _, _, value = profile.partition("linear-constant-linear-")
        still = None
        if value:
            still = AtAlpha(float(value.removesuffix("-inv"))) if value.endswith("-inv") else AtTime(float(value))
        # the original takes the time of an alpha on the schedule that reaches 0
        golden.compare(Phases(still=still).times(int(steps), 1e-5, LogLinear(0.0)), f"time_profile.{name}")
    assert names


REMDM = {
    "mdlm": lambda eta: Constant(1.0),
    "forward-backward": lambda eta: ForwardBackward(),
    "remdm-cap": Cap,
    "remdm-rescale": Rescale,
    "remdm-loop": Loop,
}


def remdm_law(x0, z, mask_id, written, sigma):
    "Law of a step with two chances, [B, L, V]; `sigma` is a number or [B, L]"
    one_hot = torch.nn.functional.one_hot(z, x0.shape[-1]).double()
    mask = torch.nn.functional.one_hot(torch.tensor(mask_id), x0.shape[-1]).double()
    sigma = torch.as_tensor(sigma).expand(z.shape)[..., None]
    back = (1 - sigma) * one_hot + sigma * mask
    return torch.where((z == mask_id)[..., None], written * x0 + (1 - written) * mask, back)


def remdm_case():
    golden = case("remdm_samplers")
    mask_id = golden.config["mask_index"]
    objective = MDLM(Absorbing(mask_id, golden.config["vocab_size_with_mask"]), LogLinear(0.0))
    return golden, objective, objective.log_x0(golden["raw_logits"], golden["xt"]), golden["xt"], mask_id


def told(golden, name, what):
    "A number that the case tells in the meaning of a tensor, as the original's float32"
    found = re.search(rf"\b{what}[= ]([0-9.]+[0-9])", golden.info["tensors"][name]["meaning"])
    return torch.tensor(float(found[1]), dtype=torch.float32).double().item()


def remdm_names(golden):
    "Sampler, eta, nucleus and time of each recorded step"
    for name in golden.names(""):
        if name.endswith(".probs") and not name.startswith("dfm"):
            stem, _ = name.split(".t")
            head, *rest = stem.split(".eta")
            eta, *top_p = rest[0].split(".nucleus") if rest else [0.0]
            time = told(golden, name, "t")
            yield name.removesuffix(".probs"), head, float(eta), float(top_p[0]) if top_p else 1.0, time


def test_golden_remdm_samplers_steps():
    golden, objective, log_x0, z, mask_id = remdm_case()
    dt, count = golden.config["dt"], 0
    for name, sampler, eta, top_p, t in remdm_names(golden):
        alpha_t, alpha_s = (torch.tensor([1 - u], dtype=torch.float64) for u in (t, t - dt))
        x0 = Categorical.dropping_crossing(top_p).shape(log_x0.double()).softmax(-1)
        if sampler == "remdm-conf":
            sigma = largest_sigma(alpha_t, alpha_s) * doubt(-golden["conf"].double(), z != mask_id)
            written = written_chance(alpha_t, alpha_s, torch.zeros(1))
        else:
            member, times = REMDM[sampler](eta), torch.tensor([t, t - dt], dtype=torch.float64)
            if sampler == "remdm-loop":
                alpha_t, alpha_s = looped(times, member.t_on, member.t_off, member.alpha_on).split(1)
                # a step of the original that leaves the grid stays in the loop
                alpha_s = alpha_t if t >= member.t_off and alpha_t == member.alpha_on else alpha_s
                times = torch.cat([1 - alpha_t, 1 - alpha_s])
            sigma = torch.zeros(1) if sampler == "mdlm" else member.sigma(times, alpha_t, alpha_s)
            if sampler == "remdm-cap":
                sigma = torch.minimum(sigma, largest_sigma(alpha_t, alpha_s))
            sigma = sigma.clamp_max(1)
            written = written_chance(alpha_t, alpha_s, sigma)
        law = remdm_law(x0, z, mask_id, written, sigma)
        golden.compare(law, f"{name}.probs")
        drawn = draw(law, golden[f"{name}.uniforms"])
        golden.compare(drawn, f"{name}.sample")
        count += 1
        if sampler == "remdm-conf":
            golden.compare(sure_after(golden, x0, z, drawn, mask_id), f"{name}.conf_after")
    assert count >= 30


def sure_after(golden, x0, z, drawn, mask_id):
    "The memory of `Coins` after a step, as the original keeps it: minus the probability, minus infinity at masks"
    everywhere = torch.ones_like(z, dtype=torch.bool)
    coins = Coins(torch.zeros(1), torch.zeros(1), everywhere)
    coins.told(z != mask_id, -golden["conf"][z != mask_id])
    asked = (z == mask_id) & (drawn != mask_id)
    coins.told(asked, x0.gather(-1, drawn[..., None])[..., 0][asked])
    return (-coins.sure).masked_fill(drawn == mask_id, -math.inf)


def test_golden_remdm_samplers_flow_corrector():
    golden, objective, log_x0, z, mask_id = remdm_case()
    names = [n.removesuffix(".probs") for n in golden.names("") if n.startswith("dfm.")]
    for name in names:
        top_p, steps = (told(golden, f"{name}.probs", what) for what in ("nucleus", "steps"))
        x0 = Categorical.dropping_crossing(top_p).shape(log_x0.double()).softmax(-1)
        t = torch.tensor([float(name.removeprefix("dfm.t"))], dtype=torch.float64)
        s = FlowCorrector().after(t, 1 / steps)
        assert s.item() == pytest.approx(golden.info["scalars"][f"{name}.next_t"], rel=1e-5)
        sigma = FlowCorrector().sigma(torch.cat([t, s]), 1 - t, 1 - s)
        law = remdm_law(x0, z, mask_id, written_chance(1 - t, 1 - s, sigma), sigma)
        golden.compare(law, f"{name}.probs")
    assert len(names) >= 3


def test_golden_bd3lm_sampler_nucleus():
    golden = case("bd3lm_sampler")
    block, mask_id = golden.config["block_size"], golden.config["mask_index"]
    objective = MDLM(Absorbing(mask_id, golden.config["vocab_size_with_mask"]), LogLinear(0.0))
    z, logits = golden["xt"][:, -block:], golden["raw_logits"][:, -block:]
    names = [n.removesuffix(".probs") for n in golden.names("nucleus") if n.endswith(".probs")]
    for name in names:
        top_p, t = map(float, name.split(".t"))
        choose = Categorical.dropping_crossing(top_p)
        time = torch.tensor(t, dtype=torch.float64)
        s = time - told(golden, f"nucleus{name}.probs", "dt")
        law = reverse_law(objective, objective.log_x0(logits, z), z, time, s, shape=choose.shape)
        golden.compare(law, f"nucleus{name}.probs")
        drawn = torch.where(z == mask_id, draw(law, golden[f"nucleus{name}.uniforms"]), z)
        golden.compare(torch.cat([golden["xt"][:, :-block], drawn], 1), f"nucleus{name}.x_next")
    assert names


# Laws of whole walks, against the product of all transition matrices


class Guess:
    "A guess at each position that depends on the other positions and, if asked, on the noise level"

    def __init__(self, vocab_size, length, seed=0, timed=False):
        g = torch.Generator().manual_seed(seed)
        self.vocab_size, self.timed, self.told, self.asked = vocab_size, timed, [], []
        self.table = torch.randn(*[vocab_size] * length, length, vocab_size, generator=g)
        self.head = lambda h: h

    def hidden(self, ids, sigma=None, positions=None):
        self.told.append(sigma)
        self.asked.append((len(ids), 0 if positions is None else int(positions.sum())))
        logits = self.table[tuple(ids.T)]
        logits = logits * (1 + sigma[:, None, None]) if self.timed else logits
        return logits if positions is None else logits[positions]


def all_texts(vocab_size, length):
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))


def joint(rows, z):
    "Transition matrix between all texts from the laws of their positions, [S, L, V]"
    return torch.stack([rows[:, place][:, z[:, place]] for place in range(z.shape[1])]).prod(0)


def start_law(objective, z, canvas):
    "Law of the first state: the prior where the canvas is blank"
    prior = objective.corruption.prior_probs(torch.zeros(1, dtype=torch.float64))
    ids, editable = canvas.ids[0], canvas.editable[0]
    return torch.where(editable, prior[z], (z == ids).double()).prod(1)


def exact_law(guess, objective, canvas, times, kappas=None, choose=None, final=None):
    "Law over all texts after a walk over `times` and the last denoising, for any corruption"
    z = all_texts(guess.vocab_size, canvas.ids.shape[1])
    law, editable = start_law(objective, z, canvas), canvas.editable[0]
    kappas = [1.0] * len(times) if kappas is None else kappas.tolist()
    for i, (t, s) in enumerate(itertools.pairwise([*times, 0 * times[0]])):
        last_one = i == len(times) - 1
        shape = final if last_one else choose
        sigma = objective.schedule.sigma(t).float().expand(len(z))
        rows = objective.step_law(guess.hidden(z, sigma), z, t, s, 1.0 if last_one else kappas[i], shape)
        fixed = torch.nn.functional.one_hot(z, guess.vocab_size).double()
        law = law @ joint(torch.where(editable[:, None], rows, fixed), z)
    assert law.sum().item() == pytest.approx(1)
    return law


def counts(ids, vocab_size):
    places = vocab_size ** torch.arange(ids.shape[1] - 1, -1, -1)
    return (ids * places).sum(1).bincount(minlength=vocab_size ** ids.shape[1])


def passes(seen, law):
    "Whether counts come from a law, by a chi-squared test that an exact sampler passes 9,999 times in 10,000"
    possible, n = law > 1e-9, seen.sum()
    assert seen[~possible].sum() == 0, "an impossible outcome was drawn"
    want = n * law[possible] / law.sum()
    if len(want) == 1:
        return True
    return (((seen[possible] - want) ** 2 / want).sum() < chi2.ppf(0.9999, int(possible.sum()) - 1)).item()


DRAWS = 30_000
MASKED, UNIFORM = Absorbing(2, 3), Uniform(3)
REMASKINGS = [
    Constant(0.0),
    Constant(0.6),
    Cap(0.3),
    Rescale(0.5),
    RescaleTwice(0.5),
    ForwardBackward(),
    Loop(eta=0.4, alpha_on=0.6),
    FlowCorrector(2.0),
    Phases(Constant(0.3), Cap(0.4), Constant(1.0), still=AtTime(0.4)),
]


def law_of(sampler, objective, canvas, guess):
    times = sampler.kappa.times(sampler.steps, sampler.eps, objective.schedule)
    low = -math.inf if objective.positions_first else 0.0
    return exact_law(guess, objective, canvas, times, sampler.kappa.kappas(times, objective.schedule).clamp_min(low))


@pytest.mark.parametrize("kappa", REMASKINGS, ids=str)
@pytest.mark.parametrize("corruption", [MASKED, UNIFORM], ids=lambda c: type(c).__name__)
def test_law_of_psi(kappa, corruption):
    objective = (MDLM if corruption is MASKED else UDLM)(corruption)
    guess, sampler = Guess(3, 2, seed=3, timed=True), Psi(4, kappa=kappa)
    canvas = blank(DRAWS if corruption is MASKED else DRAWS // 2, 2)
    ids = last(sampler.states(guess, objective, canvas, torch.Generator().manual_seed(1))).ids
    law = law_of(sampler, objective, canvas, guess)
    assert passes(counts(ids, 3), law)
    if kappa.kappas(torch.tensor([0.6, 0.4]).double(), objective.schedule)[0] < 0.9:
        ancestral = exact_law(guess, objective, canvas, grid(4))
        assert not passes(counts(ids, 3), ancestral) or (law - ancestral).abs().max() < 0.01


def test_law_of_psi_where_the_guess_may_be_the_mask():
    objective = D3PM(MASKED, steps=10)
    guess, sampler = Guess(3, 2, seed=4, timed=True), Psi(3, kappa=Constant(0.4))
    canvas = blank(DRAWS, 2)
    ids = last(sampler.states(guess, objective, canvas, torch.Generator().manual_seed(1))).ids
    assert passes(counts(ids, 3), law_of(sampler, objective, canvas, guess))


@pytest.mark.parametrize("corruption", [MASKED, UNIFORM], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("choose", [Categorical(0.5, 0.8), Greedy()], ids=str)
def test_law_of_psi_with_a_sharper_choice_and_given_tokens(corruption, choose):
    objective = (MDLM if corruption is MASKED else UDLM)(corruption)
    guess, sampler = Guess(3, 3, seed=5), Psi(3, choose, Greedy(), kappa=Cap(0.5))
    canvas = prompted([[1]] * (DRAWS // 2), 3)
    ids = last(sampler.states(guess, objective, canvas, torch.Generator().manual_seed(2))).ids
    times = grid(3)
    kappas = sampler.kappa.kappas(times, objective.schedule).clamp_min(-math.inf if corruption is MASKED else 0.0)
    law = exact_law(guess, objective, canvas, times, kappas, choose.shape, Greedy().shape)
    assert (ids[:, 0] == 1).all() and passes(counts(ids, 3), law)


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()], ids=str)
@pytest.mark.parametrize("corruption", [MASKED, UNIFORM], ids=lambda c: type(c).__name__)
def test_psi_without_taking_back_is_ancestral(corruption, schedule):
    objective = (MDLM if corruption is MASKED else UDLM)(corruption, schedule)
    guess, canvas = Guess(3, 2, seed=6, timed=True), blank(DRAWS // 2, 2)
    law = exact_law(guess, objective, canvas, grid(3))
    for sampler in (Ancestral(3), Psi(3), Stepwise(3)):
        assert passes(
            counts(last(sampler.states(guess, objective, canvas, torch.Generator().manual_seed(3))).ids, 3), law
        )
    if corruption is UNIFORM:
        same = [
            last(s(3).states(guess, objective, canvas, torch.Generator().manual_seed(3))).ids for s in (Ancestral, Psi)
        ]
        assert torch.equal(*same)


# Remasking


def test_numbers_of_the_specification():
    alpha_t, alpha_s = torch.tensor([0.4], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    schedule, times = LogLinear(0.0), torch.tensor([0.6, 0.5], dtype=torch.float64)
    sigma = Cap(0.05).sigma(times, alpha_t, alpha_s)
    assert written_chance(alpha_t, alpha_s, sigma).item() == pytest.approx(0.2)
    assert Cap(0.05).kappas(times, schedule).tolist() == pytest.approx([0.9, 1.0])


@pytest.mark.parametrize("member", [Cap(0.05), Cap(0.9), Rescale(0.3), ForwardBackward(), FlowCorrector()], ids=str)
def test_remasking_is_psi_with_its_kappa(member):
    mdlm, times = MDLM(MASKED, LogLinear(0.0)), grid(12)
    log_x0 = torch.tensor([[0.3, 0.7, 0.0], [0.0, 1.0, 0.0]]).double().log()
    z = torch.tensor([2, 1])
    for i, kappa in enumerate(member.kappas(times, mdlm.schedule)[:-1].tolist()):
        alpha_t, alpha_s = mdlm.schedule.alpha(times[i : i + 2]).split(1)
        sigma = member.sigma(times[i : i + 2], alpha_t, alpha_s).minimum(largest_sigma(alpha_t, alpha_s))
        law = reverse_law(mdlm, log_x0, z, times[i], times[i + 1], kappa)
        want = remdm_law(log_x0.exp()[None], z[None], 2, written_chance(alpha_t, alpha_s, sigma), sigma)[0]
        torch.testing.assert_close(law, want, rtol=1e-9, atol=1e-12)
        assert law.min() >= -1e-12


@pytest.mark.parametrize("member", REMASKINGS, ids=str)
@pytest.mark.parametrize("schedule", [LogLinear(), LogLinear(0.0), Cosine()], ids=str)
def test_marginals_are_kept(member, schedule):
    "Forwards to t, one step back to s by the true guess: the law of forwards to s"
    times = member.times(6, 1e-5, schedule)
    assert times[0] == 1 and (times.diff() <= 0).all() and schedule.noise(times[-1]) < 1e-4
    for objective in (MDLM(MASKED, schedule), UDLM(UNIFORM, schedule)):
        kappas = member.kappas(times, schedule).clamp_min(0 if objective.corruption is UNIFORM else -math.inf)
        truth = torch.tensor([[0.0, 1.0, 0.0]]).double()
        for i in range(len(times) - 1):
            alpha_t, alpha_s = schedule.alpha(times[i]), schedule.alpha(times[i + 1])
            z, prior = torch.arange(3), objective.corruption.prior_probs(truth)
            noisy = alpha_t * truth[0] + (1 - alpha_t) * prior
            law = reverse_law(objective, truth.log().expand(3, 3), z, times[i], times[i + 1], kappas[i].item())
            want = alpha_s * truth[0] + (1 - alpha_s) * prior
            torch.testing.assert_close(noisy @ law, want, rtol=0, atol=1e-9)


def test_waits_have_the_law_of_coins():
    "Flips drawn by waiting against one coin for each position at each step, chances of 0 and 1 among them"
    written = torch.tensor([0.0, 0.3, 1.0, 0.5, 0.2, 0.9], dtype=torch.float64)
    sigma = torch.tensor([1.0, 0.5, 0.2, 0.0, 1.0, 0.1], dtype=torch.float64)
    waits = Waits(written, sigma, torch.ones(1, DRAWS, dtype=torch.bool), torch.Generator().manual_seed(0))
    masked, codes = torch.ones(1, DRAWS, dtype=torch.bool), torch.zeros(1, DRAWS, dtype=torch.long)
    while (found := waits.next(masked))[0] < len(written):
        step, now = found
        masked, codes = masked ^ now, codes + now * 2**step
    law = torch.zeros(64, dtype=torch.float64)
    for flipped in itertools.product([False, True], repeat=6):
        hidden, chance = True, 1.0
        for step, f in enumerate(flipped):
            p = (written if hidden else sigma)[step].item()
            chance *= p if f else 1 - p
            hidden ^= f
        law[sum(f << i for i, f in enumerate(flipped))] += chance
    assert passes(codes[0].bincount(minlength=64), law)


def test_remasking_by_confidence_takes_what_was_unsure():
    written, sigma = torch.tensor([0.0, 0.4]), torch.tensor([0.0, 0.8])
    editable = torch.tensor([[True, True, True, False, True]]).expand(DRAWS, 5)
    masked = torch.tensor([[False, False, False, False, True]]).expand(DRAWS, 5)
    coins = Coins(written, sigma, editable, torch.Generator().manual_seed(0))
    coins.told(editable & ~masked, torch.tensor([0.9, 0.1, 0.5]).repeat(DRAWS))
    step, now = coins.next(masked)
    chances = torch.tensor([*(0.8 * torch.tensor([-0.9, -0.1, -0.5]).softmax(0)), 0.0, 0.4]).double()
    seen = now.double().mean(0)
    assert step == 1 and ((seen - chances).abs() < 4 * (chances * (1 - chances) / DRAWS).sqrt() + 1e-9).all()
    assert chances[1] > chances[2] > chances[0]


def test_remasking_by_confidence_in_a_walk():
    "With a guess that is everywhere the same the doubt is shared evenly: a walk whose law is known"

    class Fixed(Guess):
        def hidden(self, ids, sigma=None, positions=None):
            return torch.zeros(int(positions.sum()), 3)

    sampler, objective = Psi(5, kappa=ByConfidence()), MDLM(MASKED)
    states = list(sampler.states(Fixed(3, 4), objective, blank(DRAWS, 4), torch.Generator().manual_seed(0)))
    assert passes(counts(states[-1].ids, 3), (all_texts(3, 4) < 2).all(1).double())
    back = sum(int((b.ids[a.changed] != 2).sum()) for b, a in itertools.pairwise(states))
    assert back > DRAWS  # tokens were taken back, more than one in a text
    with pytest.raises(ValueError, match="takes back masks one by one"):
        sampler.states(Fixed(3, 4), UDLM(UNIFORM), blank(1, 4))


# Orders


def ordered_law(guess, length, order_chance):
    "Law of writing one token at a time, `order_chance` giving the chance of each position next"
    vocab_size = guess.vocab_size
    law = torch.zeros(vocab_size**length, dtype=torch.float64)

    def go(z, chance):
        left = [i for i in range(length) if z[i] == 2]
        if not left:
            law[sum(a * vocab_size ** (length - 1 - i) for i, a in enumerate(z))] += chance
            return
        probs = guess.table[tuple(z)].clone()
        probs[:, 2] = -math.inf
        probs = probs.double().softmax(-1)
        for (place, token), share in order_chance(probs, left).items():
            go([token if i == place else a for i, a in enumerate(z)], chance * share)

    go([2] * length, 1.0)
    return law


def any_order(probs, left):
    return {(i, a): probs[i, a].item() / len(left) for i in left for a in range(2)}


def surest_order(probs, left):
    "All left are drawn, the one with the most probable draw is kept"
    found = {}
    for tokens in itertools.product(range(2), repeat=len(left)):
        drawn = dict(zip(left, tokens, strict=True))
        best = max(left, key=lambda i: probs[i, drawn[i]].item())
        chance = math.prod(probs[i, a].item() for i, a in drawn.items())
        found[best, drawn[best]] = found.get((best, drawn[best]), 0.0) + chance
    return found


@pytest.mark.parametrize(
    "sampler, order",
    [
        (FirstHitting(), any_order),
        (Confidence(3, score=RandomOrder()), any_order),
        (Confidence(3), surest_order),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_law_of_one_token_at_a_time(sampler, order):
    guess = Guess(3, 3, seed=8)
    ids = last(sampler.states(guess, MDLM(MASKED), blank(DRAWS, 3), torch.Generator().manual_seed(4))).ids
    law = ordered_law(guess, 3, order)
    assert law.sum().item() == pytest.approx(1) and passes(counts(ids, 3), law)
    other = ordered_law(guess, 3, surest_order if order is any_order else any_order)
    assert not passes(counts(ids, 3), other)


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine(), CosineBD3(), Geometric(1e-3, 8.0)], ids=str)
def test_first_hitting_is_ancestral_sampling_in_infinitely_many_steps(schedule):
    guess, objective, canvas = Guess(3, 2, seed=9, timed=True), MDLM(MASKED, schedule), blank(DRAWS, 2)
    ids = last(FirstHitting().states(guess, objective, canvas, torch.Generator().manual_seed(5))).ids
    assert passes(counts(ids, 3), exact_law(guess, objective, canvas, grid(600)))
    assert all(sigma.shape == (len(canvas),) for sigma in guess.told[:2])
    assert len(guess.told[0].unique()) > DRAWS / 2  # each text has its own clock


@pytest.mark.parametrize("sampler", [FirstHitting(), Ancestral(7), Ancestral(1000), Psi(1000)], ids=str)
def test_no_more_evaluations_than_tokens(sampler):
    guess, canvas = Guess(3, 4), infill(torch.tensor([[2, 0, 2, 2], [2, 2, 2, 2], [0, 1, 0, 2], [1, 1, 0, 0]]), hole=2)
    state = last(sampler.states(guess, MDLM(MASKED), canvas, torch.Generator().manual_seed(0)))
    tokens = canvas.editable.sum(1)
    assert (state.nfe <= tokens).all() and state.nfe[-1] == 0
    if isinstance(sampler, FirstHitting):
        assert torch.equal(state.nfe, tokens)
    assert sum(n for _, n in guess.asked) == tokens.sum() and sum(b for b, _ in guess.asked) == state.nfe.sum()


def test_network_is_asked_only_about_what_is_written():
    guess, sampler = Guess(3, 4), Psi(40, kappa=Cap(0.2))
    states = list(sampler.states(guess, MDLM(MASKED), blank(6, 4), torch.Generator().manual_seed(0)))
    pairs = list(itertools.pairwise(states))
    written = sum(int(((b.ids == 2) & (a.ids != 2)).sum()) for b, a in pairs)
    back = sum(int(((b.ids != 2) & (a.ids == 2)).sum()) for b, a in pairs)
    assert sum(n for _, n in guess.asked) == written == back + 24 and back > 10
    assert sum(b for b, _ in guess.asked) == states[-1].nfe.sum()


def test_scores():
    log_probs = torch.tensor([[0.5, 0.4, 0.1], [0.45, 0.275, 0.275]]).log()
    drawn = torch.tensor([1, 0])
    assert TopProbability()(log_probs, drawn).tolist() == pytest.approx([0.4, 0.45])
    assert TopProbability(Categorical(0.5))(log_probs, drawn)[0].item() == pytest.approx(0.16 / 0.42)
    assert Margin()(log_probs, drawn).tolist() == pytest.approx([0.1, 0.175])
    entropy = [sum(p * math.log(p) for p in row) for row in log_probs.exp().tolist()]
    assert Entropy()(log_probs, drawn).tolist() == pytest.approx(entropy, rel=1e-5)
    sure = torch.tensor([[0.1, 0.9, -math.inf, 0.5], [0.3, 0.3, 0.1, 0.2]])
    assert surest(sure, torch.tensor([2, 1])).tolist() == [[False, True, False, True], [True, False, False, False]]


@pytest.mark.parametrize("tokens, steps", [(10, 4), (3, 5), (8, 8), (7, 1)])
def test_quotas_as_published(tokens, steps):
    "LLaDA: the remainder goes to the first steps; Dream: int(masked * (1 - s/t)), all in the last step"
    base, rest = divmod(tokens, steps)
    times = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64).tolist()
    even = dream = tokens
    for i in range(steps):
        found = Evenly()(torch.tensor([even]), steps - i, LogLinear(0.0), steps).item()
        assert found == base + (i < rest)
        even -= found
        found = AlongSchedule()(torch.tensor([dream]), steps - i, LogLinear(0.0), steps).item()
        assert found == (dream if i == steps - 1 else int(dream * (1 - times[i + 1] / times[i])))
        dream -= found
    assert even == dream == 0


@pytest.mark.parametrize("score", [TopProbability(), Margin(), Entropy(), RandomOrder()], ids=str)
@pytest.mark.parametrize("quota", [Evenly(), AlongSchedule()], ids=str)
def test_confidence_writes_everything_in_its_steps(score, quota):
    canvas = infill(torch.tensor([[2, 0, 2, 2], [2, 2, 2, 2], [1, 1, 0, 0]]), hole=2)
    sampler = Confidence(3, score=score, quota=quota)
    states = list(sampler.states(Guess(3, 4), MDLM(MASKED), canvas, torch.Generator().manual_seed(0)))
    assert (states[-1].ids < 2).all() and (states[-1].nfe <= 3).all() and states[-1].nfe[2] == 0
    assert states[-1].time == 0
    for before, after in itertools.pairwise(states):
        assert torch.equal(before.ids == 2, (after.ids == 2) | after.changed)


# What holds for all


FAMILY = [
    Ancestral(5),
    Ancestral(5, Categorical(0.7, 0.8), Greedy()),
    Stepwise(5),
    Analytic(5),
    Euler(5),
    *[Psi(5, kappa=kappa) for kappa in (*REMASKINGS, Constant(1.0))],
    Psi(5, kappa=ByConfidence()),
    FirstHitting(),
    Confidence(3),
    Confidence(3, Greedy(), Entropy(Categorical(0.5)), AlongSchedule()),
]
MASKS_ONLY = (FirstHitting, Confidence)


def members():
    for sampler in FAMILY:
        yield sampler, MDLM(MASKED)
        masks_only = isinstance(sampler, MASKS_ONLY) or isinstance(getattr(sampler, "kappa", None), ByConfidence)
        if not masks_only:
            yield sampler, UDLM(UNIFORM)


@pytest.mark.parametrize("sampler, objective", list(members()), ids=lambda x: f"{type(x).__name__}")
def test_given_tokens_stay_and_seeds_repeat(sampler, objective):
    guess, g = Guess(3, 5, seed=1), torch.Generator
    texts = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0], [2, 2, 2, 2, 2]]) % (2 if objective.positions_first else 3)
    editable = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool().repeat(8, 1)
    canvas = infill(torch.where(editable, 9, texts.repeat(8, 1)), hole=9)
    found = [list(sampler.states(guess, objective, canvas, g().manual_seed(s))) for s in (1, 1, 2)]
    for states in found:
        assert all(torch.equal(state.ids[~editable], canvas.ids[~editable]) for state in states)
        assert not any((state.changed & ~editable).any() for state in states)
        for before, after in itertools.pairwise(states):
            assert after.changed.any() or after.time == 0
            assert torch.equal(before.ids[~after.changed], after.ids[~after.changed])
            assert before.time >= after.time and (after.nfe >= before.nfe).all()
        assert states[-1].time == 0 or not isinstance(sampler, MASKS_ONLY)
        assert (states[-1].ids < (2 if objective.positions_first else 3)).all() and states[-1].nfe[2] == 0
    first, again, other = (states[-1].ids for states in found)
    assert torch.equal(first, again)
    if sampler.choose == Categorical():
        assert not torch.equal(first, other)


@pytest.mark.parametrize("sampler", FAMILY, ids=str)
def test_samplers_can_be_written_down(sampler):
    assert build(describe(sampler)) == sampler


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Constant(1.5), "kappa 1.5 must lie between 0 and 1"),
        (lambda: Cap(-0.1), "eta -0.1 must lie"),
        (lambda: Loop(t_on=0.05, t_off=0.5), "must go down"),
        (lambda: Phases(high_share=0.7, middle_share=0.6), "middle_share 0.6 must lie"),
        (lambda: AtTime(2.0), "AtTime 2.0 must lie"),
        (lambda: Confidence(0), "at least one"),
        (lambda: FirstHitting().states(None, UDLM(UNIFORM), blank(1, 2)), "UDLM on Uniform moves all at once"),
        (lambda: Confidence().states(None, UDLM(UNIFORM), blank(1, 2)), "Confidence writes masked tokens one by one"),
        (lambda: Psi(0).states(None, UDLM(UNIFORM), blank(1, 2)), "at least one"),
        (lambda: Psi(kappa=ByConfidence()).states(None, UDLM(UNIFORM), blank(1, 2)), "use Cap"),
    ],
)
def test_bad_input_is_answered_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_nucleus_conventions_differ_by_the_crossing_token():
    log_probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept = [make(0.8).shape(log_probs) for make in (Categorical.keeping_crossing, Categorical.dropping_crossing)]
    assert [(row > -math.inf)[0].tolist() for row in kept] == [[False, True, True, True], [False, True, False, True]]
    assert torch.equal(kept[0], nucleus(log_probs, 0.8)) and torch.equal(kept[1], nucleus(log_probs, 0.8, False))
    assert Categorical.dropping_crossing(0.1).shape(log_probs).argmax().item() == 1


def test_greedy_guess_moves_a_walk_over_all_positions():
    "The guess is sharpened, the step is drawn: a greedy walk has the law of its transition matrices"
    guess, objective, canvas = Guess(3, 2, seed=2), UDLM(UNIFORM), blank(DRAWS, 2)
    ids = last(Ancestral(3, Greedy(), Greedy()).states(guess, objective, canvas, torch.Generator().manual_seed(0))).ids
    law = exact_law(guess, objective, canvas, grid(3), choose=Greedy().shape, final=Greedy().shape)
    assert passes(counts(ids, 3), law)


@pytest.mark.parametrize("sampler", [Ancestral(6), Psi(6), Psi(6, kappa=Constant(0.5)), Stepwise(6)], ids=str)
def test_every_evaluation_is_counted(sampler):
    guess, canvas = Guess(3, 3, seed=1), blank(5, 3)
    state = last(sampler.states(guess, UDLM(UNIFORM), canvas, torch.Generator().manual_seed(0)))
    assert state.nfe.tolist() == [7] * 5 and sum(rows for rows, _ in guess.asked) == 35

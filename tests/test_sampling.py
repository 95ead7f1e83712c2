"Samplers: recorded steps of the originals, exact laws by enumeration, and what they cost."

import itertools

import pytest
import torch
from golden import case
from scipy.stats import chi2

from dlm.diffusion.corruption import Absorbing
from dlm.diffusion.objectives import AR, MDLM
from dlm.diffusion.schedules import Cosine, LogLinear
from dlm.models.dit import DiT, DiTConfig
from dlm.sampling.ancestral import Ancestral, grid, last
from dlm.sampling.autoregressive import Autoregressive
from dlm.sampling.canvas import Canvas, blank, infill, prompted
from dlm.sampling.categorical import Categorical, Greedy, LegacyFloat32, invert_cdf
from dlm.sampling.watching import record


def passes(seen, law):
    "Whether counts come from a law, by a chi-squared test that an exact sampler passes 9,999 times in 10,000"
    law, n = law.double(), seen.sum()
    possible = law > 1e-12
    assert seen[~possible].sum() == 0, "an impossible outcome was drawn"
    want = n * law[possible] / law.sum()
    statistic = ((seen[possible] - want) ** 2 / want).sum().item()
    return statistic < chi2.ppf(0.9999, int(possible.sum()) - 1)


# Steps as the original took them


@pytest.mark.parametrize("name, schedule", [("ddpm", LogLinear()), ("ddpm_cache", LogLinear(0.0))])
def test_golden_mdlm_samplers_steps(name, schedule):
    golden = case("mdlm_samplers")
    absorbing = Absorbing(golden.config["mask_index"], golden.config["vocab_size_with_mask"])
    objective, z, t = MDLM(absorbing, schedule), golden["xt"], golden["t"]
    x0 = objective.log_x0(golden["raw_logits"], z).exp()
    if name == "ddpm_cache":
        golden.compare(x0, "ddpm_cache.p_x0")
    alpha_s, alpha_t = schedule.alpha(t - golden.config["dt"]), schedule.alpha(t)
    masked = (z == absorbing.mask_id)[..., None]
    step = absorbing.posterior(x0, z, alpha_s, alpha_t)
    golden.compare(step, f"{name}.probs", None if name == "ddpm" else masked)
    golden.compare(step * (1 - alpha_t)[..., None], f"{name}.unnormalised", masked)
    drawn = LegacyFloat32().at(step * (1 - alpha_t)[..., None], golden[f"{name}.uniforms"])
    golden.compare(torch.where(masked[..., 0], drawn, z), f"{name}.sample")


def test_golden_mdlm_samplers_greedy_end():
    golden = case("mdlm_samplers")
    objective = MDLM(Absorbing(golden.config["mask_index"], golden.config["vocab_size_with_mask"]))
    golden.compare(Greedy()(objective.log_x0(golden["raw_logits"], golden["xt"])), "denoise_greedy.sample")


def test_golden_mdlm_samplers_times():
    golden = case("mdlm_samplers")
    steps = len(golden["sample_loop.timesteps"]) - 1
    golden.compare(grid(steps).float(), "sample_loop.timesteps")


# Draws


def test_categorical_law_at_a_large_vocabulary():
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    ids = Categorical()(logits.log_softmax(-1).expand(2, -1), torch.Generator().manual_seed(0))
    assert ids.shape == (2,)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    ids = torch.cat([invert_cdf(logits.expand(200, -1), part) for part in u.split(200)])
    top = logits[0].softmax(-1).topk(20)
    counts = ids.bincount(minlength=50_000)[top.indices] / 4000
    torch.testing.assert_close(counts.double(), top.values, rtol=0, atol=1.01 / 4000)


@pytest.mark.parametrize(
    "choose", [Categorical(), Categorical(0.7), Categorical(top_p=0.8), Categorical(1.5, 0.8, False)]
)
def test_choice_follows_the_law_it_states(choose):
    logits = torch.tensor([[1.0, 0.2, -0.5, 2.0, 0.0, -2.0]]).log_softmax(-1)
    law = choose.shape(logits)[0].double().softmax(-1)
    seen = choose(logits.expand(100_000, -1), torch.Generator().manual_seed(0)).bincount(minlength=6)
    assert passes(seen, law)


def test_draws_repeat_with_the_seed_and_change_without():
    logits = torch.randn(64, 100).log_softmax(-1)
    a, b, c = (Categorical()(logits, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


# Laws of whole walks


class Guess:
    "A guess at each position that depends on the other positions and, if asked, on the noise level"

    def __init__(self, letters, length, seed=0, timed=False):
        g = torch.Generator().manual_seed(seed)
        self.letters, self.timed, self.seen = letters, timed, []
        self.table = torch.randn(*[letters + 1] * length, length, letters + 1, generator=g)
        self.head = lambda h: h

    def hidden(self, ids, sigma=None, positions=None):
        self.seen.append(sigma)
        logits = self.table[tuple(ids.T)]
        logits = logits * (1 + sigma[:, None, None]) if self.timed else logits
        return logits if positions is None else logits[positions]


def exact_law(guess, objective, steps, start, final=None):
    "Law over all texts after the walk and the final denoising, by multiplying transition matrices"
    letters, mask_id, length = guess.letters, objective.corruption.mask_id, len(start)
    states = list(itertools.product(range(letters + 1), repeat=length))
    z = torch.tensor(states)
    law = torch.zeros(len(states), dtype=torch.float64)
    law[states.index(tuple(start))] = 1
    times = grid(steps)
    alphas = torch.cat([objective.schedule.alpha(times), torch.ones(1, dtype=torch.float64)])
    for i, (a_t, a_s) in enumerate(itertools.pairwise(alphas)):
        sigma = objective.schedule.sigma(times[i]).float().expand(len(z))
        log_x0 = objective.log_x0(guess.hidden(z, sigma), z)
        if final is not None and i == steps:
            best = torch.nn.functional.one_hot(final(log_x0.flatten(0, 1)).view(z.shape), letters + 1)
            log_x0 = best.double().log()
        row = objective.corruption.posterior(log_x0.double().exp(), z, a_s, a_t)
        jump = torch.ones(len(z), len(z), dtype=torch.float64)
        for place in range(length):
            jump *= row[:, place][:, z[:, place]]
        law = law @ jump
    assert law[(z == mask_id).any(1)].sum() < 1e-12 and law.sum().item() == pytest.approx(1)
    return law


def counts(ids, letters):
    base = (letters + 1) ** torch.arange(ids.shape[1] - 1, -1, -1)
    return (ids * base).sum(1).bincount(minlength=(letters + 1) ** ids.shape[1])


@pytest.mark.parametrize("steps", [1, 3, 50])
@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()], ids=str)
@pytest.mark.parametrize("timed", [False, True])
def test_law_of_ancestral_sampling(steps, schedule, timed):
    guess, objective = Guess(2, 3, seed=steps, timed=timed), MDLM(Absorbing(2, 3), schedule)
    states = Ancestral(steps).states(guess, objective, blank(30_000, 3), torch.Generator().manual_seed(7))
    assert passes(counts(last(states).ids, 2), exact_law(guess, objective, steps, (2, 2, 2)))


def test_law_with_given_tokens():
    guess, objective = Guess(2, 3, seed=1), MDLM(Absorbing(2, 3))
    canvas = infill(torch.tensor([[2, 1, 2]]).expand(30_000, 3), hole=2)
    ids = last(Ancestral(5).states(guess, objective, canvas, torch.Generator().manual_seed(0))).ids
    assert (ids[:, 1] == 1).all()
    assert passes(counts(ids, 2), exact_law(guess, objective, 5, (2, 1, 2)))


def test_law_with_greedy_end():
    guess, objective = Guess(2, 2, seed=2), MDLM(Absorbing(2, 3))
    sampler = Ancestral(1, final=Greedy(), eps=0.4)
    ids = last(sampler.states(guess, objective, blank(30_000, 2), torch.Generator().manual_seed(0))).ids
    law = torch.zeros(9, dtype=torch.float64)
    u = reveal_chance = ((objective.schedule.alpha(grid(1, 0.4))[1] - 1e-3) / (1 - 1e-3)).item()
    first = guess.table[2, 2].clone()
    first[:, 2] = -torch.inf
    p = first.double().softmax(-1)
    for shown in itertools.product([True, False], repeat=2):
        for a, b in itertools.product(range(2), repeat=2):
            z = [i if s else 2 for i, s in zip((a, b), shown, strict=True)]
            rest = guess.table[z[0], z[1], :, :2].argmax(-1).tolist()
            out = [i if s else r for i, s, r in zip((a, b), shown, rest, strict=True)]
            chance = 1.0
            for place, (i, s) in enumerate(zip((a, b), shown, strict=True)):
                chance *= u * p[place, i].item() if s else (1 - reveal_chance) / 2
            law[out[0] * 3 + out[1]] += chance
    assert passes(counts(ids, 2), law)


def test_time_conditioned_network_is_told_the_time_of_the_step():
    guess, objective = Guess(2, 3, timed=True), MDLM(Absorbing(2, 3))
    states = list(Ancestral(6).states(guess, objective, blank(4, 3), torch.Generator().manual_seed(0)))
    told = [s.flatten()[0].item() for s in guess.seen]
    levels = objective.schedule.sigma(grid(6)).float().tolist()
    assert all(min(abs(x - y) for y in levels) < 1e-6 for x in told) and told == sorted(told, reverse=True)
    assert len(states) == len(told) + 1


# Cost and states


def test_network_runs_only_when_and_where_something_changes():
    asked = []

    class Counting(Guess):
        def hidden(self, ids, sigma=None, positions=None):
            asked.append((len(ids), int(positions.sum())))
            return super().hidden(ids, sigma, positions)

    states = list(
        Ancestral(500).states(Counting(2, 3), MDLM(Absorbing(2, 3)), blank(5, 3), torch.Generator().manual_seed(0))
    )
    assert sum(n for _, n in asked) == 15
    assert sum(rows for rows, _ in asked) == states[-1].nfe.sum() <= 15
    assert all(s.changed.any() for s in states[1:])
    for before, after in itertools.pairwise(states):
        assert torch.equal(before.ids[~after.changed], after.ids[~after.changed])
        assert (before.ids[after.changed] == 2).all() and (after.ids[after.changed] != 2).all()


def test_text_of_a_batch_has_the_law_of_a_text_alone():
    guess, objective = Guess(2, 2, seed=5), MDLM(Absorbing(2, 3))
    g = torch.Generator().manual_seed(3)
    alone = torch.cat([last(Ancestral(4).states(guess, objective, blank(1, 2), g)).ids for _ in range(4000)])
    assert passes(counts(alone, 2), exact_law(guess, objective, 4, (2, 2)))


def test_film_ends_with_the_text():
    guess, objective = Guess(2, 3), MDLM(Absorbing(2, 3))
    states = list(Ancestral(9).states(guess, objective, prompted([[1]] * 2, 3), torch.Generator().manual_seed(0)))
    film = record(states, "ab".__getitem__, mask_id=2, row=1)
    assert film.frame(0) == "b··"
    assert film.frame(len(film.steps)) == "".join("ab"[i] for i in states[-1].ids[1])


def test_cache_writes_what_the_plain_loop_writes():
    torch.manual_seed(0)
    network = DiT(DiTConfig(vocab_size=9, hidden_size=32, n_blocks=2, n_heads=4, length=24, causal=True)).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    objective, canvas = AR(9, mask_id=8, start_id=8), prompted([[1, 2, 3, 4], [5], []], 12)
    out = last(Autoregressive(Greedy()).states(network, objective, canvas)).ids
    for row, text in enumerate(out):
        for place in range(12):
            if canvas.editable[row, place]:
                seen = torch.cat([torch.tensor([8]), text[:place]])[None]
                with torch.no_grad():
                    want = objective.log_x0(network.head(network.hidden(seen)[:, -1])).argmax()
                assert text[place] == want
            else:
                assert text[place] == canvas.ids[row, place]


def test_autoregressive_law():
    torch.manual_seed(1)
    network = DiT(DiTConfig(vocab_size=4, hidden_size=16, n_blocks=1, n_heads=2, length=8, causal=True)).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.5)
    objective = AR(4, mask_id=3, start_id=3)
    ids = last(Autoregressive().states(network, objective, blank(30_000, 2), torch.Generator().manual_seed(0))).ids
    texts = torch.tensor(list(itertools.product(range(3), repeat=2)))
    with torch.no_grad():
        law = (-objective(network, texts).per_token.double().sum(1)).exp()
    assert law.sum().item() == pytest.approx(1, abs=1e-5)
    assert passes((ids[:, 0] * 3 + ids[:, 1]).bincount(minlength=9), law)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Canvas(torch.zeros(1, 2), torch.zeros(1, 3)), "must both be"),
        (lambda: prompted([[1, 2, 3]], 2), "shorten it"),
        (lambda: infill([[1, 2]], hole=5), "nothing to write"),
        (lambda: Categorical(temperature=-1), "must be positive"),
        (lambda: Categorical(top_p=0), "must lie in"),
        (lambda: next(Ancestral(0).states(None, MDLM(Absorbing(2, 3)), blank(1, 2))), "at least one"),
        (lambda: next(Autoregressive().states(None, AR(4), blank(1, 2))), "no token to start from"),
    ],
)
def test_bad_input_is_answered_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)

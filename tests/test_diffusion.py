"Schedules, corruption and objectives against the recorded numbers of the originals, and against enumeration."

import itertools
import math

import pytest
import torch
from golden import case

from dlm.diffusion.corruption import Absorbing
from dlm.diffusion.cross_entropy import head_cross_entropy
from dlm.diffusion.objectives import AR, MDLM, loss_weight, subs
from dlm.diffusion.schedules import (
    ConstantWeight,
    Cosine,
    CosineBD3,
    CosineMD4,
    CosineSquared,
    Geometric,
    Independent,
    Linear,
    Logarithmic,
    LogLinear,
    Polynomial,
    Stratified,
)
from dlm.foundations.configuration import build, describe

FAMILY = [LogLinear(), Cosine(), CosineMD4(), CosineBD3(), CosineSquared(), Linear(), Geometric(), Polynomial()]
FAMILY += [Polynomial(0.5, 1e-3), Logarithmic(), ConstantWeight()]
MINUS_INFINITY = -1e6  # what the originals write for an impossible token


@pytest.mark.parametrize("schedule", FAMILY, ids=str)
def test_schedule_is_written_down_and_built_again(schedule):
    assert build(describe(schedule)) == schedule


@pytest.mark.parametrize("schedule", FAMILY, ids=str)
def test_noise_keeps_its_digits_in_single_precision(schedule):
    t = torch.tensor([1e-3, 0.03, 0.5, 0.999])
    for name in "alpha", "noise", "weight", "sigma":
        single, double = getattr(schedule, name)(t), getattr(schedule, name)(t.double())
        torch.testing.assert_close(single, double.float(), rtol=1e-4, atol=1e-7)


def original(schedule, t):
    "The quantities of the originals' noise classes"
    names = dict(total_noise="sigma", rate_noise="dsigma", alpha_t="alpha", dalpha_t="dalpha", loss_weight="weight")
    return {k: getattr(schedule, v)(t) for k, v in names.items()}


def check_noise(golden, prefix, schedule, precisions=("f32", "f64")):
    for precision in precisions:
        t = golden["t"].to(dict(f32=torch.float32, f64=torch.float64)[precision])
        for name, value in original(schedule, t).items():
            full = f"{prefix}.{name}.{precision}"
            if full in golden.tensors:
                where = golden.info["tensors"][full].get("compare_where")
                where = golden[where].bool() if where else None
                golden.compare(value, full, where)


@pytest.mark.parametrize(
    "prefix, schedule",
    [
        ("loglinear", LogLinear()),
        ("cosine", Cosine()),
        ("cosinesqr", CosineSquared()),
        ("linear", Linear(1e-3, 7.0)),
        ("geometric", Geometric(1e-3, 10.0)),
    ],
    ids=lambda x: str(x),
)
def test_golden_mdlm_noise_mdlm(prefix, schedule):
    golden = case("mdlm_noise_mdlm")
    if isinstance(schedule, Linear | Geometric):
        sigma = golden[f"{prefix}.total_noise.f64"]
        ends = sigma[golden["t"].argmin()].item(), sigma[golden["t"].argmax()].item()
        assert golden["t"].min() == 0 and golden["t"].max() == 1
        schedule = type(schedule)(*ends)
    check_noise(golden, prefix, schedule)


def test_golden_mdlm_noise_mdlm_importance_sampling_is_a_schedule():
    golden = case("mdlm_noise_mdlm")
    name = "loglinear.importance_sampling_transformation"
    time = LogLinear().time(ConstantWeight().alpha(golden["t"].double()))
    golden.compare(time.float(), name, golden[golden.info["tensors"][name]["compare_where"]].bool())


@pytest.mark.parametrize("prefix, kind", [("loglinear", LogLinear), ("geometric", Geometric)])
def test_golden_mdlm_noise_sedd(prefix, kind):
    golden = case("mdlm_noise_sedd")
    schedule = kind()
    if kind is Geometric:
        t, sigma = golden["t"].double(), golden["geometric.total_noise.f64"]
        slope = (sigma.log()[t.argmax()] - sigma.log()[t.argmin()]) / (t.max() - t.min())
        start = (sigma.log()[t.argmin()] - slope * t.min()).exp().item()
        schedule = Geometric(start, start * slope.exp().item())
    check_noise(golden, prefix, schedule)


def test_golden_mdlm_noise_duo():
    golden = case("mdlm_noise_duo")
    eps = golden.config["eps"]
    for precision, dtype in (("f32", torch.float32), ("f64", torch.float64)):
        t = golden["t"].to(dtype)
        for prefix, schedule, missing in (("log-linear", LogLinear(eps), 1), ("cosine", CosineMD4(eps), 1 - eps)):
            golden.compare(schedule.alpha(t), f"{prefix}.alpha_t.{precision}")
            golden.compare(schedule.dalpha(t) / missing, f"{prefix}.dalpha_t.{precision}")
    torch.testing.assert_close(CosineMD4(eps).dalpha(golden["t"].double()), golden["cosine.dalpha_t_true"])
    for prefix, clean in (("log-linear", LogLinear(0.0)), ("cosine", CosineMD4(0.0))):
        golden.compare(clean.time(golden["alpha_in"]), f"{prefix}.get_t_for_alpha")


BD3 = dict(
    loglinear=Polynomial(1.0),
    cosine=CosineBD3(),
    square=Polynomial(2.0, 1e-3),
    square_root=Polynomial(0.5, 1e-3),
    log=Logarithmic(),
)


@pytest.mark.parametrize("prefix, schedule", BD3.items())
def test_golden_mdlm_noise_bd3lm(prefix, schedule):
    golden = case("mdlm_noise_bd3lm")
    for precision, dtype in (("f32", torch.float32), ("f64", torch.float64)):
        t = golden["t"].to(dtype)
        golden.compare(schedule.noise(t), f"{prefix}.move_chance.{precision}")
        added = schedule.eps if isinstance(schedule, CosineBD3) else 0.0  # the original divides by noise + eps
        scaling = schedule.dalpha(t) / (schedule.noise(t) + added)
        golden.compare(scaling, f"{prefix}.loss_scaling.{precision}")
    if prefix == "cosine":
        torch.testing.assert_close(-schedule.weight(golden["t"].double()), golden["cosine.loss_scaling_exact"])


def test_golden_mdlm_forward_process():
    golden = case("mdlm_forward_process")
    eps = golden.config["sampling_eps"]
    for kind, sampler in ((True, Stratified(eps)), (False, Independent(eps))):
        t = sampler.at(golden["u_t"])
        golden.compare(t, f"sample_t.antithetic_{kind}.importance_False")
        drawn = LogLinear().time(ConstantWeight().alpha(t.double())).float()
        golden.compare(drawn, f"sample_t.antithetic_{kind}.importance_True")
    absorbing = Absorbing(golden.config["mask_index"], golden.config["vocab_size_with_mask"])
    golden.compare(absorbing.at(golden["x0"], 1 - golden["move_chance"], golden["u_x"]), "xt")


def test_golden_mdlm_dit_subs():
    golden = case("mdlm_dit")
    z, mask_id = golden["input_ids"], golden.config["mask_index"]
    for time, logits in (("time_conditioning", "logits"), ("no_time_conditioning", "logits_no_time_conditioning")):
        log_x0 = subs(golden[logits], z, mask_id).clamp_min(MINUS_INFINITY)
        golden.compare(log_x0, f"subs_logprobs_{time}")


SCHEDULES = dict(
    loglinear=LogLinear(),
    cosine=Cosine(),
    cosinesqr=CosineSquared(),
    geometric=Geometric(1e-3, 10.0),
    linear=Linear(1e-3, 10.0),
)


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden_mdlm_losses_continuous(name):
    golden = case("mdlm_losses")
    absorbing = Absorbing(golden.config["mask_index"], golden.config["vocab_size_with_mask"])
    objective = MDLM(absorbing, SCHEDULES[name])
    x, z, t = golden["x0"], golden["xt"], golden["t"]
    loss = objective.token_loss(golden["raw_logits_xt"], x, z, t)
    rows = golden["mask.rows_mid"].bool()[:, None] if name.startswith("cosine") else None
    golden.compare(loss, f"subs_ct.{name}", rows)
    golden.compare(objective.token_loss(golden["raw_logits_xt"].double(), x, z, t.double()), f"subs_ct.{name}.f64")
    golden.compare(objective.schedule.noise(t)[:, None], f"subs_ct.{name}.move_chance")
    log_x0 = objective.log_x0(golden["raw_logits_xt"], z).clamp_min(MINUS_INFINITY)
    golden.compare(log_x0, "subs_logprobs")


def test_golden_mdlm_losses_batch_mean():
    golden = case("mdlm_losses")
    objective = MDLM(Absorbing(golden.config["mask_index"], golden.config["vocab_size_with_mask"]))
    nlls = objective.token_loss(golden["raw_logits_xt"], golden["x0"], golden["xt"], golden["t"])
    weights = golden["attention_mask"]
    golden.compare((nlls * weights).sum() / weights.sum(), "subs_ct.batch_loss")
    golden.compare(nlls, "subs_ct.batch_nlls", weights)


@pytest.mark.parametrize("option", ["importance_sampling", "change_of_variables"])
def test_golden_mdlm_losses_importance_sampling(option):
    "The original's weight leaves out one end of the interval: undo that, and the constant-weight schedule is its loss"
    golden = case("mdlm_losses")
    schedule = ConstantWeight()
    f0, f1 = schedule.ends
    objective = MDLM(Absorbing(golden.config["mask_index"], golden.config["vocab_size_with_mask"]), schedule)
    loss = objective.token_loss(golden["raw_logits_xt"], golden["x0"], golden["xt"], golden["t"])
    golden.compare(loss * f0 / (f0 - f1), f"subs_ct.{option}")
    if option == "change_of_variables":
        golden.compare(schedule.noise(golden["t"])[:, None], f"subs_ct.{option}.move_chance")
    else:
        golden.compare(LogLinear().noise(golden["t"])[:, None], f"subs_ct.{option}.move_chance")


@pytest.mark.parametrize("steps", [50, 1000])
def test_golden_mdlm_losses_finite(steps):
    golden = case("mdlm_losses")
    objective = MDLM(Absorbing(golden.config["mask_index"], golden.config["vocab_size_with_mask"]), steps=steps)
    t = golden[f"finite_T{steps}.t_discrete"]
    loss = objective.token_loss(golden["raw_logits_xt"], golden["x0"], golden["xt"], t)
    golden.compare(loss, f"subs_finite_T{steps}")


def test_golden_mdlm_losses_first_grid_point_is_finite():
    "At t = 1/T the original divides zero by zero; the bound there is T times the cross-entropy"
    golden = case("mdlm_losses")
    steps = 20
    objective = MDLM(Absorbing(golden.config["mask_index"], golden.config["vocab_size_with_mask"]), steps=steps)
    t = torch.full_like(golden["t"], 1 / steps)
    assert golden["edge_t_is_1_over_T.subs"].isnan().all()
    loss = objective.token_loss(golden["raw_logits_xt"], golden["x0"], golden["xt"], t)
    nll = -golden["subs_logprobs"].gather(-1, golden["x0"][..., None])[..., 0]
    torch.testing.assert_close(loss, steps * nll * (golden["xt"] == golden.config["mask_index"]), rtol=1e-4, atol=1e-4)


def test_finite_times_visit_every_grid_point():
    objective = MDLM(Absorbing(3, 4), steps=7)
    t = objective.times(7 * 100, torch.Generator().manual_seed(0))
    assert torch.equal((t * 7).round().long().bincount(), torch.tensor([0, *[100] * 7]))
    assert loss_weight(objective.schedule, t, 7).isfinite().all()


@pytest.mark.parametrize("name", ["ar_dit_mdlm", "ar_dit_duo"])
def test_golden_ar_dit_losses(name):
    golden = case(name)
    mask_id = golden.config["mask_index"]
    raw, x = golden["raw_logits" if name == "ar_dit_mdlm" else "logits"], golden["input_ids"]
    objective = AR(golden.config["vocab_size_with_mask"], mask_id)
    nll = objective.token_loss(raw, x[:, 1:])
    if name == "ar_dit_duo":
        return golden.compare(nll, "nll")
    weights = golden["attention_mask"][:, 1:]
    real = torch.arange(raw.shape[-1]) != mask_id
    golden.compare(objective.log_x0(raw), "logprobs", real.expand(raw.shape))
    golden.compare(nll * weights, "nlls")
    golden.compare((nll * weights).sum() / weights.sum(), "loss")


class Recorded:
    "A network that returns recorded logits"

    head = staticmethod(lambda h: h.clone())

    def __init__(self, logits):
        self.logits = logits

    def hidden(self, ids, sigma=None, positions=None):
        return self.logits if positions is None else self.logits[positions]


def test_golden_ar_dit_call_equals_the_recorded_loss():
    golden = case("ar_dit_mdlm")
    objective = AR(golden.config["vocab_size_with_mask"], golden.config["mask_index"])
    loss = objective(Recorded(golden["raw_logits"]), golden["input_ids"], golden["attention_mask"])
    golden.compare(loss.mean(), "loss")
    assert not loss.valid[:, 0].any() and loss.per_token.shape == golden["input_ids"].shape


# Enumeration: two positions, three letters, everything computable


def joint(seed, letters, length):
    p = torch.rand((letters,) * length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2
    return p / p.sum()


def conditionals(p, z, mask_id):
    "Exact log-probabilities of each hidden token given the visible ones, [L, V]"
    L, V = p.dim(), p.shape[0]
    rows = torch.zeros(L, V + 1, dtype=torch.float64)
    for spot in range(L):
        seen = p
        for other, i in enumerate(z):
            if other != spot:
                seen = seen.sum(other, keepdim=True) if i == mask_id else seen.narrow(other, i, 1)
        rows[spot, :V] = seen.flatten().log()
    return rows


def bound(p, guess, objective, x):
    "The bound of text `x` in nats, summing over all masks and integrating over all times"
    mask_id, L = objective.corruption.mask_id, len(x)
    if objective.steps:
        t = torch.arange(1, objective.steps + 1, dtype=torch.float64) / objective.steps
        mass = torch.full_like(t, 1 / objective.steps)
    else:
        nodes = 2000
        t = (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
        mass = torch.full_like(t, 1 / nodes)
    noise, total = objective.schedule.noise(t), 0.0
    for mask in itertools.product([False, True], repeat=L):
        z = [mask_id if hide else i for i, hide in zip(x, mask, strict=True)]
        k = sum(mask)
        logits = guess(p, z, mask_id).expand(len(t), L, -1)
        ids, zs = torch.tensor(x).expand(len(t), L), torch.tensor(z).expand(len(t), L)
        loss = objective.token_loss(logits, ids, zs, t).sum(1)
        total += (mass * noise**k * (1 - noise) ** (L - k) * loss).sum().item()
    return total


@pytest.mark.parametrize("schedule", [LogLinear(0.0), Cosine(0.0), CosineMD4(0.0), Polynomial(2.0)], ids=str)
def test_bound_is_tight_for_exact_answers_under_any_schedule(schedule):
    p = joint(1, 3, 3)
    objective = MDLM(Absorbing(3, 4), schedule)
    for x in [(0, 1, 2), (2, 2, 0), (1, 0, 1)]:
        assert bound(p, conditionals, objective, x) == pytest.approx(-p[x].log().item(), rel=1e-4)


def test_discrete_bound_is_above_the_likelihood_and_falls_with_the_number_of_steps():
    p, texts = joint(2, 3, 2), list(itertools.product(range(3), repeat=2))
    entropy = -(p * p.log()).sum().item()

    def mean_bound(steps):
        objective = MDLM(Absorbing(3, 4), LogLinear(0.0), steps=steps)
        return sum(p[x].item() * bound(p, conditionals, objective, x) for x in texts)

    bounds = [mean_bound(n) for n in (1, 2, 4, 16, 256)]
    assert all(a > b for a, b in itertools.pairwise(bounds))
    assert bounds[-1] > entropy and bounds[-1] == pytest.approx(entropy, rel=2e-3)
    marginals = sum(-(q * q.log()).sum().item() for q in (p.sum(0), p.sum(1)))
    assert bounds[0] == pytest.approx(marginals, rel=1e-6)  # one step: independent tokens


def test_bound_of_any_network_is_above_the_likelihood_on_average():
    p, texts = joint(3, 3, 2), list(itertools.product(range(3), repeat=2))
    entropy = -(p * p.log()).sum().item()
    for seed in range(5):
        noise = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

        def guess(p, z, mask_id, noise=noise):
            return conditionals(p, z, mask_id) + 0.5 * noise

        objective = MDLM(Absorbing(3, 4), LogLinear(0.0))
        assert sum(p[x].item() * bound(p, guess, objective, x) for x in texts) > entropy


def test_call_equals_token_loss_and_skips_tokens_that_do_not_count():
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(6, 9, 12, generator=g), torch.randint(0, 11, (6, 9), generator=g)
    valid = torch.rand(6, 9, generator=g) < 0.7
    objective = MDLM(Absorbing(11, 12), Cosine())
    t = objective.times(6, g)
    loss = objective(Recorded(logits), ids, valid, torch.Generator().manual_seed(5), t)
    z = objective.corruption.corrupt(ids, objective.schedule.alpha(t)[:, None], torch.Generator().manual_seed(5))
    want = objective.token_loss(logits.double(), ids, z, t) * valid
    torch.testing.assert_close(loss.per_token.double(), want, rtol=1e-5, atol=1e-5)
    assert loss.count() == valid.sum() and loss.mean().item() == pytest.approx(
        (want.sum() / valid.sum()).item(), rel=1e-5
    )


def test_gradient_of_the_loss_is_that_of_plain_cross_entropy():
    torch.manual_seed(0)
    head, hidden, target = torch.nn.Linear(16, 30), torch.randn(50, 16, requires_grad=True), torch.randint(0, 29, (50,))
    weight = torch.rand(50)
    ours = torch.autograd.grad((head_cross_entropy(head, hidden, target, 29) * weight).sum(), [hidden, head.weight])
    plain = torch.nn.functional.cross_entropy(head(hidden)[:, :29], target, reduction="none")
    for a, b in zip(ours, torch.autograd.grad((plain * weight).sum(), [hidden, head.weight]), strict=True):
        torch.testing.assert_close(a, b)


def test_large_heads_are_sliced(monkeypatch):
    import dlm.diffusion.cross_entropy as module

    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no F.linear_cross_entropy")
    torch.manual_seed(0)
    head, hidden, target = torch.nn.Linear(8, 40, bias=False), torch.randn(300, 8), torch.randint(0, 39, (300,))
    whole = head_cross_entropy(head, hidden, target, 39)
    calls = []
    sliced = module.sliced_cross_entropy
    monkeypatch.setattr(module, "FUSED_FROM", 1)
    monkeypatch.setattr(module, "sliced_cross_entropy", lambda *a: calls.append(a) or sliced(*a))
    torch.testing.assert_close(head_cross_entropy(head, hidden, target, 39), whole)
    assert len(calls) == 1


def test_bfloat16_logits_are_summed_in_float32():
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 20_000, dtype=torch.bfloat16)
    hidden, target = torch.randn(4, 16, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 3])
    want = torch.nn.functional.cross_entropy(head(hidden).double(), target, reduction="none")
    torch.testing.assert_close(head_cross_entropy(head, hidden, target).double(), want, rtol=1e-5, atol=1e-4)


def test_stratified_times_lower_the_variance_of_the_loss():
    objective = MDLM(Absorbing(4, 5))
    ids, logits = torch.zeros(8, 4, dtype=torch.long), torch.zeros(8, 4, 5)

    def spread(stratified):
        g, o = torch.Generator().manual_seed(0), MDLM(objective.corruption, stratified=stratified)
        return torch.stack([o(Recorded(logits), ids, generator=g).mean() for _ in range(800)]).std().item()

    assert spread(Stratified()) < spread(Independent())


def test_untrained_network_costs_log_of_the_vocabulary():
    objective, V = MDLM(Absorbing(9, 10)), 10
    ids = torch.zeros(4000, 5, dtype=torch.long)
    loss = objective(Recorded(torch.zeros(4000, 5, V)), ids, generator=torch.Generator().manual_seed(0))
    se = loss.per_token.mean(1).std().item() / 4000**0.5
    assert abs(loss.mean().item() - math.log(V - 1)) < 4 * se

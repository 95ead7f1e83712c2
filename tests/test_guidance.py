"Classes and guidance: exact laws in a world of nine texts, and the refusals."

import math

import pytest
import torch
from scipy.stats import chi2

from dlm.diffusion import enumeration
from dlm.diffusion.classification import NoisyClassification
from dlm.diffusion.classifier_guidance import ExactGuidance, FirstOrderGuidance, exact_tilt, first_order_tilt
from dlm.diffusion.conditioning import ClassDropout, Conditioned, drop_labels
from dlm.diffusion.corruption import Absorbing, Uniform
from dlm.diffusion.enumeration import World, distance
from dlm.diffusion.guidance import ClassifierFree, mixture
from dlm.diffusion.objectives import AR, MDLM
from dlm.diffusion.uniform import UDLM
from dlm.foundations.configuration import build, describe
from dlm.models.classifier import Classifier, ClassifierConfig
from dlm.models.dit import DiT, DiTConfig
from dlm.sampling.ancestral import Ancestral, Stepwise, last
from dlm.sampling.canvas import Canvas, blank
from dlm.sampling.categorical import Categorical, Greedy
from dlm.sampling.orders import Confidence, FirstHitting
from dlm.sampling.psi import Psi
from dlm.sampling.remasking import Rescale
from dlm.sampling.scores import Analytic, Euler
from dlm.training.settings import TrainingConfig
from dlm.training.trainer import DiffusionTrainer

WORLD = World()
K, L, CLASSES = WORLD.symbols, WORLD.length, WORLD.classes
TEXTS, JOINT, OF_CLASS = WORLD.texts, WORLD.joint, WORLD.of_class

OBJECTIVES = {"absorbing": MDLM(Absorbing(K, K + 1)), "uniform": UDLM(Uniform(K))}


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    return OBJECTIVES[request.param]


class PerfectNetwork(enumeration.PerfectNetwork):
    "The best denoiser, which counts how often it is asked"

    def __init__(self, process):
        super().__init__(WORLD, process)
        self.calls = 0

    def hidden(self, *args, **options):
        self.calls += 1
        return super().hidden(*args, **options)


def PerfectClassifier(process):
    return enumeration.PerfectClassifier(WORLD, process)


def law_of(network, objective, steps):
    law = enumeration.law_of(WORLD, network, objective, steps)
    assert abs(law.sum() - 1) < 1e-9, "a mask was left, or a step is no law"
    return law


def passes(ids, law):
    "Whether texts come from a law, by a chi-squared test that exact draws pass 9,999 times in 10,000"
    seen = torch.bincount(ids @ torch.tensor([K, 1]), minlength=K**L).double()
    want = law * seen.sum()
    statistic = ((seen - want) ** 2 / want).sum().item()
    return statistic < chi2.ppf(0.9999, K**L - 1)


def kinds(process, label=1, weight=2.0):
    classifier = PerfectClassifier(process)
    free = ClassifierFree(label, weight)
    return [free, ExactGuidance(classifier, label, weight), FirstOrderGuidance(classifier, label, weight)]


# Exact laws


def test_the_world_is_right(objective):
    network = PerfectNetwork(objective.corruption)
    assert distance(law_of(network, objective, 300), JOINT.sum(0)) < 0.003
    for label in range(CLASSES):
        assert distance(law_of(Conditioned(network, label), objective, 300), OF_CLASS[label]) < 0.003


def test_exact_guidance_reaches_bayes_rule(objective):
    network, classifier = PerfectNetwork(objective.corruption), PerfectClassifier(objective.corruption)
    for label in range(CLASSES):
        guided = ExactGuidance(classifier, label).guide(network, objective)
        errors = [distance(law_of(*guided, steps), OF_CLASS[label]) for steps in (20, 200)]
        assert errors[1] < 0.01 and errors[1] < errors[0] / 5


def test_every_sampled_law_is_the_exact_one(objective):
    n, steps = 4_000, 12
    for i, kind in enumerate(kinds(objective.corruption)):
        guided = kind.guide(PerfectNetwork(objective.corruption), objective)
        state = last(Ancestral(steps).states(*guided, blank(n, L), torch.Generator().manual_seed(i)))
        law = law_of(*guided, steps)
        assert passes(state.ids, law), type(kind).__name__
        assert not passes(state.ids, JOINT.sum(0)), "the test would see no guidance at all"


def test_exact_guidance_samples_the_class(objective):
    guided = ExactGuidance(PerfectClassifier(objective.corruption), 1)
    guided = guided.guide(PerfectNetwork(objective.corruption), objective)
    state = last(Ancestral(100).states(*guided, blank(2000, L), torch.Generator().manual_seed(0)))
    assert passes(state.ids, OF_CLASS[1]) and not passes(state.ids, JOINT.sum(0))


def test_weights_zero_and_one_are_no_class_and_the_class(objective):
    network = PerfectNetwork(objective.corruption)
    for near, plain in ((0.0, network), (1.0, Conditioned(network, 1))):
        law = law_of(plain, objective, 10)
        network.calls = 0
        assert distance(law_of(*ClassifierFree(1, near).guide(network, objective), 10), law) < 1e-12
        assert network.calls == 11, "one answer is enough"
        mixed = ClassifierFree(1, abs(near - 1e-9)).guide(network, objective)
        assert distance(law_of(*mixed, 10), law) < 1e-6


def test_weight_of_a_classifier_at_zero_is_no_guidance(objective):
    network = PerfectNetwork(objective.corruption)
    for kind in (ExactGuidance, FirstOrderGuidance):
        assert kind(PerfectClassifier(objective.corruption), 1, 0.0).guide(network, objective) == (network, objective)


def test_the_class_grows_with_the_weight(objective):
    posterior = JOINT[1] / JOINT.sum(0)
    for kind in range(3):
        network, weights = PerfectNetwork(objective.corruption), (0.0, 0.5, 1.0, 2.0)
        pairs = [kinds(objective.corruption, 1, w)[kind].guide(network, objective) for w in weights]
        shares = [(law_of(*pair, 40) * posterior).sum().item() for pair in pairs]
        assert shares == sorted(shares) and shares[-1] > shares[0] + 0.2


def test_one_masked_token_has_the_written_law():
    "One open token: p^gamma(x) is proportional to p(x | given, c)^gamma p(x | given)^(1 - gamma), in any number of steps"
    objective, weight = OBJECTIVES["absorbing"], 2.5
    guided = ClassifierFree(1, weight).guide(PerfectNetwork(objective.corruption), objective)
    canvas = Canvas(torch.tensor([[1, 0]]).expand(20_000, -1), torch.tensor([[False, True]]).expand(20_000, -1))
    ids = last(Ancestral(5).states(*guided, canvas, torch.Generator().manual_seed(0))).ids
    given = TEXTS[:, 0] == 1
    law = JOINT[1] ** weight * JOINT.sum(0) ** (1 - weight) * given
    seen = torch.bincount(ids[:, 1], minlength=K).double()
    want = (law / law.sum())[given] * len(ids)
    assert ((seen - want) ** 2 / want).sum() < chi2.ppf(0.9999, K - 1)


def test_mixtures_of_laws_and_of_guesses_differ():
    "Under masks the guess is mixed, so that the share of tokens unmasked stays what it is without guidance"
    objective = OBJECTIVES["absorbing"]
    network = PerfectNetwork(objective.corruption)
    mixed, same = ClassifierFree(1, 3.0).guide(network, objective)
    assert same is objective and same.positions_first
    z, t, s = torch.tensor([[K, 1]]), torch.tensor(0.6).double(), torch.tensor(0.3).double()
    where, sigma = torch.tensor([[True, False]]), objective.schedule.sigma(t)[None]
    laws = [same.step_law(n.head(n.hidden(z, sigma, positions=where)), z[where], t, s) for n in (network, mixed)]
    torch.testing.assert_close(laws[0][:, K], laws[1][:, K])
    assert (laws[0] - laws[1]).abs().max() > 0.05


def test_uniform_mixture_is_that_of_the_laws():
    objective, weight = OBJECTIVES["uniform"], 1.7
    network = PerfectNetwork(objective.corruption)
    z, t, s = torch.tensor([[0, 2], [1, 1]]), torch.tensor(0.6).double(), torch.tensor(0.3).double()
    where, sigma = torch.ones_like(z, dtype=torch.bool), objective.schedule.sigma(t).expand(2)
    pair, steered = ClassifierFree(1, weight).guide(network, objective)
    found = steered.step_law(pair.head(pair.hidden(z, sigma, positions=where)), z[where], t, s)
    answers = [Conditioned(network, c).hidden(z, sigma, positions=where) for c in (1, CLASSES)]
    laws = [objective.step_law(logits, z[where], t, s) for logits in answers]
    want = laws[0] ** weight * laws[1] ** (1 - weight)
    torch.testing.assert_close(found, want / want.sum(-1, keepdim=True))


def test_what_an_answer_excludes_stays_excluded():
    answers = torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.5, 0.0]]).log()
    assert mixture(answers, 3.0).softmax(-1).tolist() == [1.0, 0.0, 0.0]


# Tilts


def tiny_classifier(V=5, classes=3, **changes):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, n_blocks=2, n_heads=2, cond_dim=8, length=4, dropout=0.0) | changes
    classifier = Classifier(ClassifierConfig(classes, vocab_size=V, **sizes)).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.normal_(0, 0.3)
    return classifier


def test_exact_tilt_is_that_of_each_edit_whatever_the_chunk():
    classifier, sigma = tiny_classifier(), torch.tensor([0.2, 2.0])
    ids, where = torch.tensor([[0, 4, 4], [4, 1, 2]]), torch.tensor([[False, True, True], [True, False, True]])
    tilt = exact_tilt(classifier, 2, ids, sigma, where, chunk=3)
    torch.testing.assert_close(tilt, exact_tilt(classifier, 2, ids, sigma, where, chunk=1000))
    for n, (b, place) in enumerate(where.nonzero().tolist()):
        for y in range(5):
            edited = ids[b].clone()
            edited[place] = y
            torch.testing.assert_close(tilt[n, y], classifier.log_probs(edited[None], sigma[b : b + 1])[0, 2])


def test_first_order_tilt_is_the_slope_for_the_one_hot_text():
    classifier, sigma = tiny_classifier(), torch.tensor([0.2, 2.0])
    ids, where = torch.tensor([[0, 4, 4], [4, 1, 2]]), torch.tensor([[False, True, True], [True, False, True]])
    weights = torch.nn.functional.one_hot(ids, 5).float().requires_grad_()
    log_p = classifier.log_probs(classifier.vocab_embed.mix(weights), sigma)[:, 2]
    (g,) = torch.autograd.grad(log_p.sum(), weights)
    want = log_p[:, None, None] + g - g.gather(-1, ids[..., None])
    with torch.no_grad():
        found = first_order_tilt(classifier, 2, ids, sigma, where)
    torch.testing.assert_close(found, want[where].detach())
    assert all(p.grad is None for p in classifier.parameters())


def test_the_tilts_agree_where_the_class_is_linear_in_the_tokens():
    scores = torch.randn(L, K + 1, CLASSES, dtype=torch.float64)

    class Linear(enumeration.PerfectClassifier):
        def log_probs(self, ids, sigma):
            shares = ids if ids.is_floating_point() else self.table[ids]
            return torch.einsum("blv,lvc->bc", shares, scores)

    ids, where = torch.randint(K + 1, (6, L)), torch.rand(6, L) < 0.7
    classifier = Linear(WORLD, Absorbing(K, K + 1))
    both = [tilt(classifier, 0, ids, torch.ones(6), where) for tilt in (exact_tilt, first_order_tilt)]
    torch.testing.assert_close(*both)


def test_the_tilts_meet_for_small_changes():
    "Where tokens differ little, the two differ by the square of that"
    ids, where, gaps = torch.tensor([[0, 4, 4]]), torch.ones(1, 3, dtype=torch.bool), []
    for scale in (1e-1, 1e-2):
        classifier = tiny_classifier()
        with torch.no_grad():
            table = classifier.vocab_embed.embedding
            table.copy_(torch.linspace(-1, 1, 16).exp() + scale * table)
        one, other = (tilt(classifier, 0, ids, torch.ones(1), where) for tilt in (exact_tilt, first_order_tilt))
        gaps.append(((one - other).abs().max() / (one - one.mean()).abs().max()).item())
    assert gaps[1] < gaps[0] / 3


# Networks with classes


def tiny_network(V, **changes):
    torch.manual_seed(1)
    sizes = dict(hidden_size=16, n_blocks=1, n_heads=2, cond_dim=8, length=8, num_classes=3, dropout=0.0) | changes
    network = DiT(DiTConfig(vocab_size=V, **sizes)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.3)
    return network


@pytest.mark.parametrize("choose", [Categorical(), Categorical(top_p=0.7), Greedy()])
@pytest.mark.parametrize("kind", [ClassifierFree, ExactGuidance, FirstOrderGuidance])
@pytest.mark.parametrize("sampler", [Ancestral, Stepwise])
def test_samplers_take_guided_networks(sampler, kind, choose):
    for objective in (MDLM(Absorbing(4, 5)), UDLM(Uniform(5))):
        network, classifier = tiny_network(5, time_conditioning=True), tiny_classifier(length=8)
        guidance = kind(1, 2.0) if kind is ClassifierFree else kind(classifier, 1, 2.0)
        canvas = Canvas(torch.zeros(3, 6, dtype=torch.long), torch.rand(3, 6) < 0.7)
        walk = sampler(4, choose=choose).states(*guidance.guide(network, objective), canvas, torch.Generator())
        ids = last(walk).ids
        assert (ids[~canvas.editable] == 0).all() and (objective.positions_first is False or (ids != 4).all())


def test_a_label_is_filled_in():
    network, ids = tiny_network(5), torch.randint(5, (3, 4))
    labels = torch.tensor([2, 0, 3])
    want = torch.cat([Conditioned(network, int(c))(ids[i : i + 1]) for i, c in enumerate(labels)])
    torch.testing.assert_close(Conditioned(network, labels)(ids), want)
    torch.testing.assert_close(Conditioned(network, 3)(ids), network(ids))
    assert not torch.allclose(want[0], network(ids)[0])


def test_labels_are_dropped_in_training_only_and_from_the_generator():
    network, objective = tiny_network(5), ClassDropout(MDLM(Absorbing(4, 5)), 0.25)
    labels = torch.zeros(20_000, dtype=torch.long)
    dropped = [drop_labels(Conditioned(network, labels), 20_000, 0.25, torch.Generator().manual_seed(3)) for _ in "ab"]
    assert torch.equal(dropped[0].label, dropped[1].label)
    assert abs((dropped[0].label == 3).float().mean() - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5
    ids, t = torch.randint(4, (8, 6)), torch.full((8,), 0.5)

    class Spy(Conditioned):
        def hidden(self, *args, **options):
            seen.append(self.label)
            return super().hidden(*args, **options)

    seen = []
    objective(Spy(network, 1), ids, t=t)
    assert seen == [1]
    loss = objective.in_training(7)(Conditioned(network, 1), ids, generator=torch.Generator().manual_seed(0), t=t)
    again = objective.in_training(7)(Conditioned(network, 1), ids, generator=torch.Generator().manual_seed(0), t=t)
    assert torch.equal(loss.per_token, again.per_token)
    assert build(describe(objective)) == objective and objective.times(4).shape == (4,)


def test_noisy_classification_is_the_cross_entropy():
    classifier, objective = tiny_classifier(), NoisyClassification(MDLM(Absorbing(4, 5)))
    ids, label, t = torch.randint(4, (5, 4)), torch.tensor([0, 1, 2, 1, 0]), torch.full((5,), 1e-9)
    valid = torch.ones_like(ids)
    valid[3] = 0
    loss = objective(Conditioned(classifier, label), ids, valid, t=t)
    want = -classifier.log_probs(ids, objective.schedule.sigma(t)).gather(-1, label[:, None])
    torch.testing.assert_close(loss.per_token, want)
    assert loss.count() == 4 and build(describe(objective)) == objective


# Refusals


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ClassifierFree(0).guide(tiny_network(5, num_classes=None), MDLM(Absorbing(4, 5))), "knows no classes"),
        (lambda: ClassifierFree(3).guide(tiny_network(5), MDLM(Absorbing(4, 5))), "means no class"),
        (lambda: ClassifierFree(4).guide(tiny_network(5), MDLM(Absorbing(4, 5))), "for 3 classes"),
        (lambda: ClassifierFree(0, -0.5).guide(tiny_network(5), MDLM(Absorbing(4, 5))), "guidance weight -0.5"),
        (lambda: ClassifierFree(0, math.nan).guide(tiny_network(5), MDLM(Absorbing(4, 5))), "guidance weight nan"),
        (lambda: ExactGuidance(tiny_classifier(), 3), "classifier of 3 classes"),
        (lambda: ExactGuidance(tiny_classifier(6), 0).guide(tiny_network(5), MDLM(Absorbing(4, 5))), "of 6 ids"),
        (lambda: FirstOrderGuidance(tiny_classifier(), 0).guide(tiny_network(5), AR(5)), "left to right"),
        (lambda: Conditioned(tiny_network(5), torch.tensor([0, 9])), "labels from 0 to 9"),
        (lambda: ClassDropout(MDLM(Absorbing(4, 5)), 1.0), "share 1.0"),
        (lambda: ClassifierConfig(1), "two classes"),
        (lambda: ClassifierConfig(2, time_conditioning=False, causal=True), "causal"),
    ],
)
def test_misfits_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_classifier_is_not_shown_half_a_text():
    guided, _ = ExactGuidance(tiny_classifier(), 0).guide(tiny_network(5), MDLM(Absorbing(4, 5)))
    with pytest.raises(ValueError, match="whole texts"):
        guided.hidden(torch.zeros(1, 2, dtype=torch.long), torch.ones(1), cache=object())
    with pytest.raises(ValueError, match="whole texts"):
        guided.hidden(torch.zeros(1, 2, dtype=torch.long))


# Labels through the trainer


def test_labels_pass_through_the_trainer(tmp_path):
    "Class 0 writes 0, class 1 writes 1: the label is all that a fully masked text can be told from"
    rows = [{"ids": torch.full((4,), c), "valid": torch.ones(4), "label": c} for c in (0, 1)] * 16
    numbers = dict(batch_size=16, lr=3e-2, warmup_steps=0, ema_decay=0.5, precision="fp32", progress=False)
    numbers |= dict(eval_every=1000, save_every=1000, log_every=1000)
    mdlm, sizes = MDLM(Absorbing(2, 3)), dict(hidden_size=16, n_blocks=1, n_heads=2, cond_dim=8, length=4, dropout=0.0)
    torch.manual_seed(0)
    network, classifier = DiT(DiTConfig(3, num_classes=2, **sizes)), Classifier(ClassifierConfig(vocab_size=3, **sizes))
    pairs = ((network, ClassDropout(mdlm, 0.2)), (classifier, NoisyClassification(mdlm)))
    for i, (net, objective) in enumerate(pairs):
        trainer = DiffusionTrainer(net, objective, TrainingConfig(steps=40, **numbers), rows, rows, tmp_path / str(i))
        trainer.train_or_resume()
        assert trainer.evaluate()["eval_loss"] < 0.3
        net.eval()
    masked = torch.full((1, 4), 2)
    for c in (0, 1, 2):
        guess = mdlm.log_x0(Conditioned(network, c)(masked), masked).exp()[..., 1].mean().item()
        assert abs(guess - (0.0, 1.0, 0.5)[c]) < 0.25, (c, guess)
    for guidance in (ClassifierFree(1, 2.0), ExactGuidance(classifier, 1, 2.0)):
        states = Ancestral(4).states(*guidance.guide(network, mdlm), blank(50, 4), torch.Generator().manual_seed(0))
        assert (last(states).ids == 1).float().mean() > 0.8


# Every sampler


@pytest.mark.parametrize("sampler", [FirstHitting(), Confidence(4), Psi(4, kappa=Rescale(0.5)), Analytic(4), Euler(16)])
@pytest.mark.parametrize("kind", [ClassifierFree, ExactGuidance, FirstOrderGuidance])
def test_every_sampler_is_guided_or_refuses(sampler, kind):
    "Samplers that draw positions first can not be steered by a classifier, nor serve a uniform corruption"
    canvas = Canvas(torch.zeros(3, 6, dtype=torch.long), torch.rand(3, 6) < 0.7)
    for objective in (MDLM(Absorbing(4, 5)), UDLM(Uniform(5))):
        network, classifier = tiny_network(5, time_conditioning=True), tiny_classifier(length=8)
        guidance = kind(1, 2.0) if kind is ClassifierFree else kind(classifier, 1, 2.0)
        guided = guidance.guide(network, objective)
        if isinstance(sampler, FirstHitting | Confidence) and not guided[1].positions_first:
            with pytest.raises(ValueError, match="use Ancestral"):
                last(sampler.states(*guided, canvas, torch.Generator()))
            continue
        ids = last(sampler.states(*guided, canvas, torch.Generator().manual_seed(0))).ids
        assert (ids[~canvas.editable] == 0).all() and ids.max() < guided[1].corruption.vocab_size
        assert isinstance(objective, UDLM) or (ids != 4).all()

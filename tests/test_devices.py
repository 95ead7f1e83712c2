"Losses and samplers keep to the device of their tensors, shown without a GPU by a device that is only pretended"

import pytest
import torch
from other_device import DEVICE, SEED, OtherDevice, take_there

from dlm.diffusion import schedules
from dlm.diffusion.blocks import BlockDiffusion
from dlm.diffusion.classifier_guidance import ExactGuidance, FirstOrderGuidance
from dlm.diffusion.conditioning import Conditioned
from dlm.diffusion.consistency import ConsistencyDistillation
from dlm.diffusion.corruption import Absorbing, Uniform
from dlm.diffusion.curriculum import DUO
from dlm.diffusion.duality import Duality
from dlm.diffusion.finite import D3PM
from dlm.diffusion.guidance import ClassifierFree
from dlm.diffusion.objectives import AR, MDLM
from dlm.diffusion.scores import SEDD
from dlm.diffusion.uniform import UDLM
from dlm.models.classifier import Classifier, ClassifierConfig
from dlm.models.dit import DiT, DiTConfig
from dlm.models.mamba import DiMamba, DiMambaConfig
from dlm.sampling import orders, remasking
from dlm.sampling.ancestral import Ancestral
from dlm.sampling.autoregressive import Autoregressive
from dlm.sampling.blocks import Blocks, Ending, SemiAutoregressive
from dlm.sampling.canvas import Canvas
from dlm.sampling.psi import ByConfidence, Psi
from dlm.sampling.scores import Analytic, Euler

V, L = 12, 8
A, U = Absorbing(V - 1, V), Uniform(V)
SHAPE = dict(vocab_size=V, hidden_size=16, n_blocks=2, cond_dim=8, length=L, dropout=0.0)


@pytest.fixture(autouse=True)
def other_device(monkeypatch):
    with OtherDevice(monkeypatch):
        yield


def network(kind=DiT, config=DiTConfig, **changes):
    torch.manual_seed(0)
    made = kind(config(**SHAPE | (dict(n_heads=2) if config is not DiMambaConfig else {}) | changes))
    torch.nn.init.normal_(made.head.weight, std=0.3)
    return take_there(made)


def generator():
    return torch.Generator().manual_seed(SEED)


def ids(length=L):
    return torch.randint(V - 1, (4, length), device=DEVICE, generator=generator())


def walk(sampler, net, objective, length=L, prompted=True):
    free = torch.rand(4, length, device=DEVICE, generator=generator()) < (0.8 if prompted else 2)
    with torch.no_grad():
        for state in sampler.states(net, objective, Canvas(ids(length), free), generator()):
            assert state.ids.device == state.nfe.device == DEVICE
    assert state.ids.max() < V


def test_the_device_notices():
    x = torch.randn(3, 4, device=DEVICE)
    assert (x * torch.tensor(2.0) + 1).device == DEVICE and isinstance(x.sum().item(), float)
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="two devices"):
        x[torch.arange(2)]
    for bad, device in ((torch.Generator(), DEVICE), (generator(), "cpu")):
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=device, generator=bad)
    x.requires_grad_().square().sum().backward()
    assert torch.equal(x.grad, 2 * x)


LOSSES = {
    "MDLM": MDLM(A),
    "MDLM in steps": MDLM(A, steps=10),
    "D3PM absorbing": D3PM(A, steps=10),
    "D3PM uniform": D3PM(U, steps=10),
    "SEDD absorbing": SEDD(A),
    "SEDD uniform": SEDD(U, schedule=schedules.Geometric()),
    "UDLM": UDLM(U),
    "DUO dense": DUO(U, duality=Duality(V), top_k=None).in_training(0),
    "DUO sparse": DUO(U, duality=Duality(V)).in_training(0),
    "blocks": BlockDiffusion(A, block_size=4, length=L),
    "blocks in training": BlockDiffusion(A, block_size=4, length=L).in_training(0),
    "AR": AR(V, mask_id=V - 1),
}
LOSSES |= {
    f"MDLM {type(s).__name__}": MDLM(A, schedule=s)
    for s in (schedules.Cosine(), schedules.CosineMD4(), schedules.ConstantWeight(), schedules.Linear(), Duality(V))
}


def check_loss(objective, net):
    loss = objective(net, ids(), torch.ones(4, L, dtype=torch.bool, device=DEVICE), generator=generator())
    loss.mean().backward()
    assert loss.per_token.device == DEVICE and loss.mean().isfinite()


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    told = "blocks" not in name and name != "AR"
    check_loss(LOSSES[name], network(causal=name == "AR", time_conditioning=told))


def test_losses_of_other_networks():
    check_loss(MDLM(A), network(DiMamba, DiMambaConfig, time_conditioning=True))
    check_loss(MDLM(A), Conditioned(network(num_classes=3), 1))
    teacher = network(time_conditioning=True)
    distillation = ConsistencyDistillation(U, path=Duality(V, -4.0, -1.0))
    check_loss(distillation.in_training(0, teacher), network(time_conditioning=True))


OBJECTIVES = [MDLM(A), D3PM(A, steps=10), SEDD(A), UDLM(U), D3PM(U, steps=10), SEDD(U, schedule=schedules.Geometric())]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{type(o).__name__}-{type(o.corruption).__name__}")
@pytest.mark.parametrize("sampler", [Ancestral(5), Analytic(5), Euler(5), Psi(5, kappa=remasking.Cap())])
def test_samplers(sampler, objective):
    walk(sampler, network(time_conditioning=True), objective)


REMASKINGS = ["Constant", "Rescale", "ForwardBackward", "Loop", "FlowCorrector", "Phases"]


@pytest.mark.parametrize("name", REMASKINGS)
def test_remaskings(name):
    kappa = getattr(remasking, name)()
    for objective in (MDLM(A), UDLM(U)):
        walk(Psi(5, kappa=kappa), network(time_conditioning=True), objective)


def test_remasking_by_confidence():
    walk(Psi(5, kappa=ByConfidence()), network(), MDLM(A))


@pytest.mark.parametrize("score", [orders.TopProbability(), orders.Margin(), orders.Entropy(), orders.RandomOrder()])
def test_orders(score):
    for quota in (orders.Evenly(), orders.AlongSchedule()):
        walk(orders.Confidence(4, score=score, quota=quota), network(), MDLM(A))
    walk(orders.FirstHitting(), network(), MDLM(A))


@pytest.mark.parametrize("changes", [{}, dict(cached=False), dict(exact=True), dict(ending=Ending(0))], ids=str)
def test_blocks(changes):
    objective = BlockDiffusion(A, block_size=4, length=16)
    walk(Blocks(inner=Ancestral(4), **changes), network(length=16), objective, 24, prompted=False)


def test_windows_and_left_to_right():
    walk(SemiAutoregressive(4, Ancestral(4)), network(), MDLM(A), 20)
    walk(Autoregressive(), network(causal=True), AR(V, mask_id=V - 1, start_id=V - 1), prompted=False)
    walk(Ancestral(4), network(DiMamba, DiMambaConfig), MDLM(A))


@pytest.mark.parametrize("objective", [MDLM(A), UDLM(U)], ids=lambda o: type(o).__name__)
def test_guidance(objective):
    net = network(time_conditioning=True, num_classes=3)
    judge = network(Classifier, ClassifierConfig, num_classes=3, n_blocks=1)
    for guidance in (ClassifierFree(1, 2.0), ExactGuidance(judge, 1, 2.0), FirstOrderGuidance(judge, 1, 2.0)):
        walk(Ancestral(3), *guidance.guide(net, objective))

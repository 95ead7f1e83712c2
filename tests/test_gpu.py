"What only a GPU can show: the same numbers as on the CPU, in float32 and, roughly, in bfloat16; skipped without CUDA"

import copy

import pytest
import torch

from dlm.diffusion.corruption import Absorbing, Uniform
from dlm.diffusion.curriculum import DUO
from dlm.diffusion.duality import Duality
from dlm.diffusion.objectives import AR, MDLM
from dlm.diffusion.uniform import UDLM
from dlm.models.attention import FLASH_INSTALLED, Causal, Flash, Flex, Sdpa, document_mask
from dlm.models.dit import DiT, DiTConfig
from dlm.models.mamba import DiMamba, DiMambaConfig
from dlm.models.selective_scan import MAMBA_INSTALLED, MambaSsm, PlainScan
from dlm.sampling.ancestral import Ancestral, last
from dlm.sampling.canvas import blank

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: these compare one with the CPU")
V, B, L = 50, 4, 128


@pytest.fixture(autouse=True)
def full_float32():
    "Matrix products of float32 in float32, not in TensorFloat"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def ids(high=V - 1):
    return torch.randint(high, (B, L), generator=torch.Generator().manual_seed(0))


def pair(kind=DiT, config=DiTConfig, **changes):
    "A network whose parameters are all alive, and its copy on the GPU"
    torch.manual_seed(0)
    shape = dict(vocab_size=V, hidden_size=128, n_blocks=2, cond_dim=16, length=L, dropout=0.0)
    shape |= dict(n_heads=2) if kind is DiT else {}
    network = kind(config(**shape | changes))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape) * 0.02)
    return network, copy.deepcopy(network).cuda()


def gradients(network):
    return torch.cat([p.grad.flatten().double().cpu() for p in network.parameters() if p.grad is not None])


def close(a, b, tolerance):
    "Relative distance of two tensors, as a whole"
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    assert a.isfinite().all() and (a - b).norm() <= tolerance * b.norm(), (a - b).norm() / b.norm()


KINDS = [
    (DiT, DiTConfig, dict(time_conditioning=True)),
    (DiT, DiTConfig, dict(causal=True)),
    (DiMamba, DiMambaConfig, dict(time_conditioning=True)),
]


@pytest.mark.parametrize("kind, config, changes", KINDS)
def test_float32_is_the_cpu(kind, config, changes):
    near, far = pair(kind, config, **changes)
    sigma = torch.linspace(0.1, 3, B) if near.config.time_conditioning else None
    for network, x, s in ((near, ids(), sigma), (far, ids().cuda(), None if sigma is None else sigma.cuda())):
        network(x, s).log_softmax(-1)[..., 0].mean().backward()
    with torch.no_grad():
        close(far(ids().cuda(), None if sigma is None else sigma.cuda()), near(ids(), sigma), 1e-5)
    close(gradients(far), gradients(near), 1e-4)


@pytest.mark.parametrize("kind, config, changes", KINDS)
def test_bfloat16_is_near_the_cpu(kind, config, changes):
    "8 bits of mantissa, 2**-9 per rounding: a few layers of them stay within 2 %, gradients within 5 %"
    near, far = pair(kind, config, **changes)
    near(ids()).log_softmax(-1)[..., 0].mean().backward()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = far(ids().cuda())
        logits.float().log_softmax(-1)[..., 0].mean().backward()
    assert logits.dtype == torch.bfloat16
    close(logits, near(ids()), 2e-2)
    close(gradients(far), gradients(near), 5e-2)


def qkv(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(2, 2, L, 64, device="cuda", dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
def test_block_mask_is_the_dense_mask(causal):
    documents = torch.arange(L, device="cuda").expand(2, L) // torch.tensor([[40], [64]], device="cuda")
    dense = documents[:, :, None] == documents[:, None, :]
    dense = dense.tril() if causal else dense
    found = []
    for kernel, mask in ((Flex(), document_mask(documents, causal)), (Sdpa(), dense[:, None])):
        inputs = qkv()
        y = kernel(*inputs, mask)
        y.square().sum().backward()
        found.append((y, *(v.grad for v in inputs)))
    for flex, sdpa in zip(*found, strict=True):
        close(flex, sdpa, 5e-3)  # the kernel may multiply in TensorFloat


@pytest.mark.skipif(not FLASH_INSTALLED, reason="flash-attn is not installed")
@pytest.mark.parametrize("mask", [None, Causal()])
def test_flash_is_sdpa(mask):
    inputs = qkv(torch.bfloat16)
    exact = Sdpa()(*(v.float() for v in inputs), mask)
    close(Flash()(*inputs, mask), exact, 1e-2)
    close(Sdpa()(*inputs, mask), exact, 1e-2)


OBJECTIVES = [
    MDLM(Absorbing(V - 1, V)),
    UDLM(Uniform(V)),
    AR(V, mask_id=V - 1),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_losses_are_those_of_the_cpu(objective):
    near, far = pair(causal=objective.causal, time_conditioning=objective.needs_time)
    corrupt = {} if objective.causal else {"t": torch.linspace(0.1, 0.9, B, dtype=torch.float64)}
    if corrupt:
        z = objective.corruption.corrupt(ids(), objective.schedule.alpha(corrupt["t"])[:, None])
        fixed = type("Fixed", (type(objective.corruption),), {"corrupt": lambda self, x, *a: z.to(x.device)})
        fields = {k: v for k, v in vars(objective.corruption).items()}
        objective = type(objective)(fixed(**fields))
    for network, x in ((near, ids()), (far, ids().cuda())):
        loss = objective(network, x, **corrupt).mean()
        loss.backward()
        network.loss = loss.detach()
    close(far.loss, near.loss, 1e-5)
    close(gradients(far), gradients(near), 1e-4)


@pytest.mark.parametrize("top_k", [2, None])
def test_curriculum_learns_on_the_device(top_k):
    _, far = pair(time_conditioning=True)
    g = torch.Generator("cuda").manual_seed(0)
    objective = DUO(Uniform(V), duality=Duality(V), top_k=top_k).in_training(0)
    text = (torch.arange(L) % 5).expand(B, L).cuda()
    optimizer, losses = torch.optim.AdamW(far.parameters(), lr=3e-3), []
    for _ in range(30):
        loss = objective(far, text, generator=g).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=lambda o: type(o).__name__)
def test_samples_repeat_and_stay_on_the_device(objective):
    _, far = pair(time_conditioning=objective.needs_time)
    canvas, found = blank(B, L).to("cuda"), []
    for _ in range(2):
        g = torch.Generator("cuda").manual_seed(3)
        state = last(Ancestral(20).states(far.train(False), objective, canvas, g))
        found.append(state.ids)
    assert found[0].is_cuda and torch.equal(*found)
    assert found[0].max() < V and (not hasattr(objective.corruption, "mask_id") or found[0].max() < V - 1)


def scan_input(dtype=torch.float32, device="cuda"):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    x, step, B_, C = (draw(2, L, n).to(device, dtype) for n in (64, 64, 16, 16))
    A, D, bias = -torch.exp(draw(64, 16) / 2).to(device), draw(64).to(device), draw(64).to(device)
    return [v.requires_grad_() for v in (x, step, A, B_, C, D, bias)]


def test_plain_scan_is_that_of_the_cpu():
    found = []
    for device in ("cpu", "cuda"):
        inputs = scan_input(device=device)
        y = PlainScan()(*inputs)
        y.square().mean().backward()
        found.append((y, *(v.grad for v in inputs)))
    for near, far in zip(*found, strict=True):
        close(far, near, 1e-4)


@pytest.mark.skipif(not MAMBA_INSTALLED, reason="mamba-ssm is not installed")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_package_scans_the_same(dtype, tolerance):
    found = []
    for kernel in (PlainScan(), MambaSsm()):
        inputs = scan_input(dtype)
        y = kernel(*inputs)
        y.float().square().mean().backward()
        found.append((y, *(v.grad for v in inputs)))
    for plain, package in zip(*found, strict=True):
        close(package, plain, tolerance)


def test_compiled_network_is_the_eager_one():
    _, far = pair(time_conditioning=True)
    sigma, asked = torch.linspace(0.1, 3, B).cuda(), torch.rand(B, L, device="cuda") < 0.3
    eager = far.hidden(ids().cuda(), sigma, positions=asked)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(far.hidden, fullgraph=False)
        close(compiled(ids().cuda(), sigma, positions=asked), eager, 1e-4)
        some = torch.rand(B, L, device="cuda") < 0.7
        close(compiled(ids().cuda(), sigma, positions=some), far.hidden(ids().cuda(), sigma, positions=some), 1e-4)

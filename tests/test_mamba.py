"DiMamba: the scan against its recurrence, both directions, names and sizes of the published layout, training"

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

from dlm.data.packing import Packing
from dlm.data.text import corpus_alphabet, tiny_shakespeare
from dlm.data.tokenizers import character_tokenizer, mask_id_and_size
from dlm.diffusion.corruption import Absorbing
from dlm.diffusion.objectives import AR, MDLM
from dlm.foundations.configuration import build, describe
from dlm.models import selective_scan as scans
from dlm.models.attention import Causal, KVCache
from dlm.models.mamba import DiMamba, DiMambaConfig, Reader, mamba_name
from dlm.models.selective_scan import MambaSsm, PiecewiseScan, PlainScan, scan_for, selective_scan
from dlm.sampling.ancestral import Ancestral
from dlm.sampling.canvas import blank
from dlm.training.run import Run, check_fit, load_trained, perform, write_run
from dlm.training.settings import TrainingConfig

SHAPE = dict(hidden_size=24, n_blocks=3, cond_dim=8, length=20, dropout=0.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def config(**changes):
    return DiMambaConfig(**dict(vocab_size=13) | SHAPE | changes)


def network(seed=0, **changes):
    "A small network whose modulations are not zero, in float64"
    torch.manual_seed(seed)
    model = DiMamba(config(**changes)).double().train(False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator(seed)) * 0.1)
    return model


def tokens(*shape, high=13, seed=1):
    return torch.randint(high, shape, generator=generator(seed))


# ---------------------------------------------------------------------------------------------------------- the scan


def problem(L=29, B=3, D=5, N=4, dtype=torch.float64, scale=1.0):
    "Input of `selective_scan`, batch first, steps before bias and softplus"
    g = generator()
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    rates = -torch.exp(draw(D, N))
    return [draw(B, L, D), scale * draw(B, L, D), rates, draw(B, L, N), draw(B, L, N), draw(D), draw(D)]


def recurrence(x, step, A, B, C, D, bias):
    "Gu and Dao (2023), algorithm 2, token by token and channel by channel"
    step = F.softplus(step + bias)
    h, y = torch.zeros(x.shape[0], *A.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = torch.exp(step[:, t, :, None] * A) * h + torch.einsum("bd,bn->bdn", step[:, t] * x[:, t], B[:, t])
        y.append(torch.einsum("bdn,bn->bd", h, C[:, t]) + D * x[:, t])
    return torch.stack(y, 1)


@pytest.mark.parametrize("cells", [1, 200, 2**19])  # pieces of 1 and of 3 tokens, and the whole text
@pytest.mark.parametrize("length", [1, 2, 29])
def test_scan_is_the_recurrence(cells, length):
    inputs = [v.requires_grad_() for v in problem(length)]
    y, expected = PlainScan(cells)(*inputs), recurrence(*inputs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn(y.shape, generator=generator(2), dtype=y.dtype)
    ours, theirs = (torch.autograd.grad((v * dy).sum(), inputs) for v in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradients_of_the_scan_are_finite_differences():
    x, step, A, B, C, *_ = problem(5, 1, 2, 3)
    inputs = [v.transpose(0, 1).contiguous().requires_grad_() for v in (x, F.softplus(step))]
    inputs += [A.requires_grad_()] + [v.transpose(0, 1).contiguous().requires_grad_() for v in (B, C)]
    assert torch.autograd.gradcheck(lambda *v: PiecewiseScan.apply(*v, 2), inputs)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_scan_in_float32_stays_close_for_steps_of_any_size(scale):
    inputs = problem(300, 2, 4, 16, scale=scale)
    single = [v.float().requires_grad_() for v in inputs]
    y, expected = PlainScan()(*single), recurrence(*inputs)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    y.square().mean().backward()
    assert all(v.grad.isfinite().all() for v in single)


def test_half_precision_and_autocast_scan_in_float32():
    inputs = problem(40, 2, 4, 16, dtype=torch.float32)
    half = [v.bfloat16() if i in (0, 1, 3, 4) else v for i, v in enumerate(inputs)]
    exact = PlainScan()(*(v.float() for v in half))
    y = PlainScan()(*half)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=1e-2, atol=1e-2)
    leaves = [v.clone().requires_grad_() for v in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = PlainScan()(*leaves)
        mixed.square().sum().backward()
    torch.testing.assert_close(mixed, PlainScan()(*inputs), rtol=0, atol=0)
    again = [v.clone().requires_grad_() for v in inputs]
    PlainScan()(*again).square().sum().backward()
    for a, b in zip(leaves, again, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


def test_scan_keeps_one_state_per_piece():
    L, B, D, N = 256, 2, 8, 16
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: (kept.append(v), v)[1], lambda v: v):
        y = PlainScan(cells=16 * B * D * N)(*(v.requires_grad_() for v in problem(L, B, D, N, torch.float32)))
    y.sum().backward()
    states = [v for v in kept if v.shape[-2:] == (D, N) and v.ndim == 3]
    assert len(states) == L // 16 and all(v.numel() < L * B * D * N for v in kept)


def test_missing_package_is_named_and_never_imported(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mamba_ssm", None)
    monkeypatch.setitem(__import__("sys").modules, "mamba_ssm.ops.selective_scan_interface", None)
    with pytest.raises(ImportError, match=r"pip install 'dlm\[mamba\]'"):
        MambaSsm()
    monkeypatch.setattr(scans, "MAMBA_INSTALLED", True)
    assert isinstance(scan_for(torch.zeros(1, 2, 3)), PlainScan)


def test_the_package_is_called_as_its_kernel_wants_it(monkeypatch):
    "A stand-in with the package's interface: channels before tokens, softplus and bias inside, parameters in float32"

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert all(v.is_contiguous() and v.dtype == u.dtype for v in (u, delta, B, C)) and delta_softplus
        assert A.dtype == D.dtype == delta_bias.dtype == torch.float32 and z is None
        back = [v.transpose(1, 2) for v in (u, delta, B, C)]
        return recurrence(back[0], back[1], A, back[2], back[3], D, delta_bias).transpose(1, 2)

    kernel = object.__new__(MambaSsm)
    kernel.kernel = selective_scan_fn
    inputs = problem(dtype=torch.float32)
    with pytest.raises(ValueError, match="needs CUDA, not cpu"):
        selective_scan(*inputs, kernel=kernel)
    monkeypatch.setattr(MambaSsm, "takes", staticmethod(lambda x: True))
    torch.testing.assert_close(selective_scan(*inputs, kernel=kernel), PlainScan()(*inputs), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- the network


def published_layer(reader, in_proj, out_proj, h):
    "One whole Mamba-1 layer, in plain operations"
    x, z = (h @ in_proj.weight.T).chunk(2, -1)
    w, L = reader.conv1d.weight[:, 0], x.shape[1]
    padded = F.pad(x, (0, 0, w.shape[1] - 1, 0))
    x = F.silu(sum(padded[:, k : k + L] * w[:, k] for k in range(w.shape[1])) + reader.conv1d.bias)
    rank = math.ceil(h.shape[-1] / 16)
    step, B, C = (x @ reader.x_proj.weight.T).split((rank, 16, 16), -1)
    y = recurrence(x, step @ reader.dt_proj.weight.T, -torch.exp(reader.A_log), B, C, reader.D, reader.dt_proj.bias)
    return (y * F.silu(z)) @ out_proj.weight.T


@torch.no_grad()
def test_network_is_the_published_formula():
    model, ids, sigma = network(time_conditioning=True, num_classes=3), tokens(2, 20), torch.tensor([0.3, 2.0]).double()
    c = F.silu(model.sigma_map(sigma)) + F.silu(model.cond_map.embedding_table.weight[[2, 0]])
    norm = lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w  # noqa: E731
    x = model.vocab_embed.embedding[ids]
    for layer in model.layers:
        shift, scale, gate = layer.adaLN_modulation(c)[:, None].chunk(3, -1)
        h, mixer = norm(x, layer.norm.weight) * (1 + scale) + shift, layer.mixer
        forward = published_layer(mixer.mamba_fwd, mixer.in_proj, mixer.out_proj, h)
        reverse = published_layer(mixer.mamba_rev, mixer.in_proj, mixer.out_proj, h.flip(1)).flip(1)
        x = x + gate * (forward + reverse)
    shift, scale = model.adaLN_modulation_final(c)[:, None].chunk(2, -1)
    expected = (norm(x, model.norm_f.weight) * (1 + scale) + shift) @ model.head.weight.T
    label = torch.tensor([2, 0])
    # A_log passes float32, as in the original
    torch.testing.assert_close(model.head(model.hidden(ids, sigma, label=label)), expected, rtol=1e-5, atol=1e-5)
    other = model.head(model.hidden(ids, sigma + 0.5, label=label))
    assert (other - expected).abs().max() > 1e-3


@torch.no_grad()
def test_every_position_sees_both_sides():
    model, ids = network(), tokens(1, 20)
    before = model.hidden(ids)
    for place in (0, 9, 19):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 13
        assert (model.hidden(other) - before).abs().amax(-1).min() > 1e-9, "a position that does not notice"


@torch.no_grad()
def test_exchanged_directions_read_backwards():
    model, ids = network(), tokens(2, 20)
    swap = {"mamba_fwd": "mamba_rev", "mamba_rev": "mamba_fwd"}
    state = {".".join(swap.get(p, p) for p in n.split(".")): v for n, v in model.state_dict().items()}
    mirrored = network(seed=5)
    mirrored.load_state_dict(state)
    torch.testing.assert_close(mirrored.hidden(ids.flip(1)).flip(1), model.hidden(ids), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model.hidden(ids.flip(1)).flip(1), model.hidden(ids))


@torch.no_grad()
def test_positions_are_rows_of_the_whole():
    model, ids = network(time_conditioning=True), tokens(3, 20)
    asked = torch.rand(3, 20, generator=generator()) < 0.3
    sigma = torch.tensor([0.1, 1.0, 3.0]).double()
    whole = model.hidden(ids, sigma)
    torch.testing.assert_close(model.hidden(ids, sigma, positions=asked), whole[asked], rtol=1e-9, atol=1e-9)
    weights = F.one_hot(ids, 13).double()
    torch.testing.assert_close(
        model.hidden(model.vocab_embed.mix(weights).double(), sigma), whole, rtol=1e-5, atol=1e-5
    )


def test_checkpointed_gradients_are_the_same():
    model, ids = network().train(), tokens(2, 20)
    grads = []
    for on in (False, True):
        model.zero_grad()
        if on:
            model.gradient_checkpointing_enable()
        model(ids).square().mean().backward()
        grads.append([p.grad.clone() for n, p in model.named_parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_new_networks_start_as_published():
    torch.manual_seed(0)
    model = DiMamba(config(hidden_size=64, n_blocks=4, vocab_size=500))
    reader, mixer = model.layers[1].mixer.mamba_rev, model.layers[1].mixer
    torch.testing.assert_close(reader.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    steps = F.softplus(reader.dt_proj.bias)
    assert reader.D.eq(1).all() and 0.9e-3 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.101
    assert abs(model.vocab_embed.embedding.std() - 0.02) < 1e-3
    assert 0.9 < mixer.out_proj.weight.abs().max() * math.sqrt(128 * 4) <= 1
    assert 0.9 < reader.dt_proj.weight.abs().max() * math.sqrt(4) <= 1
    zero = [model.adaLN_modulation_final, *(layer.adaLN_modulation for layer in model.layers)]
    assert all(p.eq(0).all() for linear in zero for p in linear.parameters())
    ids = tokens(2, 20, high=500)
    x = model.vocab_embed(ids)
    torch.testing.assert_close(model.hidden(ids), F.rms_norm(x, (64,), eps=1e-5))


# ------------------------------------------------------------------------------------------- names, sizes, save and load


def published_shapes(V, d, layers, c):
    "Keys and shapes of a published state dict"
    R, inner, found = math.ceil(d / 16), 2 * d, {}
    for n, shape in {"0.weight": (c, 256), "0.bias": (c,), "2.weight": (c, c), "2.bias": (c,)}.items():
        found[f"backbone.sigma_map.mlp.{n}"] = shape
    top = "backbone.model.bimamba.backbone."
    found[f"{top}embeddings.word_embeddings.weight"] = (V, d)
    for i in range(layers):
        for direction in ("fwd", "rev"):
            own = {"in_proj.weight": (4 * d, d), "conv1d.weight": (inner, 1, 4), "conv1d.bias": (inner,)}
            own |= {"x_proj.weight": (R + 32, inner), "dt_proj.weight": (inner, R), "dt_proj.bias": (inner,)}
            own |= {"A_log": (inner, 16), "D": (inner,), "out_proj.weight": (d, inner)}
            found |= {f"{top}layers.{i}.mixer.mamba_{direction}.{n}": shape for n, shape in own.items()}
        found[f"{top}layers.{i}.norm.weight"] = (d,)
        found[f"{top}layers.{i}.adaLN_modulation.weight"] = (3 * d, c)
        found[f"{top}layers.{i}.adaLN_modulation.bias"] = (3 * d,)
    found[f"{top}adaLN_modulation_final.weight"], found[f"{top}adaLN_modulation_final.bias"] = (2 * d, c), (2 * d,)
    return found | {f"{top}norm_f.weight": (d,), "backbone.model.lm_head.weight": (V, d)}


@pytest.mark.parametrize("shape", [(50258, 512, 14, 128), (13, 24, 3, 8)])
def test_names_and_sizes_are_the_published_ones(shape):
    V, d, n, c = shape
    with torch.device("meta"):
        model = DiMamba(DiMambaConfig.tiny(vocab_size=V, hidden_size=d, n_blocks=n, cond_dim=c))
    mapped = {}
    for name, size in published_shapes(*shape).items():
        assert mapped.setdefault(mamba_name(name), size) == size
    assert mapped == {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert model.num_parameters() == sum(math.prod(size) for size in mapped.values())
    assert shape[0] == 13 or model.num_parameters() == 79_859_456


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path):
    model, ids = network(num_classes=2, time_conditioning=True, length=32).float(), tokens(2, 20)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is DiMamba and loaded.config.length == 32 and loaded.config.time_conditioning
    sigma, label = torch.tensor([0.2, 1.0]), torch.tensor([0, 1])
    assert torch.equal(loaded.hidden(ids, sigma, label=label), model.hidden(ids, sigma, label=label))
    assert vars(build(describe(model.config))).items() >= SHAPE.items() - {("length", 20)}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, ids: m.hidden(ids, cache=KVCache(20)), "cache for a DiMamba, which reads both directions"),
        (lambda m, ids: m.hidden(ids, attention=Causal()), "attention mask for a DiMamba"),
        (lambda m, ids: m.hidden(ids, places=torch.arange(20)), "places for a DiMamba"),
        (lambda m, ids: m.hidden(ids, label=torch.zeros(2).long()), "knows no classes"),
        (lambda m, ids: m.hidden(ids, torch.zeros(3)), "batch of 2: pass one noise level each"),
        (lambda m, ids: m.hidden(ids.repeat(1, 2)), "40 tokens for a network of length 20"),
        (lambda m, ids: m.hidden(ids + 13), "known are 0 to 12"),
        (lambda m, ids: config(causal=True), "causal=True, but a DiMamba reads both directions"),
        (lambda m, ids: config(n_heads=4), "n_heads=4, but a DiMamba has no attention"),
        (lambda m, ids: config(vocab_size=1), "vocab_size=1"),
    ],
)
def test_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(network(), tokens(2, 20))
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------- training and sampling


def test_the_masked_loss_falls_and_samples_follow_the_text():
    torch.manual_seed(0)
    model, text = DiMamba(config(vocab_size=6)), (torch.arange(20) % 5).expand(16, 20)
    objective, g = MDLM(Absorbing(5, 6)), generator()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for _ in range(60):
        loss = objective(model, text, generator=g).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 1.2 and sum(losses[-10:]) / 10 < 0.7 * losses[0]
    *_, last = Ancestral(20).states(model.train(False), objective, blank(8, 20), g)
    follows = (last.ids[:, 1:] - last.ids[:, :-1]) % 5 == 1
    assert last.ids.max() < 5 and follows.float().mean() > 0.5  # a fifth by chance


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "cache"))
    mask_id, size = mask_id_and_size(character_tokenizer(corpus_alphabet(tiny_shakespeare())))
    numbers = dict(steps=4, batch_size=8, lr=1e-3, warmup_steps=2, precision="fp32", eval_every=2, save_every=2)
    return Run(
        MDLM(Absorbing(mask_id, size)),
        config(vocab_size=size),
        tiny_shakespeare(held_out=0.002),
        Packing(20),
        TrainingConfig(log_every=1, progress=False, **numbers),
    )


def test_a_run_is_written_trained_and_loaded(run, tmp_path):
    tokenizer = character_tokenizer(corpus_alphabet(tiny_shakespeare()))
    write_run(run, tokenizer, tmp_path / "run")
    assert perform(tmp_path / "run").state.global_step == 4
    loaded, objective, _ = load_trained(tmp_path / "run")
    assert type(loaded) is DiMamba and objective == run.objective
    with pytest.raises(ValueError, match="objective causal True and network causal False"):
        check_fit(replace(run, objective=AR(run.network.vocab_size)), tokenizer)


def test_a_reader_is_causal():
    torch.manual_seed(0)
    reader, x = Reader(config()), torch.randn(1, 12, 48, generator=generator())
    reader.reset_parameters()
    assert torch.autograd.functional.jacobian(lambda v: reader(v)[0, 5].sum(), x)[0, 6:].abs().max() == 0

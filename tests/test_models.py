"The networks of `dlm.models`: golden numbers, sizes, caches, masks, and what they refuse"

import json
import math
import subprocess
import sys

import pytest
import torch
from golden import FOLDER, case
from torch.nn.functional import log_softmax

from dlm.models.attention import Causal, Flash, Flex, KVCache, Sdpa, attend, document_mask, kernel_for, rotary, rotate
from dlm.models.dit import DiT, DiTConfig


def network(seed=0, **changes):
    "A small network whose modulations and head are not zero"
    config = DiTConfig(**dict(vocab_size=13, hidden_size=32, n_blocks=3, n_heads=4, cond_dim=16, length=24) | changes)
    model, generator = DiT(config).train(False), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.15)
    return model


def tokens(*shape, high=13, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def weights(golden):
    "The recorded state dict without the rotary buffer, which is computed here"
    return {n: golden[f"weights.{n}"] for n in golden.names("weights.") if n != "rotary_emb.inv_freq"}


def from_golden(golden, vocab_size, **changes):
    "The network of a golden case with its weights, names and shapes verified"
    shape = {
        k: golden.config[k] for k in ("hidden_size", "n_blocks", "n_heads", "cond_dim", "length") if k in golden.config
    }
    model = DiT(DiTConfig(vocab_size=vocab_size, **shape, **changes)).train(False)
    model.load_state_dict(weights(golden), strict=True)
    return model


def outputs_of(modules):
    "What each module returns on the next call, by name"
    seen = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out))
    return seen


@torch.no_grad()
def test_golden_mdlm_dit():
    golden = case("mdlm_dit")
    model = from_golden(golden, golden.config["vocab_size_with_mask"], time_conditioning=True)
    seen = outputs_of(
        {
            "sigma_embedding": model.sigma_map,
            "after_embedding": model.vocab_embed,
            "after_block0": model.blocks[0],
            "after_last_block": model.blocks[-1],
        }
    )
    golden.compare(model(golden["input_ids"], golden["sigma"]), "logits")
    for name, value in seen.items():
        golden.compare(value, name)
    golden.compare(model(golden["input_ids"]), "logits_no_time_conditioning")
    deaf = from_golden(golden, golden.config["vocab_size_with_mask"], time_conditioning=False)
    golden.compare(deaf(golden["input_ids"], golden["sigma"]), "logits_no_time_conditioning")


@torch.no_grad()
@pytest.mark.parametrize("name, output", [("ar_dit_mdlm", "raw_logits"), ("ar_dit_duo", "logits")])
def test_golden_ar_dit(name, output):
    golden = case(name)
    model = from_golden(golden, golden.config["vocab_size_with_mask"], causal=True)
    golden.compare(model(golden["input_ids"][:, :-1]), output)


@torch.no_grad()
def test_golden_duo_dit():
    golden = case("duo_dit")
    model = from_golden(golden, golden.config["vocab_size"], time_conditioning=True)
    golden.compare(model(golden["input_ids"], golden["sigma"]), "logits")
    table = model.vocab_embed.embedding
    mixed = golden["soft_input_logits"].softmax(-1) @ table
    golden.compare(model(mixed, golden["sigma"]), "logits_soft")
    nearest = (golden["topk_weights"][..., None] * table[golden["topk_ids"]]).sum(-2)
    golden.compare(model(nearest, golden["sigma"]), "logits_topk")


@torch.no_grad()
@pytest.mark.parametrize("name", ["sedd_dit_absorb", "sedd_dit_uniform"])
def test_golden_sedd_dit(name):
    golden = case(name)
    table = golden["weights.vocab_embed.embedding"]
    model = from_golden(golden, len(table), time_conditioning=True)
    ids, sigma = golden["input_ids"], golden["sigma"]
    score = model(ids, sigma)
    if golden.config["scale_by_sigma"]:
        score = score - torch.log(torch.expm1(sigma) * (len(table) - 1))[:, None, None]
    golden.compare(score.scatter(-1, ids[..., None], 0.0), "log_score")


def released_shapes():
    "Names and shapes of published networks, without the rotary buffers, which are computed here"
    path = FOLDER / "mdlm_owt_hf_shapes.json"
    if not path.exists():
        pytest.skip(f"golden data not found in {FOLDER.name}/: set DLM_GOLDEN to the folder that holds it")
    info = json.loads(path.read_text())
    diffusion = {n: t["shape"] for n, t in info["tensors"].items() if n not in info["buffers"]}
    causal = {n: shape for n, shape in info["ar_small"]["tensors"].items() if n not in info["buffers"]}
    return info, diffusion, causal


@pytest.mark.parametrize("causal", [False, True])
def test_golden_shapes_of_released_networks(causal):
    info, *published = released_shapes()
    config = {k: info["config"][k] for k in ("vocab_size", "cond_dim", "n_blocks", "n_heads", "dropout")}
    config |= dict(hidden_size=info["config"]["hidden_dim"], length=info["config"]["model_length"], causal=causal)
    with torch.device("meta"):
        model = DiT(DiTConfig(**config))
    assert {f"backbone.{n}": list(p.shape) for n, p in model.state_dict().items()} == published[causal]
    if not causal:
        # the moving averages in published checkpoints are a list without names, in this order
        assert [f"backbone.{n}" for n, _ in model.named_parameters()] == info["parameters"]
        assert model.num_parameters() == info["n_parameters"]


COUNTS = {  # parameters of published networks, without and with a vocabulary
    "small, GPT-2": (DiTConfig.small, dict(), 169_627_218),
    "small, BERT": (DiTConfig.small, dict(vocab_size=30522), 139_292_986),
    "small, 35 symbols": (DiTConfig.small, dict(vocab_size=35), 92_434_467),
    "medium, GPT-2": (DiTConfig.medium, dict(), 424_477_010),
    "tiny of MDLM, GPT-2": (DiTConfig.tiny, dict(hidden_size=512), 80_061_266),
    "tiny, GPT-2": (DiTConfig.tiny, dict(), 33_789_010),
    "small causal, GPT-2": (DiTConfig.small, dict(causal=True), 162_246_482),
    "small causal, BERT": (DiTConfig.small, dict(causal=True, vocab_size=30522), 131_912_250),
}


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_parameters(name):
    size, changes, expected = COUNTS[name]
    with torch.device("meta"):
        assert DiT(size(**changes)).num_parameters() == expected


@pytest.mark.parametrize("causal", [False, True])
def test_starts_with_the_loss_of_a_guess(causal):
    torch.manual_seed(3)
    model = DiT(DiTConfig(vocab_size=13, hidden_size=32, n_blocks=2, n_heads=4, causal=causal))
    assert model(tokens(2, 9)).abs().max() == 0
    zero = {n for n, p in model.named_parameters() if p.abs().max() == 0 and not n.endswith("norm.bias")}
    assert zero == {n for n, _ in model.named_parameters() if "adaLN" in n or n.startswith("output_layer.linear")}
    bound = 1 / math.sqrt(32)
    assert 0.9 * bound < model.vocab_embed.embedding.abs().max() <= bound
    subs = model(tokens(2, 9))[..., :12]
    assert -log_softmax(subs, -1)[0, 0, 0].item() == pytest.approx(math.log(12))


def test_full_network_starts_as_the_identity():
    model, ids = DiT(DiTConfig(vocab_size=13, hidden_size=32, n_blocks=2, n_heads=4)).train(False), tokens(2, 9)
    seen = outputs_of({"last": model.blocks[-1]})
    model(ids)
    assert torch.equal(seen["last"], model.vocab_embed(ids))


# ---- rotary positions ----


def test_rotary_angles_by_hand():
    cos, sin = rotary(torch.tensor([0, 3]), head_dim=4)
    assert cos[0].tolist() == [1, 1] and sin[0].tolist() == [0, 0]
    assert cos[1].tolist() == pytest.approx([math.cos(3), math.cos(0.03)])
    turned = rotate(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), rotary(torch.tensor([3]), 4))[0].tolist()
    c, s, d, t = math.cos(3), math.sin(3), math.cos(0.03), math.sin(0.03)
    assert turned == pytest.approx([c - 3 * s, 2 * d - 4 * t, 3 * c + s, 4 * d + 2 * t])


def test_rotary_knows_only_the_distance():
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    at = lambda x, m: rotate(x, rotary(torch.tensor([m]), 16))  # noqa: E731
    torch.testing.assert_close(at(q, 5) @ at(k, 12).T, at(q, 205) @ at(k, 212).T, rtol=1e-3, atol=1e-3)


def test_rotary_takes_positions_of_each_row():
    positions, x = torch.tensor([[0, 1, 2], [5, 6, 7]]), torch.randn(2, 4, 3, 8)
    both = rotate(x, rotary(positions, 8))
    for row in (0, 1):
        torch.testing.assert_close(both[row], rotate(x[row], rotary(positions[row], 8)))


# ---- masks and kernels ----


def qkv(n=6, m=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 3, length, 8, generator=g) for length in (n, m, m))


def by_formula(q, k, v, visible):
    "Attention written out"
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("n, m", [(6, 6), (1, 6), (3, 6)])
def test_causal_queries_are_the_last_keys(n, m):
    q, k, v = qkv(n, m)
    visible = torch.tensor([[j <= i + m - n for j in range(m)] for i in range(n)])
    torch.testing.assert_close(attend(q, k, v, Causal()), by_formula(q, k, v, visible))
    torch.testing.assert_close(attend(q, k, v, visible), by_formula(q, k, v, visible))


def test_full_attention_is_the_formula():
    q, k, v = qkv(4, 9)
    torch.testing.assert_close(attend(q, k, v), by_formula(q, k, v, torch.tensor(True)))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
def test_document_mask_separates_documents(causal):
    from torch.nn.attention.flex_attention import flex_attention

    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [4, 4, 4, 4, 7, 7]])
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = document_mask(documents, causal=causal)
    visible = (documents[:, None, :, None] == documents[:, None, None, :]) & (Causal().dense(6, 6) | (not causal))
    ours = attend(q, k, v, mask)
    torch.testing.assert_close(ours, by_formula(q, k, v, visible))
    ours.sum().backward()
    assert q.grad.isfinite().all() and q.grad.abs().max() > 0
    with torch.no_grad():
        flex = flex_attention(*(x.detach() for x in (q, k, v)), block_mask=mask)
    torch.testing.assert_close(ours, flex)


def test_packed_documents_equal_separate_ones():
    model, ids = network(time_conditioning=False), tokens(1, 12)
    # equal lengths: rotary positions only see distances, so a shifted document gives the same numbers
    packed = model(ids, attention=document_mask(torch.tensor([[0] * 5 + [1] * 7])))
    torch.testing.assert_close(packed[:, :5], model(ids[:, :5]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[:, 5:], model(ids[:, 5:]), rtol=1e-4, atol=1e-4)


def test_kernel_is_chosen_by_mask():
    q = torch.zeros(1, 1, 2, 8)
    chosen = [kernel_for(q, m) for m in (None, Causal(), torch.ones(2, 2) > 0, document_mask(torch.zeros(1, 2)))]
    assert [type(c) for c in chosen] == [Sdpa, Sdpa, Sdpa, Flex]


def test_missing_flash_attention_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match=r"pip install 'dlm\[gpu\]'") as error:
        Flash()
    assert "\n" not in str(error.value)


def test_masks_of_numbers_are_refused():
    with pytest.raises(TypeError, match="boolean"):
        attend(*qkv(), torch.ones(6, 6))


def test_attention_loads_without_transformers():
    code = "import sys, dlm.models.attention; print([m for m in ('transformers', 'flash_attn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---- cache ----


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[24], [1] * 24, [5, 1, 17, 1], [23, 1]])
def test_cached_logits_equal_uncached(sizes):
    model, ids = network(causal=True), tokens(3, 24)
    cache = KVCache(24)
    pieces = [model(piece, cache=cache) for piece in ids.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), rtol=1e-4, atol=1e-4)
    assert cache.length == 24


def test_cache_refuses_what_does_not_fit():
    cache, model = KVCache(4), network(causal=True)
    model(tokens(1, 3), cache=cache)
    with pytest.raises(ValueError, match="5 tokens do not fit a KVCache.4."):
        model(tokens(1, 2), cache=cache)
    assert cache.length == 3


# ---- the network ----


@torch.no_grad()
@pytest.mark.parametrize("changes", [dict(), dict(time_conditioning=True), dict(causal=True)])
def test_positions_give_the_rows_of_the_full_result(changes):
    model, ids, sigma = network(**changes), tokens(3, 10), torch.tensor([0.1, 1.0, 3.0])
    positions = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) < 0.3
    assert 0 < positions.sum() < 30
    whole, some = model.hidden(ids, sigma), model.hidden(ids, sigma, positions=positions)
    torch.testing.assert_close(some, whole[positions], rtol=1e-4, atol=1e-4)
    assert model.hidden(ids, sigma, positions=torch.zeros_like(positions)).shape == (0, 32)


@torch.no_grad()
def test_noise_level_matters_only_with_time_conditioning():
    ids, low, high = tokens(2, 6), torch.full((2,), 0.1), torch.full((2,), 5.0)
    told, deaf = network(time_conditioning=True), network()
    assert (told(ids, low) - told(ids, high)).abs().max() > 1e-3
    assert torch.equal(deaf(ids, low), deaf(ids, high)) and torch.equal(deaf(ids), deaf(ids, low))
    torch.testing.assert_close(told(ids, torch.zeros(2)), told(ids))
    each = torch.cat([told(ids[i : i + 1], s[None]) for i, s in enumerate(torch.tensor([0.1, 5.0]))])
    torch.testing.assert_close(told(ids, torch.tensor([0.1, 5.0])), each, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_embeddings_stand_for_ids():
    model, ids = network(), tokens(2, 6)
    assert torch.equal(model(ids), model(model.vocab_embed.embedding[ids]))


@torch.no_grad()
def test_head_is_a_linear_layer_for_any_leading_shape():
    model, ids = network(), tokens(2, 6)
    hidden = model.hidden(ids)
    logits = hidden @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(ids), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.head(hidden[0, 3]), logits[0, 3], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_causal_network_does_not_look_ahead():
    ids, changed = tokens(1, 12), tokens(1, 12)
    changed[0, 6] = (changed[0, 6] + 1) % 13
    causal, full = (network(causal=c) for c in (True, False))
    assert torch.equal(causal(ids)[:, :6], causal(changed)[:, :6])
    assert ((full(ids) - full(changed)).abs().amax(-1) > 1e-5).all()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = network(dropout=0.0).train(), tokens(2, 8)

    def gradients():
        model.zero_grad()
        model(ids, torch.ones(2)).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert all(block.gradient_checkpointing for block in model.blocks)
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, plain[name])


@pytest.mark.parametrize("changes", [dict(), dict(time_conditioning=True), dict(causal=True)])
def test_compiles_into_one_graph(changes):
    torch._dynamo.reset()
    model, ids = network(dropout=0.0, **changes).train(), tokens(2, 8)
    compiled = torch.compile(model.hidden, backend="eager", fullgraph=True)
    sigma = torch.tensor([0.5, 1.5])
    torch.testing.assert_close(compiled(ids, sigma), model.hidden(ids, sigma))


@torch.no_grad()
def test_autocast_keeps_the_stream_in_float32():
    model, ids, sigma = network(time_conditioning=True), tokens(2, 8), torch.tensor([0.5, 1.5])
    seen = outputs_of({"block": model.blocks[0], "sigma": model.sigma_map, "qkv": model.blocks[0].attn_qkv})
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids, sigma)
    assert (seen["block"].dtype, seen["sigma"].dtype, seen["qkv"].dtype) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )
    full = model(ids, sigma)
    assert half.dtype == torch.bfloat16 and not torch.equal(half.float(), full)
    assert (half.float() - full).norm() < 0.02 * full.norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_whole_network_in_another_dtype(dtype):
    model, ids = network(time_conditioning=True), tokens(2, 8)
    expected = model(ids, torch.ones(2))
    other = model.to(dtype)(ids, torch.ones(2))
    assert other.dtype == dtype
    assert (other.float() - expected).norm() < (0.03 if dtype == torch.bfloat16 else 1e-5) * expected.norm()


FIELDS = "vocab_size hidden_size n_blocks n_heads cond_dim length dropout causal time_conditioning".split()


@pytest.mark.parametrize("changes", [dict(), dict(time_conditioning=True), dict(causal=True)])
def test_saved_and_loaded(tmp_path, changes):
    model, ids = network(**changes), tokens(2, 6)
    model.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert again.state_dict().keys() == model.state_dict().keys() and not again.training
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert all(getattr(again.config, k) == getattr(model.config, k) for k in FIELDS)
    torch.testing.assert_close(again(ids, torch.ones(2)), model(ids, torch.ones(2)))


def test_every_field_of_the_shape_is_saved(tmp_path):
    DiTConfig.tiny(vocab_size=50).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {k: saved[k] for k in FIELDS} == {k: getattr(DiTConfig.tiny(vocab_size=50), k) for k in FIELDS}


REFUSED = {
    "id above": (lambda m: m(torch.tensor([[3, 13]])), "ids from 3 to 13, known are 0 to 12"),
    "id below": (lambda m: m(torch.tensor([[-1, 3]])), "ids from -1 to 3"),
    "too long": (lambda m: m(tokens(1, 25)), "25 tokens for a network of length 24"),
    "width": (lambda m: m(torch.zeros(1, 4, 31)), "embeddings 31 wide for a network 32 wide"),
    "no batch": (lambda m: m(tokens(4)), "pass ids .B, L."),
    "sigma": (lambda m: m(tokens(2, 4), torch.zeros(3)), "pass one noise level each"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_refused_in_one_line(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        call(network())
    assert "\n" not in str(error.value)


def test_longer_input_after_the_length_is_raised():
    model = network()
    model.config.length = 30
    assert model(tokens(1, 30)).shape == (1, 30, 13)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hidden_size=30), "n_heads=4 does not divide hidden_size=30"),
        (dict(hidden_size=36), "odd width 9"),
        (dict(vocab_size=1), "two ids at least"),
        (dict(causal=True, time_conditioning=True), "not both"),
    ],
)
def test_shapes_that_can_not_be_built(changes, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**dict(hidden_size=32, n_heads=4) | changes)

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
    shape = {k: golden.config[k] for k in ("hidden_size", "n_blocks", "n_heads", "cond_dim", "length") if k in golden.config}
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

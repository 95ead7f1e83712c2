"Weights that the originals have trained, in our network: the same logits and the same log-probabilities."

import pytest
import torch
from golden import case

from dlm.diffusion.corruption import Absorbing, Uniform
from dlm.diffusion.objectives import MDLM
from dlm.diffusion.uniform import UDLM
from dlm.models.dit import DiT, DiTConfig


def restored(golden, kind):
    "Our network with the raw or the averaged weights of a checkpoint, every name and shape checked"
    c = golden.config
    names = "hidden_size", "n_blocks", "n_heads", "length", "vocab_size", "time_conditioning"
    prefix = f"{kind}.backbone."
    weights = {n: golden[prefix + n] for n in golden.names(prefix) if not n.startswith("rotary_emb.")}
    width = weights["sigma_map.mlp.0.weight"].shape[0]
    network = DiT(DiTConfig(**{n: c[n] for n in names}, cond_dim=width, dropout=0.0)).train(False)
    network.load_state_dict(weights)
    return network


@torch.no_grad()
@pytest.mark.parametrize("kind", ["raw", "ema"])
@pytest.mark.parametrize("name", ["mdlm_checkpoint", "duo_checkpoint"])
def test_golden_checkpoints(name, kind):
    golden = case(name)
    V, mask_id = golden.config["vocab_size"], golden.config["mask_index"]
    objective = UDLM(Uniform(V)) if mask_id is None else MDLM(Absorbing(mask_id, V))
    ids, network = golden["input_ids"], restored(golden, kind)
    logits = network(ids, golden["sigma"].flatten())
    golden.compare(logits, f"logits_{kind}")
    golden.compare(objective.log_x0(logits, ids).clamp_min(-1e6), f"logprobs_{kind}")


def test_golden_checkpoints_hold_two_sets_of_weights():
    golden = case("mdlm_checkpoint")
    table = "backbone.vocab_embed.embedding"
    assert not torch.equal(golden[f"raw.{table}"], golden[f"ema.{table}"])
    assert {n for n in golden.names("raw.") if "rotary" not in n} == set(golden.names("ema."))

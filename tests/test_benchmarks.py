"The benchmarks run and write what they promise; how fast things are is for `make bench` to say"

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
KEYS = {"benchmark", "command", "date", "smoke", "seed", "machine", "versions", "parameters", "results", "ratios"}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_smoke(name, tmp_path):
    command = [sys.executable, FOLDER / f"{name}.py", "--smoke", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found.keys() == KEYS and found["benchmark"] == name and found["smoke"] is True
    assert found["command"] == f"python benchmarks/{name}.py --smoke"
    assert {"processor", "cores", "threads", "memory_gib"} <= found["machine"].keys()
    assert found["versions"]["torch"] and found["results"] and found["ratios"]
    for ratio in found["ratios"]:
        assert ratio.keys() == {"name", "value", "standard_error", "wanted"} and ratio["value"] > 0
    assert len(done.stdout.splitlines()) >= 3


def test_published_samplers_draw_from_the_law(monkeypatch):
    "The benchmark's plain and cached methods write every word as often as the network says"
    import torch

    monkeypatch.syspath_prepend(FOLDER)
    import sampling

    from dlm.sampling.ancestral import grid

    class Fixed:
        "The same guess everywhere"

        logits = torch.tensor([0.2, 0.5, 0.3, 1.0]).log()

        def __call__(self, x):
            return self.logits.expand(*x.shape, 4).clone()

    torch.manual_seed(0)
    published, start, times = sampling.Published(Fixed(), mask_id=3), torch.full((40, 50), 3), grid(20)
    for whole in (published.whole_plain, published.whole_cached):
        x, nfe = whole(start, times)
        counts = torch.bincount(x.flatten(), minlength=4)
        # the last, greedy step fills what is left, at t = 1e-5 almost nothing
        expected = 2000 * torch.tensor([0.2, 0.5, 0.3])
        assert counts[3] == 0 and nfe <= 21
        assert ((counts[:3] - expected) ** 2 / expected).sum() < 13.8  # chi-square, 2 degrees of freedom, p = 0.001


def test_flops_of_a_step_are_those_that_torch_counts(monkeypatch):
    "All positions, and half of them; modulations and the noise level, which the formula leaves out, are under 1 %"
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from dlm.models.dit import DiT, DiTConfig

    monkeypatch.syspath_prepend(FOLDER)
    import gpu

    config = DiTConfig(vocab_size=500, hidden_size=64, n_blocks=3, n_heads=2, length=128, dropout=0.0)
    network, ids = DiT(config), torch.randint(500, (2, 128))
    for share, asked in ((1.0, None), (0.5, (torch.arange(128) % 2 == 0).expand(2, -1))):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            network.head(network.hidden(ids, positions=asked)).sum().backward()
        assert abs(counter.get_total_flops() / gpu.flops(config, 2, 128, share) - 1) < 0.01

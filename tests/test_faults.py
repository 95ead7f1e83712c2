"A killed run, resumed, is the run that was never killed, bit for bit"

import subprocess
import sys
import time
from pathlib import Path

import torch
from tiny_run import read_report, rows

from dlm.training.checkpoints import checkpoints, damage, load_checkpoint

TESTS = Path(__file__).parent


def child(*args):
    "Run a program of this folder and return what it reports"
    done = subprocess.run(
        [sys.executable, TESTS / args[0], *map(str, args[1:])], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return read_report(done.stdout)


def same_tensors(a, b):
    assert a.tensors.keys() == b.tensors.keys() == {"network", "ema", "optimizer"}
    for group in a.tensors:
        assert a.tensors[group].keys() == b.tensors[group].keys()
        for name, tensor in a.tensors[group].items():
            assert torch.equal(tensor, b.tensors[group][name]), f"{group} {name}"


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    seed = time.time_ns() % 10**6
    for scenario, stopped in child("faults_child.py", tmp_path, seed).items():
        about = f"{scenario}: seed {seed}, killed at {stopped}"
        print(about)
        assert stopped, about
        whole, killed = (rows(tmp_path / scenario / run) for run in ("whole", "killed"))
        assert [r["step"] for r in whole if "loss" in r] == list(range(1, 31))
        assert killed == whole, about
        last = [checkpoints(tmp_path / scenario / run)[0] for run in ("whole", "killed")]
        assert [p.name for p in last] == ["checkpoint-30"] * 2
        assert not any(damage(p) for p in last)
        same_tensors(*map(load_checkpoint, last))

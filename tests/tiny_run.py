"A run small enough to be killed many times: a second of training on sixty-four short texts"

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from dlm.diffusion.corruption import Absorbing
from dlm.diffusion.objectives import AR, MDLM
from dlm.models.dit import DiT, DiTConfig
from dlm.training.reports import read_log
from dlm.training.settings import TrainingConfig
from dlm.training.trainer import DiffusionTrainer

VOCAB, LENGTH = 12, 10


def texts(n=64, padded=True):
    "Short arithmetic texts; every row has another number of valid tokens"
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCAB - 1, (n, LENGTH), generator=g)
    lengths = torch.arange(n) % (LENGTH - 2) + 3 if padded else torch.full((n,), LENGTH)
    return [{"ids": row, "valid": torch.arange(LENGTH) < k} for row, k in zip(ids, lengths, strict=True)]


def network(causal=False, **changes):
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "n_blocks": 1, "n_heads": 2, "cond_dim": 8, "length": LENGTH}
    return DiT(DiTConfig(**shape | {"causal": causal, "dropout": 0.1} | changes))


def mdlm(**changes):
    return MDLM(Absorbing(VOCAB - 1, VOCAB), **changes)


def ar():
    return AR(VOCAB, mask_id=VOCAB - 1)


def config(**changes):
    run = {"steps": 12, "batch_size": 8, "lr": 1e-2, "warmup_steps": 3, "precision": "fp32", "log_every": 1}
    return TrainingConfig(**run | {"save_every": 4, "eval_every": 6, "progress": False} | changes)


def trainer(folder, net=None, objective=None, evaluate=True, **changes):
    held_out = texts(10) if evaluate else None
    return DiffusionTrainer(net or network(), objective or mdlm(), config(**changes), texts(), held_out, folder)


def rows(folder):
    "The log without the clock"
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(Path(folder) / "log.jsonl")]


def losses(folder):
    return [row["loss"] for row in rows(folder) if "loss" in row]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


def fork(function, world=1):
    "Run `function` in `world` processes that find each other; their process ids"
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world)}
    pids = []
    for rank in range(world):
        if pid := os.fork():
            pids.append(pid)
            continue
        if world > 1:
            os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
        code = 1
        try:
            function()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pids


def wait(pids):
    "Exit codes, negative for a signal"
    return [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]


def kill(pids, pause=0.0):
    "SIGKILL one after the other; their exit codes"
    for p in pids:
        os.kill(p, signal.SIGKILL)
        time.sleep(pause)
    return wait(pids)


def report(**values):
    print("REPORT " + json.dumps(values), flush=True)


def read_report(output):
    return json.loads(output.rpartition("REPORT ")[2].splitlines()[0])

"""Kill a training again and again, in a process that has nothing but imports behind it.

Starting Python with torch takes seconds, a fork of a process that has imported it takes none. So this program imports, then
forks every training from itself: `python faults_child.py FOLDER SEED` prints what happened as one REPORT line.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import tiny_run
import torch

import dlm.foundations.files as files
import dlm.training.checkpoints as checkpoints

RUN = {"steps": 30, "save_every": 2, "eval_every": 10, "micro_batch_size": 4, "keep": 2}


def train(folder):
    torch.set_num_threads(1)
    tiny_run.trainer(folder, **RUN).train_or_resume()


def finished(folder, world):
    codes = tiny_run.wait(tiny_run.fork(lambda: train(folder), world))
    assert codes == [0] * world, codes


def last_step(folder):
    return max([row["step"] for row in tiny_run.rows(folder)], default=0)


def reaches(folder, step, pids):
    "Wait until the log has a row of this step; false when the run ends before"
    while last_step(folder) < step:
        if any(os.waitid(os.P_PID, p, os.WEXITED | os.WNOHANG | os.WNOWAIT) for p in pids):
            return False
        time.sleep(0.002)
    return True


def at_random_moments(folder, world, chance, kills):
    "Let it get a random number of steps further, kill all of it, again and again, and then let it finish"
    finished(folder / "whole", world)
    folder, stopped = folder / "killed", []
    for _ in range(kills):
        pids = tiny_run.fork(lambda: train(folder), world)
        reaches(folder, last_step(folder) + chance.randint(1, 6), pids)
        time.sleep(chance.uniform(0, 0.03))
        if -signal.SIGKILL not in tiny_run.kill(chance.sample(pids, len(pids)), pause=chance.uniform(0, 0.02)):
            break
        stopped.append(last_step(folder))
    finished(folder, world)
    return stopped


class Fuse:
    "Kill this process at the n-th of the operations that it is put into"

    def __init__(self, n):
        self.left = n

    def into(self, module, name):
        original = getattr(module, name)

        def burning(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, burning)


def with_fuse(folder, n):
    fuse = Fuse(n)
    for name in ("fsync", "replace"):
        fuse.into(files.os, name)
    for name in ("save_file", "write_json", "sha256", "remove"):
        fuse.into(checkpoints, name)
    train(folder)


def while_saving(folder, chance, kills):
    "Kill it at random operations of writing a checkpoint"
    finished(folder / "whole", 1)
    stopped = []
    for _ in range(kills):
        n = chance.randint(1, 150)
        codes = tiny_run.wait(tiny_run.fork(lambda n=n: with_fuse(folder / "killed", n)))
        if codes != [-signal.SIGKILL]:
            break
        stopped.append([n, last_step(folder / "killed")])
    finished(folder / "killed", 1)
    return stopped


if __name__ == "__main__":
    folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    tiny_run.report(
        one=at_random_moments(folder / "one", 1, chance, kills=4),
        two=at_random_moments(folder / "two", 2, chance, kills=3),
        saving=while_saving(folder / "saving", chance, kills=5),
    )

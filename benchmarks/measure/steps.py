"A few training steps under the clock, in a process that does nothing else"

import time

import torch

from dlm.models.dit import DiT, DiTConfig

from . import peak_mib, timed


def update(value, optimizer):
    "Backward pass and update; the loss as a number"
    value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.item()


def record(loss, task, ids_below, imported, **config):
    """Train for `task["steps"]` steps after one on `task["warm_up"]` texts: seconds, processor seconds and peak memory

    `loss(network, ids)` is what is measured. `imported` is the memory of this process before anything was made; `step_mib` is the
    peak without it, the weights and AdamW's two moments.
    """
    torch.manual_seed(task["seed"])
    shape = dict(vocab_size=task["vocab_size"], length=task["length"])
    network = DiT(getattr(DiTConfig, task["size"])(**shape, **config))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, fused=True)
    weights = sum(p.numel() * p.element_size() for p in network.parameters()) / 2**20
    ids = torch.randint(ids_below, (task["batch"], task["length"]))
    update(loss(network, ids[: task["warm_up"]]), optimizer)
    seconds, cpu_seconds = [], []
    for _ in range(task["steps"]):
        start = time.process_time()
        seconds.append(timed(lambda: update(loss(network, ids), optimizer))[1])
        cpu_seconds.append(time.process_time() - start)
    memory = dict(peak_mib=peak_mib(), step_mib=max(peak_mib() - imported - 3 * weights, 1.0))
    return dict(seconds=seconds, cpu_seconds=cpu_seconds, **memory)


def in_turns(run, tasks, repeats, seed):
    "What `run` finds for each of the named tasks; they take turns, so that a busy machine slows all"
    found = {name: [] for name in tasks}
    for turn in range(repeats):
        for name, task in tasks.items():
            found[name].append(run(task | dict(seed=seed + turn)))
    return found

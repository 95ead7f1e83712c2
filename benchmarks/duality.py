"""Uniform diffusion and its curriculum: the noise-level table, and a training step of the bound, of top-k and of dense latents

Each variant runs in processes of its own, in turns, so that its memory high-water mark is its own and a busy machine slows all.
`udlm` is the bound as the trainer asks for it; `plain` is the same by ordinary differentiation of the logits. Weights and AdamW's
two moments take the same memory whatever the loss does, so the peak is also given without them. Seconds of the processor, summed
over threads, do not count what else the machine does. A `limit` is the largest ratio to `udlm` that is wanted.
"""

import json

import torch
from measure import arguments, in_child, mean, peak_mib, plus_minus, ratio, report, table, timed
from measure.steps import in_turns, record

from dlm.diffusion.corruption import Uniform
from dlm.diffusion.curriculum import DUO
from dlm.diffusion.duality import Duality, operator, operator_table
from dlm.diffusion.objectives import spread
from dlm.diffusion.uniform import UDLM

VARIANTS = ("udlm", "plain", "topk", "dense")
LIMITS = {"topk": dict(seconds=1.1, cpu_seconds=1.1, peak_mib=1.05, step_mib=1.05)}
NAMES = {"plain": "UDLM, plain", "topk": "DUO, top-k", "dense": "DUO, dense"}
COLUMNS = (
    ("seconds", "s/step", 3),
    ("cpu_seconds", "CPU s", 3),
    ("peak_mib", "peak MiB", 5),
    ("step_mib", "step MiB", 5),
)


def table_time(vocab_size, repeats):
    "Seconds of a new table, and the largest errors of level and slope at random times"
    duality, seconds = Duality(vocab_size), []
    t = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(repeats):
        operator_table.cache_clear()
        seconds.append(timed(duality.both, t)[1])
    alpha, slope = operator(duality.gamma(t), vocab_size)
    slope = slope * (duality.gamma_max - duality.gamma_min)
    errors = [(a - b).abs().max().item() for a, b in zip(duality.both(t), (alpha, slope), strict=True)]
    return dict(seconds=mean(seconds), error=errors[0], slope_error=errors[1])


def plain_loss(objective, network, ids):
    "The bound by ordinary differentiation of all logits"
    t = objective.times(len(ids))
    z = objective.corruption.corrupt(ids, objective.schedule.alpha(spread(t, ids)))
    return objective.token_loss(network(z, objective.schedule.sigma(t).float()), ids, z, t).mean()


def work(task):
    "Train for a few steps: their seconds and the peak memory"
    imported, variant = peak_mib(), task["variant"]
    corruption = Uniform(task["vocab_size"])
    if variant in ("topk", "dense"):
        asked = DUO(corruption, top_k=2 if variant == "topk" else None).in_training(0)
    else:
        asked = UDLM(corruption)

    def loss(network, ids):
        return plain_loss(asked, network, ids) if variant == "plain" else asked(network, ids).mean()

    return record(loss, task, task["vocab_size"], imported, time_conditioning=True)


def measure(args, **shape):
    "Seconds and memory of each variant as (value, standard error)"
    common = shape | dict(size="tiny", steps=args.steps, warm_up=shape["batch"])
    tasks = {variant: common | dict(variant=variant) for variant in VARIANTS}
    found = {}
    for variant, children in in_turns(in_child(args, work, __file__), tasks, args.repeats, args.seed).items():
        found[variant] = {what: mean([child[what] for child in children]) for what in ("peak_mib", "step_mib")}
        for what in ("seconds", "cpu_seconds"):
            found[variant][what] = mean([min(child[what]) for child in children])
    return found


def compare(found, smoke):
    "Rows of the table and ratios of the file"
    rows, ratios = [], []
    for variant, numbers in found.items():
        row = {"loss": variant}
        for what, title, digits in COLUMNS:
            over, limit = ratio(numbers[what], found["udlm"][what]), LIMITS.get(variant, {}).get(what)
            if variant != "udlm":
                limit_here = None if smoke else limit
                name = f"step of {NAMES[variant]} / UDLM: {what}"
                ratios.append(dict(name=name, value=over[0], standard_error=over[1], wanted=limit_here))
            row |= {title: plus_minus(numbers[what], digits), f"{title} ratio": plus_minus(over)}
            row[f"{title} limit"] = limit or ""
        rows.append(row)
    return rows, ratios


def main():
    args = arguments(__doc__.splitlines()[0], repeats=3, steps=3)
    if args.child:
        return print(json.dumps(work(json.loads(args.child))))
    shape = dict(vocab_size=50258, length=128, batch=4)
    if args.smoke:
        shape, args.repeats, args.steps = dict(vocab_size=300, length=16, batch=2), 1, 1
    operators = table_time(shape["vocab_size"], 5)
    results = measure(args, **shape)
    rows, ratios = compare(results, args.smoke)
    ratios.append(
        dict(
            name="table: seconds / 1 s", value=operators["seconds"][0], standard_error=operators["seconds"][1], wanted=1
        )
    )
    ratios.append(dict(name="table: error / 1e-6", value=operators["error"] / 1e-6, standard_error=None, wanted=1))
    print(f"table of noise levels, vocabulary {shape['vocab_size']}: {plus_minus(operators['seconds'])} s,", end=" ")
    print(f"error {operators['error']:.1e}, of the slope {operators['slope_error']:.1e}")
    print(f"training step, tiny DiT, {shape}, float32, AdamW, {torch.get_num_threads()} threads; ratios are to `udlm`")
    table(rows)
    report(args, dict(**shape, repeats=args.repeats, steps=args.steps), dict(table=operators, step=results), ratios)


if __name__ == "__main__":
    main()

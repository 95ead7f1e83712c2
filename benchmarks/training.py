"""Training step: the head at masked positions only, and fused with the cross-entropy, beside logits everywhere

Each variant runs in processes of its own, in turns, so that its memory high-water mark is its own and a busy machine slows all.
`published` is MDLM's way: SUBS on all logits. `everywhere` is the leanest way to have logits at all positions. Weights and
AdamW's two moments take the same memory whatever the loss does, most of the peak with the small network, so the peak is also
given without them.
"""

import json

import torch
from measure import arguments, in_child, mean, peak_mib, plus_minus, ratio, report, table
from measure.steps import in_turns, record
from torch.nn import functional as F

from dlm.diffusion import cross_entropy
from dlm.diffusion.corruption import Absorbing
from dlm.diffusion.objectives import MDLM, loss_weight

VARIANTS = {  # the small network beside what it does by default
    "tiny": ("published", "everywhere", "masked", "fused"),
    "small": ("published", "fused"),
}
BATCH = {"tiny": 4, "small": 16}  # small: enough tokens that logits outweigh the optimiser's moments
STEPS = {"tiny": 3, "small": 1}
WARM_UP = {"tiny": 4, "small": 1}  # texts of the first step, which is not timed
WANTED = {
    "tiny": dict(tokens_per_second=1.4, peak_mib=0.65, step_mib=0.65),
    "small": dict(tokens_per_second=1.15, peak_mib=0.65, step_mib=0.65),
}
COLUMNS = (("tokens_per_second", "tokens/s", 3), ("peak_mib", "peak MiB", 5), ("step_mib", "step MiB", 5))


def noisy(objective, ids):
    "Times, noisy ids and the weight of each sequence"
    t = objective.times(len(ids))
    z = objective.corruption.corrupt(ids, objective.schedule.alpha(t)[:, None])
    return z, loss_weight(objective.schedule, t, None)[:, None]


def published_loss(objective, network, ids):
    "MDLM's SUBS: the whole `[B, L, V]` tensor normalised and overwritten at visible positions"
    z, weight = noisy(objective, ids)
    mask_id = objective.corruption.mask_id
    logits = network(z)
    logits[..., mask_id] += -1e6
    logits = logits - logits.logsumexp(-1, keepdim=True)
    visible = z != mask_id
    logits[visible] = -1e6
    logits[visible, z[visible]] = 0
    return -(logits.gather(-1, ids[..., None])[..., 0] * weight).mean()


def everywhere_loss(objective, network, ids):
    "Cross-entropy of all logits, weighted at the masked positions"
    z, weight = noisy(objective, ids)
    nll = F.cross_entropy(network(z).flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    return (nll * weight * (z == objective.corruption.mask_id)).mean()


def our_loss(objective, network, ids):
    "The objective as the trainer calls it"
    return objective(network, ids).mean()


def work(task):
    "Train for a few steps: their seconds and the peak memory"
    imported, vocab_size = peak_mib(), task["vocab_size"]
    objective = MDLM(Absorbing(vocab_size - 1, vocab_size))
    cross_entropy.FUSED_FROM = 0 if task["variant"] == "fused" else float("inf")
    chosen = dict(published=published_loss, everywhere=everywhere_loss).get(task["variant"], our_loss)
    return record(lambda network, ids: chosen(objective, network, ids), task, vocab_size - 1, imported)


def measure(size, args, vocab_size, length, batch):
    "Tokens per second and memory of each variant as (value, standard error)"
    common = dict(size=size, vocab_size=vocab_size, length=length, batch=batch, warm_up=WARM_UP[size])
    common |= dict(steps=min(args.steps, STEPS[size]))
    tasks = {variant: common | dict(variant=variant) for variant in VARIANTS[size]}
    found = {}
    for variant, children in in_turns(in_child(args, work, __file__), tasks, args.repeats, args.seed).items():
        seconds = mean([s for child in children for s in child["seconds"]])
        memory = {what: mean([child[what] for child in children]) for what in ("peak_mib", "step_mib")}
        speed = ratio((batch * length, 0.0), seconds)
        found[variant] = dict(seconds=seconds, tokens_per_second=speed, **memory)
    return found


def compare(size, found, smoke, logits):
    "Rows of the table and ratios of the file for one size; what is wanted stands with the variant that is the default"
    rows, ratios, default = [], [], "fused" if logits >= cross_entropy.FUSED_FROM else "masked"
    for variant, numbers in found.items():
        row, ours = {"DiT": size, "logits": variant}, variant in ("masked", "fused")
        for what, title, digits in COLUMNS:
            over = ratio(numbers[what], found["published"][what])
            wanted = WANTED[size].get(what) if variant == default and not smoke else None
            if ours:
                name = f"{size}: {what}, {variant} / published"
                ratios.append(dict(name=name, value=over[0], standard_error=over[1], wanted=wanted))
            row |= {title: plus_minus(numbers[what], digits), f"{title} ratio": plus_minus(over)}
            row[f"{title} wanted"] = "" if wanted is None else f"{'>=' if wanted > 1 else '<='} {wanted}"
        rows.append(row)
    return rows, ratios


def main():
    args = arguments(__doc__.splitlines()[0], repeats=2, steps=3)
    if args.child:
        return print(json.dumps(work(json.loads(args.child))))
    vocab_size, length, sizes, batches = 50258, 256, ("tiny", "small"), BATCH
    if args.smoke:
        vocab_size, length, sizes, batches, args.repeats, args.steps = 300, 16, ("tiny",), {"tiny": 2}, 1, 2
    results, ratios, rows = {}, [], []
    for size in sizes:
        results[size] = measure(size, args, vocab_size, length, batches[size])
        new_rows, new_ratios = compare(size, results[size], args.smoke, batches[size] * length // 2 * vocab_size)
        rows, ratios = rows + new_rows, ratios + new_ratios
    print(f"training step, vocabulary {vocab_size}, L = {length}, float32, AdamW, {torch.get_num_threads()} threads;")
    print("step MiB is the peak without weights and moments; ratios are to `published`")
    table(rows)
    parameters = dict(vocab_size=vocab_size, length=length, batch=batches, repeats=args.repeats)
    parameters |= dict(steps={size: min(args.steps, STEPS[size]) for size in sizes}, warm_up=WARM_UP)
    report(args, parameters, results, ratios)


if __name__ == "__main__":
    main()

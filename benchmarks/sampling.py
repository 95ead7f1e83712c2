"""Sampling: the plain ancestral method and the published cached one beside `dlm.sampling.ancestral`

All three draw from the same network, one text at a time. Steps of the published methods cost the same at any time, so by
default a random subset of them is timed in between our steps and scaled to their number; `--full` runs every step.
"""

import dataclasses
import random

import torch
from measure import arguments, mean, plus_minus, ratio, report, table, timed

from dlm.diffusion.corruption import Absorbing
from dlm.diffusion.objectives import MDLM
from dlm.models.dit import DiT, DiTConfig
from dlm.sampling.ancestral import Ancestral, grid, reveal_steps
from dlm.sampling.canvas import blank

WANTED = {("small", "plain"): 7, ("small", "cached"): 2.5, ("tiny", "cached"): 10}


@dataclasses.dataclass
class Published:
    "MDLM's two samplers: network on all positions, weights over the whole vocabulary, a `[B, L, V]` noise tensor"

    network: DiT
    mask_id: int
    clamp: float = 1e-10

    def probabilities(self, x):
        "Network, SUBS and softmax at all positions, [B, L, V]"
        logits = self.network(x)
        logits[..., self.mask_id] += -1e6
        log_probs = logits - logits.logsumexp(-1, keepdim=True)
        visible = x != self.mask_id
        log_probs[visible] = -1e6
        log_probs[visible, x[visible]] = 0
        return log_probs.exp()

    def draw(self, x, probs, t, s):
        "One reverse step from `t` to `s`: Gumbel noise for every word at every position"
        weights = probs * (t - s)
        weights[..., self.mask_id] = s
        noise = self.clamp - (torch.rand_like(weights) + self.clamp).log()
        return torch.where(x == self.mask_id, (weights / noise).argmax(-1), x)

    @torch.no_grad()
    def plain(self, x, t, s):
        "The plain update"
        return self.draw(x, self.probabilities(x), t, s)

    @torch.no_grad()
    def whole_cached(self, x, times):
        "All steps, probabilities kept as long as nothing changes; the text and the number of evaluations"
        probs, nfe = None, 0
        for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            if probs is None:
                probs, nfe = self.probabilities(x), nfe + 1
            new = self.draw(x, probs, t, s)
            probs, x = (probs, x) if torch.equal(new, x) else (None, new)
        return self.probabilities(x).argmax(-1), nfe + 1

    @torch.no_grad()
    def whole_plain(self, x, times):
        "All steps; the text and the number of evaluations"
        for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            x = self.plain(x, t, s)
        return self.probabilities(x).argmax(-1), len(times)


def network_for(size, vocab_size, length, seed):
    "An untrained network whose head is not zero, so that words differ in probability"
    torch.manual_seed(seed)
    config = getattr(DiTConfig, size)(vocab_size=vocab_size, length=length)
    network = DiT(config).train(False)
    with torch.no_grad():
        network.head.weight.normal_(std=0.05)
    return network


def some_steps(published, length, steps, rng):
    "Seconds of one step of each kind at a random time: plain, cached with the network, cached without"
    i = rng.randrange(steps)
    times = grid(steps)
    t, s = times[i].item(), times[i + 1].item()
    x = torch.randint(published.mask_id, (1, length)).masked_fill(torch.rand(1, length) < t, published.mask_id)
    _, plain = timed(published.plain, x, t, s)
    with torch.no_grad():
        probs, asking = timed(published.probabilities, x)
        _, drawing = timed(published.draw, x, probs, t, s)
    return dict(plain=plain, asked=asking + drawing, reused=drawing)


def steps_with_change(length, steps, schedule, draws=200):
    "Number of steps in which a text changes, drawn `draws` times"
    u = torch.rand(draws, length, dtype=torch.float64)
    return [float((row.unique() < steps).sum()) for row in reveal_steps(u, grid(steps), schedule)]


def measure(size, args, vocab_size, length, steps):
    "Seconds and evaluations of each method as (value, standard error), and how they were obtained"
    network, mask_id = network_for(size, vocab_size, length, args.seed), vocab_size - 1
    objective = MDLM(Absorbing(mask_id, vocab_size))
    published, rng = Published(network, mask_id), random.Random(args.seed)
    some_steps(published, length, steps, rng)  # warm-up
    ours, nfe, samples = [], [], []
    for _ in range(args.repeats):
        walk, seconds, state = Ancestral(steps).states(network, objective, blank(1, length)), 0.0, None
        every = max(1, steps_between(length, steps) // args.timed_steps)
        for i in range(2 * steps):
            new, spent = timed(next, walk, None)
            seconds += spent
            if new is None:
                break
            state = new
            if i % every == 0 and not args.full:
                samples.append(some_steps(published, length, steps, rng))
        ours.append(seconds)
        nfe.append(float(state.nfe))
    found = dict(ours=dict(seconds=mean(ours), nfe=mean(nfe), how=f"{args.repeats} whole runs"))
    if args.full:
        start = torch.full((1, length), mask_id)
        for name, whole in (("plain", published.whole_plain), ("cached", published.whole_cached)):
            runs = [timed(whole, start, grid(steps)) for _ in range(args.repeats)]
            spent = mean([seconds for _, seconds in runs])
            found[name] = dict(seconds=spent, nfe=mean([float(n) for (_, n), _ in runs]), how=f"{len(runs)} whole runs")
        return found
    cost = {kind: mean([sample[kind] for sample in samples]) for kind in samples[0]}
    changes, change_error = mean(steps_with_change(length, steps, objective.schedule))
    asked, reused = changes + 1, steps - changes - 1
    error = ((asked * cost["asked"][1]) ** 2 + (reused * cost["reused"][1]) ** 2) ** 0.5
    how = f"{len(samples)} of its steps, scaled"
    cached = asked * cost["asked"][0] + reused * cost["reused"][0]
    found["plain"] = dict(seconds=(steps * cost["plain"][0], steps * cost["plain"][1]), nfe=(steps + 1, 0.0), how=how)
    found["cached"] = dict(seconds=(cached, error), nfe=(asked + 1, change_error), how=how)
    return found


def steps_between(length, steps):
    "About how many steps change something"
    return round(steps * (1 - (1 - 1 / steps) ** length))


def main():
    args = arguments(__doc__.splitlines()[0], full=False, repeats=2, timed_steps=6)
    vocab_size, length, steps, sizes = (50258, 256, 1000, ("tiny", "small"))
    if args.smoke:
        vocab_size, length, steps, sizes, args.repeats, args.timed_steps = 300, 16, 20, ("tiny",), 1, 3
    results, ratios, rows = {}, [], []
    for size in sizes:
        found = results[size] = measure(size, args, vocab_size, length, steps)
        for name in ("plain", "cached", "ours"):
            method = found[name]
            value, error = ratio(method["seconds"], found["ours"]["seconds"])
            wanted = None if args.smoke else WANTED.get((size, name))
            if name != "ours":
                ratios.append(dict(name=f"{size}: {name} / ours", value=value, standard_error=error, wanted=wanted))
            rows.append(
                {
                    "DiT": size,
                    "method": name,
                    "seconds": plus_minus(method["seconds"]),
                    "evaluations": plus_minus(method["nfe"]),
                    "times ours": plus_minus((value, error)) if name != "ours" else "1",
                    "wanted": f">= {wanted}" if wanted else "",
                    "from": method["how"],
                }
            )
    print(
        f"{length} tokens in {steps} steps, vocabulary {vocab_size}, batch 1, float32, {torch.get_num_threads()} threads"
    )
    table(rows)
    parameters = dict(vocab_size=vocab_size, length=length, steps=steps, batch=1, full=args.full, repeats=args.repeats)
    report(args, parameters, results, ratios)


if __name__ == "__main__":
    main()

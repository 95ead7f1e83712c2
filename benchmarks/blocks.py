"""Generation by blocks: with a memory of the text before and without, the same draws

Every text is written twice with the same random numbers, so both ways ask the network equally often; what differs is how
much it reads each time.
"""

import torch
from measure import arguments, mean, plus_minus, ratio, report, table, timed

from dlm.diffusion.blocks import BlockDiffusion
from dlm.diffusion.corruption import Absorbing
from dlm.models.dit import DiT, DiTConfig
from dlm.sampling.ancestral import Ancestral, last
from dlm.sampling.blocks import Blocks
from dlm.sampling.canvas import blank

WANTED = 3  # at 16 blocks and more


def network_for(vocab_size, length, seed):
    "An untrained network whose head is not zero, so that words differ in probability"
    torch.manual_seed(seed)
    network = DiT(DiTConfig.tiny(vocab_size=vocab_size, length=length)).train(False)
    with torch.no_grad():
        network.head.weight.normal_(std=0.05)
    return network


def write(network, objective, steps, cached, seed):
    "One text: the last state"
    sampler = Blocks(Ancestral(steps), cached=cached)
    return last(sampler.states(network, objective, blank(1, objective.length), torch.Generator().manual_seed(seed)))


def measure(network, vocab_size, length, blocks, steps, args):
    "Seconds with and without memory, as (value, standard error), and the evaluations of the first"
    objective = BlockDiffusion(Absorbing(vocab_size - 1, vocab_size), block_size=length // blocks, length=length)
    seconds, nfe, same = {True: [], False: []}, [], []
    for cached in (True, False):
        write(network, objective, 1, cached, args.seed)  # warm-up
    for run in range(args.repeats):
        texts = {}
        for cached in (True, False):
            texts[cached], spent = timed(write, network, objective, steps, cached, args.seed + run)
            seconds[cached].append(spent)
        nfe.append(float(texts[True].nfe))
        same.append(bool((texts[True].ids == texts[False].ids).all()))
    share = sum(same) / len(same)
    return dict(cached=mean(seconds[True]), plain=mean(seconds[False]), nfe=mean(nfe), same_text=share)


def main():
    args = arguments(__doc__.splitlines()[0], repeats=3)
    vocab_size, length, steps, numbers = 5000, 1024, 8, (4, 16)
    if args.smoke:
        vocab_size, length, steps, numbers, args.repeats = 100, 32, 10, (4,), 1
    network = network_for(vocab_size, length, args.seed)
    results, ratios, rows = {}, [], []
    for blocks in numbers:
        found = results[f"{blocks} blocks"] = measure(network, vocab_size, length, blocks, steps, args)
        value, error = ratio(found["plain"], found["cached"])
        wanted = WANTED if blocks >= 16 and not args.smoke else None
        ratios.append(dict(name=f"{blocks} blocks: without / with", value=value, standard_error=error, wanted=wanted))
        rows.append(
            {
                "blocks": blocks,
                "with memory, s": plus_minus(found["cached"]),
                "without, s": plus_minus(found["plain"]),
                "evaluations": plus_minus(found["nfe"]),
                "times faster": plus_minus((value, error)),
                "wanted": f">= {wanted}" if wanted else "",
                "same text": f"{found['same_text']:.0%}",
            }
        )
    print(
        f"{length} tokens in {steps} steps for each block, vocabulary {vocab_size}, DiT tiny, batch 1, float32, {torch.get_num_threads()} threads"
    )
    table(rows)
    parameters = dict(vocab_size=vocab_size, length=length, steps=steps, batch=1, repeats=args.repeats)
    report(args, parameters, results, ratios)


if __name__ == "__main__":
    main()

"""The family of samplers: what taking nothing back costs beside ancestral sampling, and evaluations against tokens

Runs of a pair take turns, on the same network and the same seeds. Under masks a text costs as many evaluations as steps
at which it changes, a random number; so seconds are also divided by the rows that the network has read.
"""

import torch
from measure import arguments, mean, plus_minus, ratio, report, table, timed
from sampling import network_for

from dlm.diffusion.corruption import Absorbing, Uniform
from dlm.diffusion.objectives import MDLM
from dlm.diffusion.uniform import UDLM
from dlm.sampling.ancestral import Ancestral, last
from dlm.sampling.canvas import blank
from dlm.sampling.orders import Confidence, FirstHitting
from dlm.sampling.psi import ByConfidence, Psi
from dlm.sampling.remasking import Cap, Loop


def members(steps):
    "The samplers that are timed, by name"
    return {
        "ancestral": Ancestral(steps),
        "psi, kappa = 1": Psi(steps),
        "ReMDM-cap": Psi(steps, kappa=Cap(0.02)),
        "ReMDM-loop": Psi(steps, kappa=Loop()),
        "ReMDM-conf": Psi(steps, kappa=ByConfidence()),
        "first hitting": FirstHitting(),
        "surest first": Confidence(steps),
    }


def measure(samplers, network, objective, args, count, length):
    "Seconds, evaluations per text and the most of them, for each sampler; runs take turns"
    spent = {name: [] for name in samplers}
    nfe = {name: [] for name in samplers}
    for turn in range(-1, args.repeats):
        for name, sampler in samplers.items():
            g = torch.Generator().manual_seed(args.seed + turn + 1)
            state, seconds = timed(last, sampler.states(network, objective, blank(count, length), g))
            if turn >= 0:  # the first turn warms up
                spent[name].append(seconds)
                nfe[name].append(state.nfe.double())
    return {
        name: dict(
            seconds=mean(spent[name]),
            per_evaluation=mean([s / n.sum().item() for s, n in zip(spent[name], nfe[name], strict=True)]),
            nfe=mean(torch.cat(nfe[name]).tolist()),
            most=max(n.max().item() for n in nfe[name]),
        )
        for name in samplers
    }


def main():
    args = arguments(__doc__.splitlines()[0], repeats=6, size="tiny")
    vocab_size, length, steps, count = (2000, 32, 100, 4)
    if args.smoke:
        vocab_size, length, steps, count, args.repeats = 50, 8, 12, 2, 1
    network = network_for(args.size, vocab_size, length, args.seed)
    masked, uniform = MDLM(Absorbing(vocab_size - 1, vocab_size)), UDLM(Uniform(vocab_size))
    everything = members(steps)
    pair = {name: everything[name] for name in ("ancestral", "psi, kappa = 1")}
    few = {
        name: type(s)(max(1, steps // 10), kappa=s.kappa) if isinstance(s, Psi) else Ancestral(max(1, steps // 10))
        for name, s in pair.items()
    }
    results = dict(
        masked=measure(everything, network, masked, args, count, length),
        uniform=measure(few, network, uniform, args, count, length),
    )
    rows, ratios = [], []
    for process, found in results.items():
        base = found["ancestral"]
        for name, method in found.items():
            over = ratio(method["per_evaluation"], base["per_evaluation"])
            if name == "psi, kappa = 1":
                kind = f"{process}: psi at kappa = 1 / ancestral, seconds per evaluation"
                ratios.append(
                    dict(name=kind, value=over[0], standard_error=over[1], wanted=None if args.smoke else 1.0)
                )
            if name in ("ancestral", "psi, kappa = 1", "first hitting") and process == "masked":
                kind = f"{name}: most evaluations / tokens"
                ratios.append(dict(name=kind, value=method["most"] / length, standard_error=None, wanted=1.0))
            rows.append(
                {
                    "process": process,
                    "sampler": name,
                    "seconds": plus_minus(method["seconds"]),
                    "evaluations per text": plus_minus(method["nfe"]),
                    "ms per evaluation": plus_minus(tuple(v and 1000 * v for v in method["per_evaluation"])),
                    "times ancestral": plus_minus(over),
                }
            )
    print(
        f"{count} texts of {length} tokens in {steps} steps ({max(1, steps // 10)} without masks), "
        f"vocabulary {vocab_size}, DiT {args.size}, {torch.get_num_threads()} threads"
    )
    table(rows)
    parameters = dict(vocab_size=vocab_size, length=length, steps=steps, batch=count, repeats=args.repeats)
    report(args, parameters, results, ratios)


if __name__ == "__main__":
    main()

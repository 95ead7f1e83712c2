"""Training and sampling on one device: step time, tokens/s, memory, model FLOP utilisation; DUO's curriculum, sparse and dense

Made for a GPU; without one a small network runs, which shows that everything works and little else. The network trains under
bfloat16 autocast, with AdamW, on random ids, and is compiled as the trainer compiles it (`hidden`).

Utilisation is FLOPs per second over the device's peak. A token costs 6 FLOPs per weight of a matrix it passes, forward and
backward, and attention 12 n_blocks d L^2 per sequence (both directions, nothing masked). With W the weights of the blocks and
V d those of the head, two numbers are given per step of N sequences:

    as is usual    N (6 L (W + V d) + 12 n_blocks d L^2): logits at all positions, as if none were spared
    computed       6 N (L W - (1 - m) L 9 d^2 + m L V d) + 12 N n_blocks d L^2: the share m of the positions that the loss
                   asks about (half on average when tokens are masked) pays for the head and for the end of the last block

Only the second says how busy the device is; the goal (half of the peak for the 170 M network on an H200) is set for it.
Embeddings, norms, modulations and the optimiser count as nothing. The peak is the dense bfloat16 figure of the data sheet where
the device is known, and else that of a large matrix product, measured.

One line does it all, in about five minutes on an H100 or H200; the file is written after every variant, and none is begun after
`--minutes`, so that a limit on the time loses nothing:

    python benchmarks/gpu.py --out FOLDER
"""

import gc
import time

import torch
from measure import arguments, mean, plus_minus, ratio, report, table, timed

from dlm.diffusion.corruption import Absorbing, Uniform
from dlm.diffusion.curriculum import DUO
from dlm.diffusion.duality import Duality
from dlm.diffusion.objectives import MDLM
from dlm.diffusion.uniform import UDLM
from dlm.models.dit import DiT, DiTConfig
from dlm.sampling.ancestral import Ancestral
from dlm.sampling.canvas import blank

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
ON_CPU = dict(size="mini", length=128, batch=2, vocab_size=1000, steps=3, sampling_steps=50)
SMOKE = dict(size="mini", length=32, batch=2, vocab_size=300, steps=2, sampling_steps=20, warmup=1)


def wait():
    "Let the device finish what it was given"
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def clean():
    "Nothing left of the variant before: memory, its high-water mark, compiled code"
    gc.collect()
    torch.compiler.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_mib():
    "Largest memory on the GPU since `clean`; None without one"
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else None


def measured_peak(n):
    "FLOPs per second of an n by n matrix product in bfloat16"
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))

    def product():
        a @ b
        wait()

    product()
    return 2 * n**3 / min(timed(product)[1] for _ in range(5))


def device(n):
    "What is measured: its name, its peak and where that is from"
    if DEVICE.type != "cuda":
        return dict(name="cpu", peak_flops=measured_peak(n), peak_from=f"product of {n} x {n}", memory_gib=None)
    about = torch.cuda.get_device_properties(0)
    known = next((PEAK[name] for name in PEAK if name in about.name), None)
    source = "data sheet, dense bfloat16" if known else "product of 8192 x 8192"
    found = dict(name=about.name, peak_flops=known or measured_peak(8192), peak_from=source)
    return found | dict(memory_gib=round(about.total_memory / 2**30, 1), cuda=torch.version.cuda)


def network_for(args, **changes):
    "The network, on the device; its head is not zero, so that words differ in probability"
    torch.manual_seed(args.seed)
    shape = dict(vocab_size=args.vocab_size, length=args.length) | changes
    mini = dict(hidden_size=64, n_blocks=2, n_heads=2)
    config = DiTConfig(**mini | shape) if args.size == "mini" else getattr(DiTConfig, args.size)(**shape)
    network = DiT(config)
    torch.nn.init.normal_(network.head.weight, std=0.02)
    return network.to(DEVICE)


def flops(config, batch, length, share):
    "FLOPs of one training step when `share` of the positions are asked about, by the formula above"
    d, n = config.hidden_size, config.n_blocks
    attention = 12 * batch * n * d * length**2
    weights = n * 12 * d**2 - (1 - share) * 9 * d**2 + share * config.vocab_size * d
    return 6 * batch * length * weights + attention


def half():
    "bfloat16 where matrix products gain from it"
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16)


def train(args, objective, compiled=False, batch=None, **changes):
    "Seconds of each step and the peak memory"
    clean()
    network, g = network_for(args, **changes), torch.Generator(DEVICE).manual_seed(args.seed)
    if compiled:
        network.hidden = torch.compile(network.hidden, backend="inductor" if DEVICE.type == "cuda" else "aot_eager")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(args.vocab_size - 1, (batch or args.batch, args.length), generator=g, device=DEVICE)

    def step():
        with half():
            loss = objective(network, ids, generator=g).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()

    for _ in range(args.warmup):
        step()
    seconds = [timed(step)[1] for _ in range(args.steps)]
    return network.config, dict(seconds=mean(seconds), memory_mib=memory_mib())


def training(args, peak, name):
    "The masked objective, eager or compiled, with both utilisations"
    objective = MDLM(Absorbing(args.vocab_size - 1, args.vocab_size))
    share = (1 - objective.schedule.alpha(objective.times(10_000))).mean().item()
    config, numbers = train(args, objective, compiled=name == "compiled")
    work = {
        "usual": flops(config, args.batch, args.length, 1.0),
        "computed": flops(config, args.batch, args.length, share),
    }
    rates = {f"mfu_{which}": ratio((n / peak, 0.0), numbers["seconds"]) for which, n in work.items()}
    tokens = ratio((args.batch * args.length, 0.0), numbers["seconds"])
    return numbers | rates | dict(tokens_per_second=tokens, flops=work)


def sampling(args, name):
    "Seconds for a batch of texts, and network evaluations for each"
    clean()
    V = args.vocab_size
    objective = MDLM(Absorbing(V - 1, V)) if name == "MDLM" else UDLM(Uniform(V))
    network = network_for(args, time_conditioning=objective.needs_time).train(False)
    g, canvas = torch.Generator(DEVICE).manual_seed(args.seed), blank(args.texts, args.length).to(DEVICE)

    def write(steps):
        with half():
            for state in Ancestral(steps).states(network, objective, canvas, g):  # noqa: B007
                pass
        wait()
        return state

    write(2)
    state, seconds = timed(write, args.sampling_steps)
    return dict(seconds=(seconds, None), nfe=mean(state.nfe.double().tolist()), memory_mib=memory_mib())


def curriculum(args, name):
    "Steps of uniform diffusion, or of DUO's curriculum from two coordinates or from all, with a quarter of the batch"
    V = args.vocab_size
    objective = UDLM(Uniform(V))
    if name != "bound":
        objective = DUO(Uniform(V), duality=Duality(V), top_k=2 if name == "top_2" else None).in_training(0)
    return train(args, objective, batch=max(1, args.batch // 4), time_conditioning=True)[1]


def ratios(args, about, results):
    "What is compared among the variants that have run, and what is wanted of a real run"
    found = {(part, name): numbers for part, variants in results.items() for name, numbers in variants.items()}
    rows = []

    def compare(name, above, below, what="seconds", wanted=None):
        pair = [found.get(key, {}).get(what) for key in (above, below)]
        if None not in pair:
            pair = [(v, None) if what == "memory_mib" else v for v in pair]
            rows.append((name, ratio(*pair), wanted))

    eager, compiled = (("training", name) for name in ("eager", "compiled"))
    bound, top, dense = (("curriculum", name) for name in ("bound", "top_2", "dense"))
    if compiled in found:
        goal = 0.5 if args.size == "small" and "H200" in about["name"] else None
        rows.append(("utilisation (computed), compiled", found[compiled]["mfu_computed"], goal))
    compare("step, eager / compiled", eager, compiled)
    compare("DUO step, top 2 / bound", top, bound, wanted=1.1 if DEVICE.type == "cuda" else None)
    compare("DUO step, dense / top 2", dense, top)
    compare("DUO memory, top 2 / bound", top, bound, "memory_mib", wanted=1.05)
    compare("DUO memory, dense / top 2", dense, top, "memory_mib")
    named = (dict(name=name, value=v[0], standard_error=v[1], wanted=wanted) for name, v, wanted in rows)
    return [row | (dict(wanted=None) if args.smoke else {}) for row in named]


def show(results):
    "One table of everything"
    rows = []
    for part, variants in results.items():
        for name, numbers in variants.items():
            row = {"": f"{part}, {name}", "seconds": plus_minus(numbers["seconds"])}
            for key in ("tokens_per_second", "mfu_usual", "mfu_computed", "nfe"):
                row[key.replace("_", " ")] = plus_minus(numbers[key]) if key in numbers else ""
            memory = numbers["memory_mib"]
            rows.append(row | {"MiB": "" if memory is None else f"{memory:.0f}"})
    table(rows)


def settle(args):
    "Numbers that were not given: those of the papers on a GPU, small ones elsewhere"
    defaults = dict(size="small", length=1024, batch=32, vocab_size=50258, steps=20, sampling_steps=1000)
    defaults |= dict(warmup=3, texts=4) | (ON_CPU if DEVICE.type == "cpu" else {}) | (SMOKE if args.smoke else {})
    for name, value in defaults.items():
        setattr(args, name, getattr(args, name, None) or value)
    return {name: getattr(args, name) for name in defaults}


def variants(args, peak):
    "What there is to measure: its part, its name, and how"
    for name in ("eager", "compiled"):
        yield "training", name, lambda name=name: training(args, peak, name)
    for name in ("bound", "top_2", "dense"):
        yield "curriculum", name, lambda name=name: curriculum(args, name)
    for name in ("MDLM", "UDLM"):
        yield "sampling", name, lambda name=name: sampling(args, name)


def main():
    whole = dict(size="", length=0, batch=0, vocab_size=0, steps=0, sampling_steps=0, texts=0, minutes=7.0)
    args, start = arguments(__doc__.splitlines()[0], **whole), time.monotonic()
    parameters, results = settle(args), {}
    about = device(256 if args.smoke else 2048)
    parameters |= dict(device=about, minutes=args.minutes)
    print(f"{about['name']}, peak {about['peak_flops']:.3g} FLOP/s ({about['peak_from']}); {parameters}")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # else `positions` would break the graph
        for part, name, measured in variants(args, about["peak_flops"]):
            if time.monotonic() - start > 60 * args.minutes:
                print(f"left out after {args.minutes:g} minutes: {part}, {name}")
                continue
            results.setdefault(part, {})[name] = measured()
            report(args, parameters, results, ratios(args, about, results), unfinished=True)
    show(results)
    report(args, parameters, results, ratios(args, about, results))


if __name__ == "__main__":
    main()

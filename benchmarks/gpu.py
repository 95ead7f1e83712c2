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
"""

import gc
import sys

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


def training(args, peak):
    "The masked objective, eager and compiled, with both utilisations"
    objective, found = MDLM(Absorbing(args.vocab_size - 1, args.vocab_size)), {}
    share = (1 - objective.schedule.alpha(objective.times(10_000))).mean().item()
    for name in ("eager", "compiled"):
        config, numbers = train(args, objective, compiled=name == "compiled")
        seconds, error = numbers["seconds"]
        work = {
            "usual": flops(config, args.batch, args.length, 1.0),
            "computed": flops(config, args.batch, args.length, share),
        }
        tokens = args.batch * args.length
        found[name] = numbers | dict(
            tokens_per_second=ratio((tokens, 0.0), (seconds, error)),
            mfu_usual=ratio((work["usual"] / peak, 0.0), (seconds, error)),
            mfu_computed=ratio((work["computed"] / peak, 0.0), (seconds, error)),
            flops=work,
        )
    return found


def sampling(args):
    "Seconds for a batch of texts, and network evaluations for each"
    V, found = args.vocab_size, {}
    for objective in (MDLM(Absorbing(V - 1, V)), UDLM(Uniform(V))):
        clean()
        network = network_for(args, time_conditioning=objective.needs_time).train(False)
        g, canvas = torch.Generator(DEVICE).manual_seed(args.seed), blank(args.texts, args.length).to(DEVICE)

        def write(steps, network=network, objective=objective, canvas=canvas, g=g):
            with half():
                for state in Ancestral(steps).states(network, objective, canvas, g):  # noqa: B007
                    pass
            wait()
            return state

        write(2)
        state, seconds = timed(write, args.sampling_steps)
        nfe = mean(state.nfe.double().tolist())
        found[type(objective).__name__] = dict(seconds=(seconds, None), nfe=nfe, memory_mib=memory_mib())
    return found


def curriculum(args):
    "Steps of uniform diffusion, and of DUO's curriculum from two coordinates or from all, with a quarter of the batch"
    V = args.vocab_size
    bound, found = UDLM(Uniform(V)), {}
    objectives = {"bound": bound}
    for name, top_k in (("top_2", 2), ("dense", None)):
        objectives[name] = DUO(Uniform(V), duality=Duality(V), top_k=top_k).in_training(0)
    for name, objective in objectives.items():
        _, found[name] = train(args, objective, batch=max(1, args.batch // 4), time_conditioning=True)
    return found


def ratios(args, about, results):
    "What is compared, and what is wanted of a real run"
    goal = 0.5 if args.size == "small" and "H200" in about["name"] else None
    rows = [("utilisation (computed), compiled", results["training"]["compiled"]["mfu_computed"], goal)]
    eager, compiled = (results["training"][name]["seconds"] for name in ("eager", "compiled"))
    rows.append(("step, eager / compiled", ratio(eager, compiled), None))
    bound, top, dense = (results["curriculum"][name] for name in ("bound", "top_2", "dense"))
    wanted = 1.1 if DEVICE.type == "cuda" else None
    rows.append(("DUO step, top 2 / bound", ratio(top["seconds"], bound["seconds"]), wanted))
    rows.append(("DUO step, dense / top 2", ratio(dense["seconds"], top["seconds"]), None))
    if bound["memory_mib"]:
        rows.append(("DUO memory, top 2 / bound", (top["memory_mib"] / bound["memory_mib"], None), 1.05))
        rows.append(("DUO memory, dense / top 2", (dense["memory_mib"] / top["memory_mib"], None), None))
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


def main():
    args = arguments(
        __doc__.splitlines()[0], size="", length=0, batch=0, vocab_size=0, steps=0, sampling_steps=0, texts=0
    )
    parameters = settle(args)
    about, results = device(256 if args.smoke else 2048), {}
    print(f"{about['name']}, peak {about['peak_flops']:.3g} FLOP/s ({about['peak_from']}); {parameters}")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # else `positions` would break the graph
        results["training"] = training(args, about["peak_flops"])
    results["sampling"] = sampling(args)
    results["curriculum"] = curriculum(args)
    show(results)
    command = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]).split(" --out")[0]
    report(args, parameters | dict(device=about, command=command), results, ratios(args, about, results))


if __name__ == "__main__":
    main()

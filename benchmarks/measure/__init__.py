"What every benchmark needs: times with an error, the peak memory of a child process, one table, one JSON file"

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path


def arguments(description, **defaults):
    "The command line of a benchmark: `--smoke`, `--out`, `--seed` and a flag for each default"
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--smoke", action="store_true", help="seconds-long check that everything runs; times mean nothing"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the JSON file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    for name, default in defaults.items():
        switch = dict(action="store_true") if default is False else dict(type=type(default), default=default)
        parser.add_argument(f"--{name.replace('_', '-')}", **switch)
    return parser.parse_args()


def mean(values):
    "Mean and its standard error; the error is None for a single value"
    m = sum(values) / len(values)
    if len(values) < 2:
        return m, None
    return m, math.sqrt(sum((v - m) ** 2 for v in values) / (len(values) - 1) / len(values))


def ratio(a, b):
    "Quotient of two (value, standard error) pairs with its standard error to first order"
    value = a[0] / b[0]
    if a[1] is None or b[1] is None:
        return value, None
    return value, value * math.hypot(a[1] / a[0], b[1] / b[0])


def timed(call, *args):
    "What a call returns, and its seconds"
    start = time.perf_counter()
    result = call(*args)
    return result, time.perf_counter() - start


def peak_mib():
    "Largest resident memory of this process so far, in MiB"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def in_child(args, work, script):
    "`work`, run in a process of its own: `script --child TASK`; with `--smoke` in this one, which is quicker"

    def run(task):
        command = [sys.executable, script, "--child", json.dumps(task)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{Path(script).name} {task} failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    return work if args.smoke else run


def command(name):
    "What to type for the same run, wherever its file shall go"
    flags = iter(sys.argv[1:])
    kept = []
    for flag in flags:
        if flag == "--out":
            next(flags)
        elif not flag.startswith("--out="):
            kept.append(flag)
    return " ".join(["python", f"benchmarks/{name}.py", *kept])


def plus_minus(pair, digits=3):
    "A (value, standard error) pair as text"
    value, error = pair
    shown = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    return shown if error is None else f"{shown} ± {error:.2g}"


def table(rows):
    "Print dicts with the same keys as one table"
    columns = list(rows[0])
    cells = [columns, *([str(row[c]) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for cell in cells:
        print("  ".join(text.ljust(width) for text, width in zip(cell, widths, strict=True)).rstrip())


def report(args, parameters, results, ratios, unfinished=False):
    "Write the JSON file of this benchmark and say where; `ratios` have value, standard_error and wanted"
    from dlm.foundations.results import write_results  # not above: `imports` measures what a first import costs

    name = Path(sys.argv[0]).stem
    path = args.out / f"{name}.json"
    write_results(
        path,
        command=command(name),
        seed=args.seed,
        parameters=parameters,
        benchmark=name,
        smoke=args.smoke,
        results=results,
        ratios=ratios,
    )
    if not unfinished:
        print(f"written to {path}")

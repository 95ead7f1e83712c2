"What every benchmark needs: times with an error, the peak memory of a child process, one table, one JSON file"

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ("dlm", "torch", "transformers", "datasets", "numpy")


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


def processor():
    "Name of the processor, as far as the system tells"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def machine():
    "Where the numbers come from"
    threads = os.environ.get("OMP_NUM_THREADS") or "default"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return dict(
        system=platform.platform(),
        processor=processor(),
        cores=os.cpu_count(),
        threads=threads,
        memory_gib=round(memory, 1),
        load=load,
    )


def versions():
    "Versions of Python and of the packages that matter"
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return dict(python=platform.python_version(), **found)


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


def report(args, parameters, results, ratios):
    "Write the JSON file of this benchmark and say where; `ratios` have value, standard_error and wanted"
    name = Path(sys.argv[0]).stem
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.json"
    content = dict(
        benchmark=name,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        smoke=args.smoke,
        seed=args.seed,
        machine=machine(),
        versions=versions(),
        parameters=parameters,
        results=results,
        ratios=ratios,
    )
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")

"""Imports: `import dlm` over `import torch`, and what `dlm.diffusion` and `dlm.sampling` load beside torch

Each import runs in a fresh process, in turns.
"""

import json
import pkgutil
import sys
import time

from measure import arguments, in_child, mean, plus_minus, ratio, report, table

HEAVY = (
    "transformers",
    "datasets",
    "accelerate",
    "matplotlib",
    "seaborn",
    "pandas",
    "scipy",
    "sklearn",
    "nbdev",
    "fastcore",
)
WANTED = 0.2


def modules_of(room):
    "The modules of a room, without importing them"
    from importlib.util import find_spec

    return [room, *(f"{room}.{m.name}" for m in pkgutil.iter_modules(find_spec(room).submodule_search_locations))]


def work(task):
    "Import groups of modules one after another: the seconds of each group, and what is loaded in the end"
    seconds = []
    for names in task["imports"]:
        start = time.perf_counter()
        for name in names:
            __import__(name)
        seconds.append(time.perf_counter() - start)
    return dict(seconds=seconds, heavy=[name for name in HEAVY if name in sys.modules])


def main():
    args = arguments(__doc__.splitlines()[0], repeats=5)
    if args.child:
        return print(json.dumps(work(json.loads(args.child))))
    if args.smoke:
        args.repeats = 1
    rooms = {"dlm": ["dlm"], **{f"{room}.*": modules_of(room) for room in ("dlm.diffusion", "dlm.sampling")}}
    runs, run = {name: [] for name in rooms}, in_child(args, work, __file__)
    for _ in range(args.repeats):
        for name, modules in rooms.items():
            runs[name].append(run(dict(imports=[["torch"], modules])))
    results, ratios, rows = {}, [], []
    for name, found in runs.items():
        torch_seconds, added = (mean([run["seconds"][i] for run in found]) for i in (0, 1))
        heavy = sorted({m for run in found for m in run["heavy"]})
        over = ratio(added, torch_seconds)
        results[name] = dict(torch=torch_seconds, added=added, heavy=heavy)
        wanted = WANTED if name == "dlm" else None
        ratios.append(
            dict(name=f"{name} / torch", value=over[0], standard_error=over[1], wanted=None if args.smoke else wanted)
        )
        rows.append(
            {
                "import": name,
                "torch s": plus_minus(torch_seconds),
                "added s": plus_minus(added),
                "wanted": f"<= {wanted}" if wanted else "",
                "added / torch": plus_minus(over),
                "heavier than torch": ", ".join(heavy) or "nothing",
            }
        )
    table(rows)
    report(args, dict(repeats=args.repeats, modules=rooms), results, ratios)


if __name__ == "__main__":
    main()

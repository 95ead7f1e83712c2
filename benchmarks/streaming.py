"""Streaming: peak memory of preparing a text, and of one of ten times its size

Each size runs in a process of its own. Memory is flat when the ratio is near 1, far from the 10 of the text.
"""

import json
import tempfile
from pathlib import Path

from measure import arguments, in_child, mean, peak_mib, plus_minus, ratio, report, table, timed

from dlm.data.packing import Packing, load_blocks
from dlm.data.text import TextCorpus, locate, read_text
from dlm.data.tokenizers import alphabet_of, character_tokenizer

PLAYS = "dlm:tinyshakespeare.txt.gz"
WANTED = 1.1


def plays():
    "The bundled text"
    return "".join(read_text(locate(PLAYS)))


def write_corpus(path, characters):
    "The bundled plays again and again, up to a number of characters"
    text = plays()
    with open(path, "w", encoding="utf-8") as f:
        for start in range(0, characters, len(text)):
            f.write(text[: characters - start])


def prepare(task):
    "Read, encode, pack and write one file"
    corpus = TextCorpus(files={"train": task["file"]})
    tokenizer = character_tokenizer(alphabet_of(plays()))
    return load_blocks(corpus, "train", tokenizer, Packing(task["length"]), cache_dir=task["cache"])


def work(task):
    "Do one task: its seconds, its blocks and the peak memory"
    before = peak_mib()
    blocks, seconds = timed(prepare, task)
    return dict(seconds=seconds, blocks=len(blocks), before_mib=before, peak_mib=peak_mib())


def main():
    args = arguments(__doc__.splitlines()[0], repeats=2, characters=4_000_000)
    if args.child:
        return print(json.dumps(work(json.loads(args.child))))
    length, sizes = 256, {"1x": args.characters, "10x": 10 * args.characters}
    if args.smoke:
        sizes, args.repeats = {"1x": 20_000, "10x": 200_000}, 1
    runs, run = {size: [] for size in sizes}, in_child(args, work, __file__)
    with tempfile.TemporaryDirectory() as folder:
        for size, characters in sizes.items():
            write_corpus(Path(folder) / size, characters)
        for turn in range(args.repeats):
            for size in sizes:
                task = dict(file=f"{folder}/{size}", cache=f"{folder}/cache {size} {turn}", length=length)
                runs[size].append(run(task))
    results, rows = {}, []
    for size, found in runs.items():
        numbers = {what: mean([run[what] for run in found]) for what in ("peak_mib", "before_mib", "seconds")}
        results[f"preparation {size}"] = numbers | dict(characters=sizes[size], blocks=found[0]["blocks"])
        over = ratio(numbers["peak_mib"], results["preparation 1x"]["peak_mib"])
        rows.append(
            {
                "task": "preparation",
                "text": size,
                "characters": f"{sizes[size]:,}",
                "seconds": plus_minus(numbers["seconds"]),
                "peak MiB": plus_minus(numbers["peak_mib"], digits=5),
                "of 1x": plus_minus(over),
                "wanted": f"<= {WANTED}" if size == "10x" and not args.smoke else "",
            }
        )
    ratios = [dict(name="preparation: peak memory, 10x / 1x", value=over[0], standard_error=over[1])]
    ratios[0]["wanted"] = None if args.smoke else WANTED
    table(rows)
    report(args, dict(characters=sizes, length=length, repeats=args.repeats), results, ratios)


if __name__ == "__main__":
    main()

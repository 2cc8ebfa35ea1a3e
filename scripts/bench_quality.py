#!/usr/bin/env python3
"""What Q4_0 costs a model, by the way in which its scales are chosen: perplexity, its change, and the KL divergence, each with its error.

    python3 scripts/bench_quality.py --st-tool target/release/st-tool [--records 12000] [CHECKPOINT]

CHECKPOINT is the bundled model's. Texts are made by its corpus script, of seeds that it was not trained on: one for the importance matrix, one
that is measured. Records that the training corpus has are left out of both. Python's standard library alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = os.path.join(HERE, "..", "models", "tiny")


def chat(record):
    said = "".join(f"<|im_start|>{who}\n{text}<|im_end|>\n" for who, text in record["m"])
    return said + "<|endoftext|>"


def records(folder, seed, n):
    corpus = os.path.join(folder, f"corpus-{seed}")
    script = os.path.join(TINY, "training", "make_corpus.py")
    subprocess.run([sys.executable, script, corpus, "--records", str(n), "--seed", str(seed)], check=True, stdout=subprocess.DEVNULL)
    lines = open(os.path.join(corpus, "train.jsonl"), encoding="utf-8")
    return [chat(record) for record in map(json.loads, lines) if "m" in record]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("checkpoint", nargs="?", default=os.path.join(TINY, "checkpoint"))
    ap.add_argument("--st-tool", default="target/release/st-tool")
    ap.add_argument("--records", type=int, default=12000)
    args = ap.parse_args()

    def tool(*command):
        command = [args.st_tool, *command, "--quiet"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        place = lambda name: os.path.join(folder, name)
        trained = set(records(folder, 2, 36000))
        texts = {}
        for name, seed, n in [("measured", 991, args.records), ("imatrix", 992, 2000)]:
            texts[name] = [text for text in records(folder, seed, n) if text not in trained]
            trained.update(texts[name])
            with open(place(f"{name}.txt"), "w", encoding="utf-8") as file:
                file.write("\n".join(texts[name]))
        tool("quantize", args.checkpoint, "--f32", "-o", place("f32.gguf"))
        tool("profile", place("f32.gguf"), "--file", place("imatrix.txt"), "--output", place("profile"))
        matrix = next(os.path.join(place("profile"), name) for name in os.listdir(place("profile")) if "imatrix" in name)
        ways = {"round to nearest": [], "search": ["--search"], "search, importance matrix": ["--imatrix", matrix]}
        base = json.loads(tool("perplexity", place("f32.gguf"), "--file", place("measured.txt"), "--json"))
        print(f"{len(texts['measured'])} records, {base['tokens_scored']} tokens scored; "
              f"f32: perplexity {base['perplexity']:.4f} ± {base['standard_error']:.4f}")
        for way, options in ways.items():
            model = place("q4.gguf")
            tool("quantize", args.checkpoint, "--q4_0", *options, "--force", "-o", model)
            said = tool("perplexity", model, "--file", place("measured.txt"), "--against", place("f32.gguf"), "--json")
            print(f"{way}: {json.dumps(json.loads(said))}", flush=True)


if __name__ == "__main__":
    main()

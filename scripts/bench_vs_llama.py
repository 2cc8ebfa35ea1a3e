#!/usr/bin/env python3
"""Speed and memory of st-tool beside llama.cpp, alternating on one machine in one sitting.

    python3 scripts/bench_vs_llama.py --st-tool target/release/st-tool --llama-bin BUILD/bin MODEL.gguf \\
        [--st-model MODEL-offload.gguf] [--rounds 3] [--reps 3] [--threads 2,1] [--tests decode,depth,p512,p4096,start] [--repack 1]
        [--isa avx2]

BUILD/bin holds llama.cpp's llama-bench and llama-completion, built for this machine. Each round runs every test once
with either program, one after the other, and the next round in the opposite order, so that drift meets both; before each run the
machine rests (--settle), since a system takes its time to take back some gigabytes from the run before. Tests:

    decode   128 tokens generated from an empty context
    depth    64 tokens generated after 4096 tokens
    p512     a prompt of 512 tokens
    p4096    a prompt of 4096 tokens
    start    from process start to the first byte of the answer to a 20-token prompt, the file in the page cache

Printed: medians over rounds, their ranges, the ratio (st-tool to llama.cpp; for times the inverse, so that more is always
better), and the peak resident memory of either program. --json FILE keeps every single figure.
--env NAME=VALUE is set for llama.cpp's programs alone; --label says what it is called.
"""
import argparse
import json
import sys
import time

import procs

TESTS = {  # name -> prompt, generated, depth, unit
    "decode": (0, 128, 0),
    "depth": (0, 64, 4096),
    "p512": (512, 0, 0),
    "p4096": (4096, 0, 0),
}
PROMPT = "Once upon a time there was a small fox who lived at the edge of a forest and one day"


def llama_speed(args, test, threads):
    prompt, generated, depth = TESTS[test]
    run = procs.run([f"{args.llama_bin}/llama-bench", "-m", args.model, "-p", prompt, "-n", generated, "-d", depth,
                     "-r", args.reps, "-t", threads, "--repack", args.repack, "-o", "json"], env=args.env)
    return json.loads(run.out)[0]["avg_ts"], run.peak_bytes


def st_isa(args):
    return ["--isa", args.isa] if args.isa else []


def st_speed(args, test, threads):
    prompt, generated, depth = TESTS[test]
    run = procs.run([args.st_tool, "bench", args.st_model, "-p", prompt, "-n", generated, "-d", depth, "-r", args.reps,
                     "--threads", threads, "-o", "json", "--quiet"] + st_isa(args))
    return json.loads(run.out)["tests"][0]["tokens_per_second"]["median"], run.peak_bytes


def llama_start(args, threads):
    procs.warm(args.model)
    run = procs.run([f"{args.llama_bin}/llama-completion", "-m", args.model, "-p", PROMPT, "-n", 1, "--temp", 0, "-c", 512,
                     "-t", threads, "-no-cnv", "--no-warmup", "--no-display-prompt", "--simple-io", "--log-disable"]
                    + ([] if args.repack else ["--no-repack"]), env=args.env)
    return run.first_byte or run.seconds, run.peak_bytes


def st_start(args, threads):
    procs.warm(args.st_model)
    run = procs.run([args.st_tool, "run", args.st_model, "--raw", "-p", PROMPT, "-n", 1, "--temp", 0, "--ctx", 512,
                     "--threads", threads, "--quiet"] + st_isa(args))
    return run.first_byte or run.seconds, run.peak_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--st-model", help="the file st-tool runs (default: the same)")
    parser.add_argument("--st-tool", required=True)
    parser.add_argument("--llama-bin", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reps", type=int, default=3, help="repetitions in each process, after one that warms up")
    parser.add_argument("--threads", default="2,1")
    parser.add_argument("--tests", default="decode,depth,p512,p4096,start")
    parser.add_argument("--repack", type=int, default=1, help="1: llama.cpp repacks weights at load; 0: not")
    parser.add_argument("--settle", type=float, default=8, help="seconds of rest before each run")
    parser.add_argument("--env", action="append", default=[], help="NAME=VALUE for llama.cpp")
    parser.add_argument("--isa", help="instruction set for st-tool (give a llama.cpp that is built for the same)")
    parser.add_argument("--label", default="llama.cpp")
    parser.add_argument("--json")
    args = parser.parse_args()
    args.st_model = args.st_model or args.model
    args.env = dict(pair.split("=", 1) for pair in args.env)
    tests = args.tests.split(",")
    if unknown := set(tests) - set(TESTS) - {"start"}:
        sys.exit(f"no such test: {', '.join(unknown)}")

    procs.warm(args.model)
    figures = {}  # (threads, test, program) -> list of (figure, peak)
    for round_number in range(args.rounds):
        for threads in map(int, args.threads.split(",")):
            for test in tests:
                pair = {
                    "llama": (lambda: llama_start(args, threads)) if test == "start"
                    else (lambda: llama_speed(args, test, threads)),
                    "st": (lambda: st_start(args, threads)) if test == "start" else (lambda: st_speed(args, test, threads)),
                }
                for program in sorted(pair, reverse=round_number % 2 == 1):
                    time.sleep(args.settle)
                    value = pair[program]()
                    figures.setdefault((threads, test, program), []).append(value)
                    print(f"round {round_number + 1}, {threads} threads, {test}, {program}: {value[0]:.2f}",
                          file=sys.stderr, flush=True)

    rows = []
    for threads in map(int, args.threads.split(",")):
        for test in tests:
            theirs, ours = (figures[threads, test, program] for program in ("llama", "st"))
            a, b = (procs.median([f for f, _ in runs]) for runs in (theirs, ours))
            unit = "s" if test == "start" else "tok/s"

            def show(middle, runs):
                values = [f for f, _ in runs]
                return f"{middle:.2f} {unit} ({min(values):.2f}–{max(values):.2f})"

            rows.append([threads, test, show(a, theirs), show(b, ours), f"{a / b if test == 'start' else b / a:.2f}×",
                         procs.gb(procs.median([p for _, p in theirs])), procs.gb(procs.median([p for _, p in ours]))])
    print(procs.table(["threads", "test", args.label, "st-tool", "ratio", f"peak, {args.label}", "peak, st-tool"], rows))
    if args.json:
        with open(args.json, "w") as f:
            json.dump([{"threads": k[0], "test": k[1], "program": k[2], "runs": v} for k, v in figures.items()], f, indent=1)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Convert a checkpoint with st-tool and with llama.cpp's two steps, compare time, memory and the resulting files.

    python3 scripts/compare_convert.py --st-tool target/release/st-tool --llama-src LLAMA_CPP --llama-bin BUILD/bin \\
        --work DIR CHECKPOINT [--rounds 1] [--threads 2] [--python PYTHON] [--outtype bf16] [--keep]

LLAMA_CPP is llama.cpp's source tree (its convert_hf_to_gguf.py needs torch, transformers, numpy and sentencepiece in
PYTHON), BUILD/bin holds llama-quantize. DIR needs room for the 16-bit file and two quantized ones. Each round runs

    convert_hf_to_gguf.py --outtype bf16, then llama-quantize --pure … q4_0
    st-tool quantize --q4_0, and once more with --threads 1

with the input dropped from the page cache before each. Printed: wall time, peak resident memory, the largest part of it
that is not mapped files, and the share of the disk's sequential throughput (input read + output written, over the time that
plain reading and writing of as many bytes takes). Then `st-tool quantize --compare` against llama-quantize's file, and
whether st-tool's files at different thread counts are equal. Exit status 1 where a comparison fails.

llama.cpp's converter recognises tokenizers by a hash of how they split a text and refuses those it has not met, such as
made-up ones; it is told here that the tokenizer is Qwen2's, and otherwise left as it is.
"""
import argparse
import filecmp
import glob
import os
import sys
import time

import procs

PATCHED = """
import runpy, sys
sys.path.insert(0, sys.argv[1]); sys.path.insert(1, sys.argv[1] + "/gguf-py")
try:
    from conversion import base
except ImportError:
    base = None
if base is not None:
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = [sys.argv[1] + "/convert_hf_to_gguf.py"] + sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def remove(path):
    if os.path.exists(path):
        os.remove(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--st-tool", required=True)
    parser.add_argument("--llama-src", required=True)
    parser.add_argument("--llama-bin", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--outtype", default="bf16")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--keep", action="store_true", help="leave the quantized files")
    args = parser.parse_args()

    shards = glob.glob(os.path.join(args.checkpoint, "*.safetensors"))
    if not shards:
        sys.exit(f"no safetensors in {args.checkpoint}")
    input_bytes = sum(map(os.path.getsize, shards))
    path = {name: os.path.join(args.work, name + ".gguf") for name in ("llama-16bit", "llama-q4_0", "st-q4_0", "st-q4_0-1")}

    def drop():
        for shard in shards:
            procs.drop_from_cache(shard)

    drop()
    start = time.monotonic()
    for shard in shards:
        procs.warm(shard)
    read_rate = input_bytes / (time.monotonic() - start)
    write_rate = procs.disk_write_rate(args.work)
    print(f"disk in sequence: reads {read_rate / 1e6:.0f} MB/s, writes {write_rate / 1e6:.0f} MB/s", flush=True)

    results = {}

    def step(name, command):
        run = procs.run(command)
        results.setdefault(name, []).append(run)
        print(f"{name}: {run.seconds:.1f} s", file=sys.stderr, flush=True)

    for _ in range(args.rounds):
        for file in path.values():
            remove(file)
        drop()
        step("convert_hf_to_gguf", [args.python, "-c", PATCHED, os.path.abspath(args.llama_src), args.checkpoint, "--outtype",
                                    args.outtype, "--outfile", path["llama-16bit"]])
        step("llama-quantize", [f"{args.llama_bin}/llama-quantize", "--pure", path["llama-16bit"], path["llama-q4_0"], "q4_0",
                                args.threads])
        remove(path["llama-16bit"])
        for name, file, threads in [("st-tool", "st-q4_0", args.threads), ("st-tool, 1 thread", "st-q4_0-1", 1)]:
            drop()
            step(name, [args.st_tool, "quantize", args.checkpoint, "--q4_0", "-o", path[file], "--threads", threads, "--quiet"])

    output_bytes = os.path.getsize(path["st-q4_0"])
    least = input_bytes / read_rate + output_bytes / write_rate
    rows = []
    for name, runs in results.items():
        seconds = procs.median([r.seconds for r in runs])
        ours = name.startswith("st-tool")
        rows.append([name, f"{seconds:.1f} s", procs.gb(max(r.peak_bytes for r in runs)),
                     f"{max(r.peak_anonymous for r in runs) / (1 << 20):.0f} MiB",
                     f"{100 * least / seconds:.0f} %" if ours else "–"])
    print(procs.table(["", "time", "peak resident", "of it not mapped files", "share of disk throughput"], rows))
    theirs = sum(procs.median([r.seconds for r in results[n]]) for n in ("convert_hf_to_gguf", "llama-quantize"))
    ours = procs.median([r.seconds for r in results["st-tool"]])
    print(f"end to end: llama.cpp {theirs:.1f} s, st-tool {ours:.1f} s: {theirs / ours:.2f}×")

    same = filecmp.cmp(path["st-q4_0"], path["st-q4_0-1"], shallow=False)
    print(f"{args.threads} threads and 1 thread: {'the same bytes' if same else 'DIFFERENT bytes'}")
    compare = procs.run([args.st_tool, "quantize", args.checkpoint, "--q4_0", "--compare", path["llama-q4_0"]], check=False)
    print(f"compared with llama-quantize's file: status {compare.status}\n{(compare.out + compare.err)[-2000:]}")
    if not args.keep:
        for file in path.values():
            remove(file)
    sys.exit(0 if same and compare.status == 0 else 1)


if __name__ == "__main__":
    main()

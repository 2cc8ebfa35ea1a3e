#!/usr/bin/env python3
"""st-tool under a memory budget, inside a memory cgroup of exactly that size where this machine has one.

    python3 scripts/bench_memory.py --st-tool target/release/st-tool MODEL.gguf [MODEL-offload.gguf …] \\
        [--memory 1GiB] [-n 64] [-p 0] [--rounds 3] [--grid] [--survive 20] [--llama-bin BUILD/bin]

For every file: generation speed with prefetch and without, with direct and with buffered reads; for the generated tokens
hit rate, bytes read per token, seconds stalled and the share of read time hidden behind compute; and the peak of resident
memory measured from outside. Beside it the bound: bytes read per token over what the disk gives here to eight direct reads of 650 KiB in flight
(or the speed in memory, whichever is lower). `--survive N` then runs N times more and counts the runs that the kernel
killed. With --llama-bin, llama-bench runs the first file in the same cgroup, mapped and not repacked.

Every run starts with the file dropped from the page cache. The cgroup (v1 or v2) is a child of this process's own and is
removed at the end; without the right to make one, the runs are unconfined and the output says so.
"""
import argparse
import json
import os
import sys

import procs


def parse_size(text):
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "M": 1 << 20, "G": 1 << 30}
    for suffix, factor in units.items():
        if text.endswith(suffix):
            return int(float(text[: -len(suffix)]) * factor)
    return int(text)


class Cgroup:
    """A memory cgroup that programs can be started in."""

    def __init__(self, limit):
        self.path = None
        self.problem = None
        for make in (self.make_v1, self.make_v2):
            try:
                if make(limit):
                    return
            except OSError as error:
                self.problem = str(error)
        self.problem = self.problem or "no memory controller"

    @staticmethod
    def own(controller):
        with open("/proc/self/cgroup") as f:
            for line in f:
                _, controllers, path = line.rstrip("\n").split(":", 2)
                if controller in controllers.split(","):
                    return path
        return None

    def make(self, parent, name, value, extra=()):
        path = os.path.join(parent, f"st-tool-bench-{os.getpid()}")
        os.mkdir(path)
        try:
            for file, content in [(name, value), *extra]:
                with open(os.path.join(path, file), "w") as f:
                    f.write(str(content))
        except OSError:
            os.rmdir(path)
            raise
        self.path = path
        return True

    def make_v1(self, limit):
        own = self.own("memory")
        if own is None:
            return False
        parent = "/sys/fs/cgroup/memory" + own
        return self.make(parent if os.path.isdir(parent) else "/sys/fs/cgroup/memory", "memory.limit_in_bytes", limit)

    def make_v2(self, limit):
        own = self.own("")
        parent = "/sys/fs/cgroup" + (own or "/")
        if not os.path.exists(os.path.join(parent, "cgroup.controllers")):
            return False
        return self.make(parent, "memory.max", limit, [("memory.swap.max", 0)])

    def enter(self):
        """In a child process, before it starts its program."""
        if self.path:
            with open(os.path.join(self.path, "cgroup.procs"), "w") as f:
                f.write(str(os.getpid()))

    def remove(self):
        if self.path:
            os.rmdir(self.path)


def st_run(args, group, file, options):
    procs.drop_from_cache(file)
    return procs.run([args.st_tool, "bench", file, "-p", args.p, "-n", args.n, "-r", 1, "--memory", args.memory, "--threads",
                      args.threads, "-o", "json", "--quiet", *options], check=False, prepare=group.enter)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--st-tool", required=True)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("-n", type=int, default=64, help="tokens to generate")
    parser.add_argument("-p", type=int, default=0, help="prompt tokens, measured apart")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--grid", action="store_true", help="prefetch on and off against 1, 2, 4, 8 reads in flight")
    parser.add_argument("--survive", type=int, default=0)
    parser.add_argument("--llama-bin")
    parser.add_argument("--json")
    args = parser.parse_args()

    limit = parse_size(args.memory)
    disk = procs.disk_read_rate(args.models[0])
    print(f"disk: {disk / 1e6:.0f} MB/s in direct reads of 650 KiB, eight in flight")
    group = Cgroup(limit)
    print(f"confined to {limit} bytes by {group.path}" if group.path else f"not confined: {group.problem}")
    variants = {
        "auto": [],
        "direct": ["--io", "direct"],
        "buffered": ["--io", "buffered"],
        "no guesses": ["--no-guess"],
        "no prefetch": ["--no-prefetch"],
    }
    if args.grid:
        prefetch = {"guesses": [], "prefetch": ["--no-guess"], "neither": ["--no-prefetch"]}
        variants = {f"{name}, {n} reads": [*options, "--reads", n] for name, options in prefetch.items() for n in (1, 2, 4, 8)}
    kept, rows = [], []
    try:
        speeds = {}
        for _ in range(args.rounds):
            for file in args.models:
                for name, options in variants.items():
                    run = st_run(args, group, file, options)
                    if run.status != 0:
                        print(f"{file}, {name}: status {run.status}: {run.err[-500:]}", file=sys.stderr)
                        continue
                    kept.append({"file": file, "variant": name, "peak": run.peak_bytes, "out": json.loads(run.out)})
                    speeds.setdefault((file, name), []).append(kept[-1])
        for (file, name), runs in speeds.items():
            generation = [next(t for t in r["out"]["tests"] if t["test"].startswith("generation")) for r in runs]
            prompt = [next(t for t in r["out"]["tests"] if t["test"].startswith("prompt")) for r in runs] if args.p else []
            experts = [g["experts"] for g in generation]
            speed = procs.median([g["tokens_per_second"]["median"] for g in generation])
            read = procs.median([e["bytes_read_per_token"] for e in experts])
            peak = max(r["peak"] for r in runs)
            rows.append([
                os.path.basename(file), name, f"{speed:.2f}",
                f"{procs.median([t['tokens_per_second']['median'] for t in prompt]):.1f}" if prompt else "–",
                f"{100 * procs.median([e['hit_rate'] for e in experts]):.1f} %", f"{read / 1e6:.0f}",
                f"{disk / read:.2f}" if read else "–",
                f"{100 * procs.median([e['hidden_share'] for e in experts]):.0f} %",
                f"{procs.median([e['stall_seconds'] for e in experts]):.2f}",
                f"{peak / (1 << 20):.0f} MiB{'' if peak <= limit else ' OVER'}",
            ])
        headers = ["file", "variant", "tok/s", "prompt tok/s", "hits", "MB read per token", "disk bound tok/s", "hidden",
                   "stall s", "peak"]
        print(procs.table(headers, rows))
        if args.survive:
            runs = [st_run(args, group, args.models[-1], []) for _ in range(args.survive)]
            killed = sum(r.status < 0 for r in runs)
            failed = sum(r.status > 0 for r in runs)
            worst = max(r.peak_bytes for r in runs)
            print(f"{args.survive} runs more: {killed} killed, {failed} failed, largest peak {worst / (1 << 20):.0f} MiB")
        if args.llama_bin:
            for _ in range(args.rounds):
                procs.drop_from_cache(args.models[0])
                run = procs.run([f"{args.llama_bin}/llama-bench", "-m", args.models[0], "-p", 0, "-n", args.n, "-r", 1, "-t",
                                 args.threads, "--repack", 0, "-o", "json"], check=False, prepare=group.enter)
                if run.status != 0:
                    print(f"llama.cpp: status {run.status}")
                else:
                    print(f"llama.cpp, mapped: {json.loads(run.out)[0]['avg_ts']:.2f} tok/s, peak {procs.gb(run.peak_bytes)}")
    finally:
        group.remove()
    if args.json:
        with open(args.json, "w") as f:
            json.dump(kept, f, indent=1)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Throughput and memory of `st-tool download` beside curl, from the hub on loopback, in one run.

    cargo build --release && cargo build --release -p st-hub --example hub_server
    python3 scripts/bench_download.py [--mib 1024] [--files 4] [--rounds 3] [--dir DIR]

Each round downloads the same files with curl (one after the other, as a shell script would; and with `--parallel`) and with
st-tool (`--jobs 1` and the default), in an order that changes, each time to an empty folder. curl verifies nothing; st-tool
hashes every byte. Medians are compared. Peak memory is the kernel's (`ru_maxrss`), idle is that of `st-tool --version`; neither can be less than
that of the Python which starts them.
"""
import argparse
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from hub import Hub, environment


def timed(command, env):
    """Seconds and peak resident MiB."""
    start = time.monotonic()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{command} failed with {status}")
    return time.monotonic() - start, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--st-tool", default="target/release/st-tool")
    parser.add_argument("--server", default="target/release/examples/hub_server")
    parser.add_argument("--mib", type=int, default=1024, help="size of each file")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", help="the disk to write to")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=options.dir) as folder, Hub(options.server, options.mib, options.files) as hub:
        out = pathlib.Path(folder) / "out"
        env = environment(hub, out)
        outputs = [argument for file in hub.files for argument in ("-o", str(out / file), hub.url(file))]
        commands = {
            "curl": ["curl", "-sSfL", "--create-dirs", *outputs],
            "curl --parallel": ["curl", "-sSfL", "--parallel", "--create-dirs", *outputs],
            "st-tool --jobs 1": [options.st_tool, "download", "4b", "--jobs", "1"],
            "st-tool": [options.st_tool, "download", "4b"],
        }
        idle = timed([options.st_tool, "--version"], env)[1]
        seconds, peaks = {name: [] for name in commands}, {name: 0.0 for name in commands}
        for n in range(options.rounds):
            order = list(commands)
            for name in order[n % len(order):] + order[: n % len(order)]:
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
                took, peak = timed(commands[name], env)
                seconds[name].append(took)
                peaks[name] = max(peaks[name], peak)
        size = options.mib * options.files
        print(f"{options.files} files, {size} MiB, {options.rounds} rounds; idle {idle:.0f} MiB")
        print("| | s (median) | min | max | MiB/s | of curl | peak MiB |\n|---|---|---|---|---|---|---|")
        curl = statistics.median(seconds["curl"])
        for name, times in seconds.items():
            median = statistics.median(times)
            print(f"| {name} | {median:.2f} | {min(times):.2f} | {max(times):.2f} | {size / median:.0f} "
                  f"| {curl / median:.2f} | {peaks[name]:.0f} |")


if __name__ == "__main__":
    main()

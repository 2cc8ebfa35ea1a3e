#!/usr/bin/env python3
"""A checkpoint that is converted while it is fetched from a hub on loopback which cuts connections, by a program that is killed on the way.

    synth make DIR --preset 4b --layers 8 --shard-mib 512
    python3 scripts/convert_arriving.py --st-tool target/release/st-tool DIR [--cuts 5] [--kills 2] [--mib-per-second 0]

The hub cuts CUTS connections in the middle of shards; the program is killed (SIGKILL) KILLS times, once an equal part of the bytes was sent, and
started again. Then: the file is that of `st-tool quantize DIR --q4_0`, byte for byte; how many bytes were sent; the most that lay on the disk beyond
the output; and the time of one undisturbed conversion beside a download followed by one. Python's standard library alone.
"""
import argparse
import hashlib
import http.server
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

REPO = "Tiiny/SmallThinker-4BA0.6B-Instruct"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    def __init__(self, folder, mib_per_second):
        self.files, self.cuts, self.sent, self.lock = {}, [], 0, threading.Lock()
        self.rate = mib_per_second * 2**20
        for path in sorted(pathlib.Path(folder).iterdir()):
            if path.is_file() and not path.name.startswith("."):
                digest = hashlib.sha256()
                with open(path, "rb") as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
                self.files[path.name] = (path, path.stat().st_size, digest.hexdigest())
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def json(self, value):
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_HEAD(self):
                self.answer(False)

            def do_GET(self):
                self.answer(True)

            def answer(self, with_body):
                path = self.path.split("?")[0]
                if path.startswith("/api/") and "/tree/" in path:
                    tree = [{"type": "file", "path": name, "oid": sha[:40], "size": size, "lfs": {"oid": sha, "size": size}}
                            for name, (_, size, sha) in hub.files.items()]
                    return self.json(tree)
                if path.startswith("/api/"):
                    return self.json({"sha": COMMIT, "id": REPO})
                name = path.rsplit("/", 1)[-1]
                if name not in hub.files:
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                path, size, sha = hub.files[name]
                start, end = 0, size
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if asked:
                    start, end = int(asked[1]), min(size, int(asked[2]) + 1) if asked[2] else size
                self.send_response(206 if asked else 200)
                for key, value in {"Content-Length": end - start, "ETag": f'"{sha}"', "X-Linked-ETag": f'"{sha}"', "X-Linked-Size": size,
                                   "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}.items():
                    self.send_header(key, str(value))
                if asked:
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
                self.end_headers()
                if with_body:
                    hub.send(self, path, start, end)

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def send(self, handler, path, start, end):
        with open(path, "rb") as file:
            file.seek(start)
            while start < end:
                chunk = file.read(min(1 << 18, end - start))
                with self.lock:
                    self.sent += len(chunk)
                    is_cut = bool(self.cuts) and self.sent >= self.cuts[0]
                    if is_cut:
                        self.cuts.pop(0)
                if is_cut:
                    handler.close_connection = True
                    return handler.connection.close()
                handler.wfile.write(chunk)
                start += len(chunk)
                if self.rate:
                    time.sleep(len(chunk) / self.rate)


def disk(folder):
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(at, name)).st_blocks * 512
            except OSError:
                pass
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--st-tool", default="target/release/st-tool")
    parser.add_argument("--cuts", type=int, default=5)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--mib-per-second", type=float, default=0, help="0: as fast as it goes")
    parser.add_argument("--dir", help="the disk to write to")
    options = parser.parse_args()
    tool = os.path.realpath(options.st_tool)

    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        folder = pathlib.Path(folder)
        expected = folder / "expected.gguf"
        subprocess.run([tool, "quantize", os.path.realpath(options.checkpoint), "--q4_0", "-o", expected, "--quiet"], check=True)
        hub = Hub(options.checkpoint, options.mib_per_second)
        total = sum(size for _, size, _ in hub.files.values())
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_")) and "proxy" not in k.lower()}

        def env(name):
            home = folder / name
            (home / "out").mkdir(parents=True, exist_ok=True)
            return {**keep, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_CACHE": str(home / "hub"),
                    "XDG_CACHE_HOME": str(home / "cache"), "XDG_DATA_HOME": str(home / "data"), "HOME": str(home)}

        command = [tool, "quantize", "4b", "--q4_0", "-o", "out/m.gguf", "--yes", "--quiet"]
        hub.cuts = [total * (i + 1) // (options.cuts + 1) for i in range(options.cuts)]
        kills = [total * (2 * i + 1) // (2 * options.kills) for i in range(options.kills)] if options.kills else []
        most, runs, bad = 0, 0, env("bad")
        while True:
            runs += 1
            process = subprocess.Popen(command, cwd=folder / "bad", env=bad, stderr=subprocess.PIPE, text=True)
            while process.poll() is None:
                time.sleep(0.05)
                most = max(most, disk(folder / "bad"))
                if kills and hub.sent >= kills[0]:
                    kills.pop(0)
                    process.send_signal(signal.SIGKILL)
            said = process.stderr.read().strip()
            if process.returncode == 0:
                break
            if process.returncode != -signal.SIGKILL:
                sys.exit(f"run {runs} failed: {said}")
        made = folder / "bad" / "out" / "m.gguf"
        same = subprocess.run(["cmp", made, expected]).returncode == 0
        size = made.stat().st_size
        print(f"{options.cuts - len(hub.cuts)} cuts, {options.kills - len(kills)} kills, {runs} runs: the bytes are {'the same' if same else 'OTHERS'}")
        print(f"sent {hub.sent / 1e9:.2f} GB of {total / 1e9:.2f}; output {size / 1e9:.2f} GB; "
              f"on the disk at most {most / 1e9:.2f} GB, {(most - size) / 1e9:.2f} beyond the output")
        shutil.rmtree(folder / "bad")

        hub.cuts, whole = [], env("whole")
        begun = time.monotonic()
        subprocess.run(command, cwd=folder / "whole", env=whole, check=True)
        arriving = time.monotonic() - begun
        shutil.rmtree(folder / "whole")
        two = env("two")
        begun = time.monotonic()
        subprocess.run([tool, "download", "4b", "--yes", "--quiet"], cwd=folder / "two", env=two, check=True)
        subprocess.run(command, cwd=folder / "two", env=two, check=True)
        print(f"converted while it is fetched: {arriving:.1f} s; fetched and then converted: {time.monotonic() - begun:.1f} s")
        sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()

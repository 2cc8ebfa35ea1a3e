#!/usr/bin/env python3
"""st-tool serve with several clients of different texts: tokens per second of all, time to the first token, gaps between tokens.

    python3 scripts/bench_server.py --st-tool target/release/st-tool MODEL.gguf [--clients 1,2,4,8] [-p 128] [-n 64]
        [--long 4096] [--prefix 2000] [--rounds 3] [-- --memory 1GiB …]

What follows `--` is handed to the server. Prompts are token ids, so that a model without a tokenizer will do. `--long N` has a prompt
of N tokens arrive while two clients are being answered, and tells their longest gap. `--prefix N` tells the time to the first token
after a prompt of N tokens cold, warm, and after a restart. Python's standard library alone.
"""
import argparse
import http.client
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time


class Server:
    def __init__(self, tool, model, args):
        command = [tool, "serve", model, "--port", "0", "--quiet", *args]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        address = self.process.stdout.readline().strip()
        if not address.startswith("http://"):
            raise SystemExit(f"{' '.join(command)}: no server")
        self.host, port = address.removeprefix("http://").rsplit(":", 1)
        self.port = int(port)

    def post(self, body):
        connection = http.client.HTTPConnection(self.host, self.port)
        connection.request("POST", "/v1/completions", json.dumps(body))
        return connection.getresponse()

    def metric(self, name):
        connection = http.client.HTTPConnection(self.host, self.port)
        connection.request("GET", "/metrics")
        for line in connection.getresponse().read().decode().splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
        raise KeyError(name)

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


class Client(threading.Thread):
    """Streams one answer, and keeps when each token came."""

    def __init__(self, server, prompt, n):
        super().__init__()
        self.server, self.prompt, self.n, self.times, self.cached = server, prompt, n, [], 0

    def run(self):
        self.start_time = time.monotonic()
        body = {"prompt": self.prompt, "max_tokens": self.n, "stream": True, "logprobs": 0, "temperature": 0,
                "stream_options": {"include_usage": True}}
        for line in self.server.post(body):
            if not line.startswith(b"data: {"):
                continue
            data = json.loads(line[6:])
            if not data["choices"]:
                self.cached = data["usage"]["prompt_tokens_details"]["cached_tokens"]
            elif data["choices"][0]["finish_reason"] is None:
                self.times.append(time.monotonic())

    def first(self):
        return self.times[0] - self.start_time

    def gaps(self):
        return [b - a for a, b in zip(self.times, self.times[1:])]


def prompt(seed, n, vocabulary=1000):
    dice = random.Random(seed)
    return [dice.randrange(10, vocabulary) for _ in range(n)]


def together(server, clients, p, n, seed):
    all_clients = [Client(server, prompt(seed + i, p), n) for i in range(clients)]
    start = time.monotonic()
    for client in all_clients:
        client.start()
    for client in all_clients:
        client.join()
    seconds = time.monotonic() - start
    # While all are being answered: from the last first token to the first last one.
    begin, end = max(c.times[0] for c in all_clients), min(c.times[-1] for c in all_clients)
    within = sum(1 for c in all_clients for t in c.times if begin < t <= end)
    rate = within / (end - begin) if end > begin else float("nan")
    gaps = sorted(gap for c in all_clients for gap in c.gaps())
    return {
        "decode": rate,
        "all": sum(len(c.times) for c in all_clients) / seconds,
        "first": statistics.median(c.first() for c in all_clients),
        "gap50": statistics.median(gaps),
        "gap99": gaps[int(0.99 * (len(gaps) - 1))],
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--st-tool", default="target/release/st-tool")
    parser.add_argument("model")
    parser.add_argument("--clients", default="1,2,4,8")
    parser.add_argument("-p", type=int, default=128)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--long", type=int, default=0)
    parser.add_argument("--prefix", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    own, _, servers = " ".join(sys.argv[1:]).partition(" -- ")
    options = parser.parse_args(own.split())
    options.args = servers.split()
    counts = [int(n) for n in options.clients.split(",")]
    args = ["--parallel", str(max(counts)), *options.args]

    server = Server(options.st_tool, options.model, args)
    print("| clients | tokens/s of all while all are answered | with prompts | first token | gap, median | gap, 99 % |")
    print("|---|---|---|---|---|---|")
    for clients in counts:
        rows = [together(server, clients, options.p, options.n, 1000 * r + 10 * clients) for r in range(options.rounds)]
        best = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(f"| {clients} | {best['decode']:.1f} | {best['all']:.1f} | {best['first']:.2f} s "
              f"| {1e3 * best['gap50']:.0f} ms | {1e3 * best['gap99']:.0f} ms |", flush=True)
    if options.long:
        answered = [Client(server, prompt(77 + i, 16), 400) for i in range(2)]
        for client in answered:
            client.start()
        while not all(len(client.times) > 5 for client in answered):
            time.sleep(0.01)
        late = Client(server, prompt(99, options.long), 1)
        late.start()
        late.join()
        longest = max(gap for client in answered for gap in client.gaps())
        print(f"a prompt of {options.long} tokens among two answers: read in {late.first():.1f} s, their longest gap {longest:.2f} s")
        server.end()
        for client in answered:
            client.join()
    else:
        server.end()
    if options.prefix:
        folder = tempfile.mkdtemp()
        text = prompt(5, options.prefix)
        for state in ["cold", "warm", "after a restart"]:
            if state != "warm":
                server = Server(options.st_tool, options.model, [*args, "--cache-dir", folder])
            client = Client(server, text, 4)
            client.start()
            client.join()
            print(f"prefix of {options.prefix} tokens, {state}: first token after {client.first():.3f} s, {client.cached} cached")
            if state != "cold":
                server.end()
        shutil.rmtree(folder)


main()

#!/usr/bin/env python3
"""st-tool serve with several clients of different texts: tokens per second of all, time to the first token, gaps between tokens.

    python3 scripts/bench_server.py --st-tool target/release/st-tool MODEL.gguf [--clients 1,2,4,8] [-p 128] [-n 64]
        [--long 4096] [--prefix 2000] [--rounds 3] [--beside llama-server] [-- --memory 1GiB …]

What follows `--` is handed to the server. Prompts are token ids, so that a model without a tokenizer will do. `--beside PROGRAM` asks
llama-server the same in turn. `--long N` has a prompt of N tokens arrive while two clients are being answered, and tells their longest
gap. `--prefix N` tells the time to the first token after a prompt of N tokens cold, warm, and after a restart, and whether the tokens
are the same. Python's standard library alone.
"""
import argparse
import http.client
import json
import random
import shutil
import signal
import socket
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

    def ask(self, prompt, n):
        """The events of an answer: its tokens as they come, and then how many of the prompt were known."""
        body = {"prompt": prompt, "max_tokens": n, "stream": True, "logprobs": 0, "temperature": 0,
                "stream_options": {"include_usage": True}}
        for data in events(self.host, self.port, "/v1/completions", body):
            if not data["choices"]:
                yield data["usage"]["prompt_tokens_details"]["cached_tokens"]
            elif data["choices"][0]["finish_reason"] is None:
                yield data["choices"][0]["logprobs"]["tokens"]

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


def events(host, port, address, body):
    connection = http.client.HTTPConnection(host, port)
    connection.request("POST", address, json.dumps(body))
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


class LlamaServer:
    """llama-server with as many slots, each of the context that st-tool gives by itself."""

    def __init__(self, program, model, parallel, ctx=4096):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.host, self.port = free.getsockname()
        command = [program, "-m", model, "-np", str(parallel), "-c", str(ctx * parallel), "--port", str(self.port), "-t", "2", "--no-webui"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            time.sleep(0.2)
            if self.process.poll() is not None:
                raise SystemExit(f"{' '.join(command)}: status {self.process.returncode}")
            try:
                connection = http.client.HTTPConnection(self.host, self.port)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass

    def ask(self, prompt, n):
        body = {"prompt": prompt, "n_predict": n, "stream": True, "temperature": 0, "cache_prompt": False, "ignore_eos": True,
                "return_tokens": True}
        for data in events(self.host, self.port, "/completion", body):
            if not data["stop"]:
                yield data["tokens"]

    def end(self):
        self.process.terminate()
        self.process.wait()


class Client(threading.Thread):
    """Streams one answer, and keeps when each token came."""

    def __init__(self, server, prompt, n):
        super().__init__()
        self.server, self.prompt, self.n, self.times, self.tokens, self.cached = server, prompt, n, [], [], 0

    def run(self):
        self.start_time = time.monotonic()
        for event in self.server.ask(self.prompt, self.n):
            if isinstance(event, int):
                self.cached = event
            else:
                self.times.append(time.monotonic())
                self.tokens.append(event)

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
        "longest": gaps[-1],
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
    parser.add_argument("--beside")
    own, _, servers = " ".join(sys.argv[1:]).partition(" -- ")
    options = parser.parse_args(own.split())
    options.args = servers.split()
    counts = [int(n) for n in options.clients.split(",")]
    args = ["--parallel", str(max(counts)), *options.args]

    server = Server(options.st_tool, options.model, args)
    servers = {"st-tool": server}
    if options.beside:
        servers["llama-server"] = LlamaServer(options.beside, options.model, max(counts))
    print("| clients | server | tokens/s of all while all are answered | with prompts | first token | gap, median | gap, 99 % | longest |")
    print("|---|---|---|---|---|---|---|---|")
    for clients in counts:
        rows = {name: [] for name in servers}
        for r in range(options.rounds):
            for name, one in servers.items():
                rows[name].append(together(one, clients, options.p, options.n, 1000 * r + 10 * clients))
        best = {name: {key: statistics.median(row[key] for row in of) for key in of[0]} for name, of in rows.items()}
        for name, of in best.items():
            print(f"| {clients} | {name} | {of['decode']:.1f} | {of['all']:.1f} | {of['first']:.2f} s "
                  f"| {1e3 * of['gap50']:.0f} ms | {1e3 * of['gap99']:.0f} ms | {1e3 * of['longest']:.0f} ms |", flush=True)
    if options.beside:
        servers["llama-server"].end()
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
        tokens = []
        for state in ["cold", "warm", "after a restart"]:
            if state != "warm":
                server = Server(options.st_tool, options.model, [*args, "--cache-dir", folder])
            client = Client(server, text, 16)
            client.start()
            client.join()
            tokens.append(client.tokens)
            print(f"prefix of {options.prefix} tokens, {state}: first token after {client.first():.3f} s, {client.cached} cached")
            if state != "cold":
                server.end()
        print("tokens are", "the same" if tokens[0] == tokens[1] == tokens[2] else "NOT the same")
        shutil.rmtree(folder)


main()

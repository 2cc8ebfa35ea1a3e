#!/usr/bin/env python3
"""Hours of bad company for st-tool serve: hang-ups, slow readers, malformed bodies, floods, SIGTERM and restarts.

    python3 scripts/soak_server.py --st-tool target/release/st-tool MODEL [--minutes 60] [--clients 12] [--spells 5] [--cgroup FOLDER]
        [-- --memory 1GiB …]

Every answer that comes whole is compared with the first one to the same request, across restarts. After every spell of a minute the
server must be idle again, with the descriptors that it had, no more pages than are planned, no more memory than after one of the first three
but for 8 MiB, and within its budget; after some spells it is told to end, under load, and started anew. Anything that is not so ends the soak with
status 1. `--cgroup` starts servers in a memory cgroup that is there. Python's standard library alone.
"""
import argparse
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time


class Soak:
    def __init__(self, options):
        self.options = options
        self.known = {}
        self.lock = threading.Lock()
        self.counts = {}
        self.problems = []
        self.stop = threading.Event()

    def start(self):
        command = [self.options.st_tool, "serve", self.options.model, "--port", "0", "--quiet", "--queue", "8", *self.options.args]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=self.enter)
        address = self.server.stdout.readline().strip()
        if not address:
            sys.exit(self.server.stderr.read())
        host, port = address.removeprefix("http://").rsplit(":", 1)
        self.address = (host, int(port))

    def enter(self):
        if self.options.cgroup:
            with open(os.path.join(self.options.cgroup, "cgroup.procs"), "w") as file:
                file.write(str(os.getpid()))

    def count(self, what):
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def problem(self, text):
        with self.lock:
            self.problems.append(text)

    def body(self, dice, stream):
        begin = dice.randrange(4)
        prompt = [10 + (begin * 37 + i * 7) % 400 for i in range(dice.choice([3, 30, 300, 900]))]
        body = {"prompt": prompt, "max_tokens": dice.choice([1, 8, 40, 120]), "seed": dice.randrange(3), "stream": stream}
        if dice.randrange(5) == 0:
            schema = {"type": "array", "items": {"enum": [1, "two", None]}, "maxItems": dice.choice([3, 9])}
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return body

    def whole(self, dice):
        body = self.body(dice, False)
        connection = http.client.HTTPConnection(*self.address, timeout=600)
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        data = json.loads(response.read())
        if response.status == 429:
            return self.count("refused")
        if response.status == 503:
            return self.count("ending")
        if response.status != 200:
            return self.problem(f"status {response.status}: {data}")
        key = json.dumps(body)
        said = (data["choices"][0]["text"], data["usage"]["completion_tokens"])
        if data["choices"][0]["finish_reason"] == "length" and said[1] < body["max_tokens"]:
            return self.count("cut off")
        with self.lock:
            first = self.known.setdefault(key, said)
        if first != said:
            self.problem(f"{key}\n{first}\n{said}")
        self.count("whole")

    def raw(self, bytes_, dice):
        with socket.create_connection(self.address, timeout=30) as connection:
            connection.sendall(bytes_)
            if dice.randrange(2):
                connection.recv(4096)

    def hang_up(self, dice):
        body = json.dumps(self.body(dice, dice.randrange(2) == 0)).encode()
        self.raw(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body, dice)
        self.count("hung up")

    def slow(self, dice):
        body = json.dumps(dict(self.body(dice, True), logprobs=20, max_tokens=100)).encode()
        with socket.create_connection(self.address, timeout=60) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            for _ in range(dice.randrange(20)):
                connection.recv(100)
                time.sleep(0.05)
        self.count("slow")

    def nonsense(self, dice):
        good = json.dumps(self.body(dice, False)).encode()
        body = bytearray(good)
        for _ in range(1 + dice.randrange(4)):
            body[dice.randrange(len(body))] = dice.randrange(256)
        choice = dice.randrange(4)
        if choice == 1:
            body = b"[" * dice.randrange(100000)
        if choice == 2:
            body = body[: dice.randrange(len(body))]
        length = len(body) + (dice.randrange(50) if choice == 3 else 0)
        self.raw(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % length + bytes(body), dice)
        self.count("nonsense")

    def client(self, seed):
        dice = random.Random(seed)
        acts = [self.whole] * 4 + [self.hang_up] * 2 + [self.slow, self.nonsense]
        while not self.stop.is_set():
            try:
                dice.choice(acts)(dice)
            except (OSError, http.client.HTTPException, json.JSONDecodeError):
                self.count("connection ended")
                time.sleep(0.05)

    def metric(self, name):
        connection = http.client.HTTPConnection(*self.address, timeout=600)
        connection.request("GET", "/metrics")
        return float(re.search(rf"^{name} (\S+)$", connection.getresponse().read().decode(), re.M).group(1))

    def settled(self):
        for _ in range(1200):
            if self.metric("st_conversations") == 0 and self.metric("st_queue_length") == 0 and self.metric("st_connections") <= 1:
                return
            time.sleep(0.1)
        self.problem("it does not settle")

    def load(self, seed, seconds, meanwhile=lambda: None):
        self.stop.clear()
        clients = [threading.Thread(target=self.client, args=(seed + i,)) for i in range(self.options.clients)]
        for client in clients:
            client.start()
        time.sleep(seconds)
        meanwhile()
        self.stop.set()
        for client in clients:
            client.join()

    def status(self, name):
        text = open(f"/proc/{self.server.pid}/status").read()
        return int(re.search(rf"{name}:\s+(\d+)", text).group(1)) << 10

    def stretch(self, number):
        self.start()
        descriptors = len(os.listdir(f"/proc/{self.server.pid}/fd"))
        known = 0
        for spell in range(self.options.spells):
            self.load(100000 * number + 1000 * spell, 45)
            self.settled()
            now, resident = len(os.listdir(f"/proc/{self.server.pid}/fd")), self.status("VmRSS")
            if spell < 3:
                known = max(known, resident)
            if now > descriptors + 2:
                self.problem(f"{now} descriptors, {descriptors} before")
            if resident > known + (8 << 20):
                self.problem(f"{resident >> 10} KiB of memory, {known >> 10} before")
            if self.metric("st_kv_pages") > self.metric("st_kv_pages_most"):
                self.problem("more pages than are planned")
            peak = self.status("VmHWM")
            if "--memory" in self.options.args and peak > self.metric("st_memory_budget_bytes"):
                self.problem(f"{peak} bytes at its peak")
            print(f"{number}.{spell}: {resident >> 20} MiB now, {peak >> 20} at most, {now} descriptors, "
                  f"{dict(sorted(self.counts.items()))}", flush=True)
            if self.problems or time.monotonic() > self.end:
                break
        # It ends under load, too.
        self.load(100000 * number + 50000, 3, lambda: self.server.send_signal(signal.SIGTERM))
        _, said = self.server.communicate(timeout=120)
        if self.server.returncode != 0 or "panicked" in said:
            self.problem(f"status {self.server.returncode}: {said}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--st-tool", default="target/release/st-tool")
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--spells", type=int, default=10)
    parser.add_argument("--cgroup")
    own, _, servers = " ".join(sys.argv[1:]).partition(" -- ")
    options = parser.parse_args(own.split())
    options.args = servers.split()
    soak = Soak(options)
    soak.end = time.monotonic() + 60 * options.minutes
    number = 0
    while time.monotonic() < soak.end and not soak.problems:
        number += 1
        soak.stretch(number)
    for problem in soak.problems:
        print(problem)
    sys.exit(1 if soak.problems else 0)


main()

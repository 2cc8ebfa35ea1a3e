#!/usr/bin/env python3
"""Hours of bad company for st-tool serve: hang-ups, slow readers, malformed bodies, floods, SIGTERM and restarts.

    python3 scripts/soak_server.py --st-tool target/release/st-tool MODEL [--minutes 60] [--clients 12] [-- --memory 1GiB …]

Every answer that comes whole is compared with the first one to the same request, across restarts. After every stretch of a minute the
server must be idle again, with the descriptors and pages it had, and within its budget; then it is told to end, under load, and
started anew. Anything that is not so ends the soak with status 1. Python's standard library alone.
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
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        address = self.server.stdout.readline().strip()
        if not address:
            sys.exit(self.server.stderr.read())
        host, port = address.removeprefix("http://").rsplit(":", 1)
        self.address = (host, int(port))

    def count(self, what):
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def problem(self, text):
        with self.lock:
            self.problems.append(text)

    def body(self, dice, stream):
        begin = dice.randrange(4)
        prompt = [10 + (begin * 37 + i * 7) % 400 for i in range(dice.choice([3, 30, 300, 900]))]
        return {"prompt": prompt, "max_tokens": dice.choice([1, 8, 40, 120]), "seed": dice.randrange(3), "stream": stream}

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
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        connection.request("GET", "/metrics")
        return float(re.search(rf"^{name} (\S+)$", connection.getresponse().read().decode(), re.M).group(1))

    def settled(self):
        for _ in range(1200):
            if self.metric("st_conversations") == 0 and self.metric("st_queue_length") == 0 and self.metric("st_connections") <= 1:
                return
            time.sleep(0.1)
        self.problem("it does not settle")

    def stretch(self, number):
        self.start()
        self.stop.clear()
        descriptors = len(os.listdir(f"/proc/{self.server.pid}/fd"))
        clients = [threading.Thread(target=self.client, args=(1000 * number + i,)) for i in range(self.options.clients)]
        for client in clients:
            client.start()
        time.sleep(45)
        self.stop.set()
        for client in clients:
            client.join()
        self.settled()
        now = len(os.listdir(f"/proc/{self.server.pid}/fd"))
        if now > descriptors + 2:
            self.problem(f"{now} descriptors, {descriptors} before")
        status = open(f"/proc/{self.server.pid}/status").read()
        peak = int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) >> 10
        # It ends under load, too.
        self.stop.clear()
        clients = [threading.Thread(target=self.client, args=(5000 * number + i,)) for i in range(self.options.clients)]
        for client in clients:
            client.start()
        time.sleep(3)
        self.server.send_signal(signal.SIGTERM)
        _, said = self.server.communicate(timeout=120)
        self.stop.set()
        for client in clients:
            client.join()
        if self.server.returncode != 0 or "panicked" in said:
            self.problem(f"status {self.server.returncode}: {said}")
        print(f"{number}: peak {peak} MiB, {now} descriptors, {dict(sorted(self.counts.items()))}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--st-tool", default="target/release/st-tool")
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=12)
    own, _, servers = " ".join(sys.argv[1:]).partition(" -- ")
    options = parser.parse_args(own.split())
    options.args = servers.split()
    soak = Soak(options)
    end = time.monotonic() + 60 * soak.options.minutes
    number = 0
    while time.monotonic() < end and not soak.problems:
        number += 1
        soak.stretch(number)
    for problem in soak.problems:
        print(problem)
    sys.exit(1 if soak.problems else 0)


main()

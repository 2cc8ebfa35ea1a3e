"""The tests' hub on loopback as a context manager, for the scripts that compare st-tool with other clients."""
import os
import subprocess
import threading

REPO = "Tiiny/SmallThinker-4BA0.6B-Instruct"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Runs `hub_server` (cargo build --release -p st-hub --example hub_server) and keeps its log of requests."""

    def __init__(self, program, mib=1, files=2):
        self.files = [f"model-{n:05}-of-{files:05}.safetensors" for n in range(1, files + 1)]
        self.process = subprocess.Popen(
            [program, str(mib), str(files)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.endpoint = self.process.stdout.readline().strip()
        self.lines = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def url(self, file):
        return f"{self.endpoint}/{REPO}/resolve/main/{file}"

    def forget(self):
        self.lines.clear()

    def fetched(self):
        """Contents that were asked for since `forget`: HEAD requests and redirects do not count."""
        requests = [line.split() for line in list(self.lines)]
        large = [target for host, method, target, _ in requests if method == "GET" and host == "storage"]
        small = [t for h, m, t, _ in requests if m == "GET" and h == "hub" and "/resolve/" in t and ".safetensors?" not in t]
        return large + [target for target in small if not target.endswith(".safetensors")]


def environment(hub, cache, **more):
    """What both sides are run with: this hub, this cache, nobody logged in."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_")) and "proxy" not in k.lower()}
    return {**keep, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(cache), "HF_HOME": f"{cache}-home", **more}

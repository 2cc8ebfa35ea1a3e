#!/usr/bin/env python3
"""st-tool and Python's huggingface_hub against one hub on loopback: each finds what the other fetched.

    pip install huggingface_hub
    cargo build --release && cargo build --release -p st-hub --example hub_server
    python3 scripts/check_hub_cache.py [--st-tool target/release/st-tool] [--server target/release/examples/hub_server]

Checked in both directions, for the cache and for plain folders: same snapshot folder, same contents, not one file fetched
again, also offline; and that one waits for the other's lock, and that both at once give one right cache. Not part of CI,
because it needs a package from PyPI.
"""
import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from hub import COMMIT, REPO, Hub, environment

# huggingface_hub reads its environment when it is imported, so each use of it is a process of its own.
PYTHON_DOWNLOAD = """
import json, sys
from huggingface_hub import snapshot_download
arguments = json.loads(sys.argv[1])
print(snapshot_download(allow_patterns=["*.safetensors", "*.json", "*.jinja"], **arguments))
"""
PYTHON_LOCK = """
import sys
from huggingface_hub.utils import WeakFileLock
with WeakFileLock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.readline()
"""


def run(command, env):
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{command} failed with {result.returncode}:\n{result.stderr}")
    return result.stdout.strip()


def digests(folder):
    files = [p for p in pathlib.Path(folder).rglob("*") if p.is_file() and ".cache" not in p.parts]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Check:
    def __init__(self, options, hub, folder):
        self.options, self.hub, self.folder, self.expected = options, hub, folder, None

    def env(self, cache, **more):
        return environment(self.hub, self.folder / cache, **more)

    def ours(self, cache, *arguments):
        return run([self.options.st_tool, "download", "4b", *arguments], self.env(cache))

    def python(self, cache, **arguments):
        # Plain HTTP is what is compared here, not the chunk store.
        env = self.env(cache, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
        return run([sys.executable, "-c", PYTHON_DOWNLOAD, json.dumps({"repo_id": REPO, **arguments})], env)

    def expect(self, what, condition):
        print(f"{'ok  ' if condition else 'FAIL'} {what}", flush=True)
        if not condition:
            sys.exit(1)

    def expect_contents(self, what, folder):
        got = digests(folder)
        self.expected = self.expected or got
        self.expect(f"{what}: contents are right", got == self.expected and set(self.hub.files) <= got.keys())

    def expect_nothing_fetched(self, what, download):
        self.hub.forget()
        result = download()
        time.sleep(0.1)
        self.expect(f"{what}: nothing is fetched again", self.hub.fetched() == [])
        return result

    def cache(self):
        ours = self.ours("a")
        time.sleep(0.1)
        self.expect("st-tool fills the cache", ours.endswith(f"snapshots/{COMMIT}") and len(self.hub.fetched()) >= 6)
        self.expect_contents("st-tool", ours)
        theirs = self.expect_nothing_fetched("huggingface_hub after st-tool", lambda: self.python("a"))
        self.expect("huggingface_hub finds the same folder", theirs == ours)
        self.expect("and offline too", self.python("a", local_files_only=True) == ours)

        theirs = self.python("b")
        self.expect_contents("huggingface_hub", theirs)
        ours = self.expect_nothing_fetched("st-tool after huggingface_hub", lambda: self.ours("b"))
        self.expect("st-tool finds the same folder", ours == theirs)
        self.expect("and offline too", self.ours("b", "--offline") == theirs)

        layout = [{p.relative_to(self.folder / c).as_posix() for p in (self.folder / c).rglob("*")} for c in "ab"]
        # Versions before 2 keep no listings, and note which optional files do not exist.
        extra = ("CACHEDIR.TAG", "/trees", f"/trees/{COMMIT}.json")
        difference = {p for p in layout[0] ^ layout[1] if not p.endswith(extra) and "/.no_exist" not in p}
        self.expect(f"both caches have the same files {difference or ''}", not difference)

    def plain_folder(self):
        for first, second in (("st-tool", "huggingface_hub"), ("huggingface_hub", "st-tool")):
            target = str(self.folder / f"plain-{first}")
            fetch = {"st-tool": lambda: self.ours("c", "--local-dir", target),
                     "huggingface_hub": lambda: self.python("c", local_dir=target)}
            fetch[first]()
            self.expect_contents(f"{first} into a plain folder", target)
            self.expect_nothing_fetched(f"{second} after {first}, plain folder", fetch[second])
            self.expect_contents(f"{second} after {first}, plain folder", target)

    def partial(self):
        """What versions before 2 leave of an interrupted download is resumed."""
        etag = self.expected[self.hub.files[0]]
        content = (self.folder / "a" / ("models--" + REPO.replace("/", "--")) / "blobs" / etag).read_bytes()
        left = self.folder / "e" / ("models--" + REPO.replace("/", "--")) / "blobs" / f"{etag}.incomplete"
        left.parent.mkdir(parents=True)
        left.write_bytes(content[:1_000_000])
        self.hub.forget()
        folder = self.ours("e")
        time.sleep(0.1)
        self.expect("st-tool resumes a partial file", any("bytes=1000000-" in line for line in self.hub.lines))
        self.expect_contents("after resuming", folder)

    def lock(self):
        etag = self.expected[self.hub.files[0]]
        lock = self.folder / "d" / ".locks" / ("models--" + REPO.replace("/", "--")) / f"{etag}.lock"
        lock.parent.mkdir(parents=True)
        holder = subprocess.Popen([sys.executable, "-c", PYTHON_LOCK, str(lock)], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True)
        holder.stdout.readline()
        ours = subprocess.Popen([self.options.st_tool, "download", "4b"], env=self.env("d"), stderr=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True)
        line = next((line for line in ours.stderr if "another process" in line), "")
        self.expect("st-tool waits for a lock that huggingface_hub holds", self.hub.files[0] in line and ours.poll() is None)
        holder.communicate("\n")
        folder = ours.communicate()[0].strip()
        self.expect("and goes on when it is free", ours.returncode == 0)
        self.expect_contents("after the wait", folder)

    def together(self):
        for n in range(3):
            cache = f"together{n}"
            ours = subprocess.Popen([self.options.st_tool, "download", "4b"], env=self.env(cache), stdout=subprocess.PIPE,
                                    stderr=subprocess.DEVNULL, text=True)
            theirs = self.python(cache)
            folder = ours.communicate()[0].strip()
            self.expect("both at once end well, in the same folder", ours.returncode == 0 and folder == theirs)
            self.expect_contents("both at once", folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--st-tool", default="target/release/st-tool")
    parser.add_argument("--server", default="target/release/examples/hub_server")
    options = parser.parse_args()
    import huggingface_hub

    print(f"huggingface_hub {huggingface_hub.__version__}")
    with tempfile.TemporaryDirectory() as folder, Hub(options.server, mib=8) as hub:
        check = Check(options, hub, pathlib.Path(folder).resolve())
        check.cache()
        check.plain_folder()
        check.partial()
        check.lock()
        check.together()


if __name__ == "__main__":
    main()

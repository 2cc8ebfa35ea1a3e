"""Run programs and measure them from outside: wall time, peak resident memory, time to the first byte of output.

Shared by the scripts of this folder; Python's standard library and Linux only.
"""
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time


class Run:
    """What one program did."""

    def __init__(self, args, status, out, err, seconds, first_byte, usage, peak_anonymous):
        self.args, self.status, self.out, self.err = args, status, out, err
        # The largest sampled RssAnon: resident memory besides mapped files.
        self.peak_anonymous = peak_anonymous
        self.seconds = seconds
        self.first_byte = first_byte
        self.peak_bytes = usage.ru_maxrss * 1024
        self.cpu_seconds = usage.ru_utime + usage.ru_stime


def run(args, env=None, stdin=None, check=True, prepare=None):
    """Run `args` to its end. `prepare` is called in the child before the program starts."""
    args = [str(a) for a in args]
    with tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as inp:
        if stdin is not None:
            inp.write(stdin.encode())
            inp.seek(0)
        start = time.monotonic()
        process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=err, stdin=inp, preexec_fn=prepare,
                                   env=dict(os.environ, **(env or {})))
        chunks, first = [], None
        peak, done = [0], threading.Event()
        sampler = threading.Thread(target=watch, args=(process.pid, peak, done))
        sampler.start()
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            first = first or time.monotonic() - start
            chunks.append(chunk)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        done.set()
        sampler.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
        err.seek(0)
        result = Run(args, process.returncode, b"".join(chunks).decode(errors="replace"),
                     err.read().decode(errors="replace"), seconds, first, usage, peak[0])
    if check and result.status != 0:
        sys.exit(f"{' '.join(args)}\nfailed with status {result.status}:\n{result.err[-2000:]}")
    return result


def watch(pid, peak, done):
    """Keep the largest RssAnon of `pid` in `peak[0]` until `done` is set."""
    while not done.wait(0.05):
        try:
            with open(f"/proc/{pid}/status") as f:
                for line in f:
                    if line.startswith("RssAnon:"):
                        peak[0] = max(peak[0], int(line.split()[1]) * 1024)
        except OSError:
            return


def median(values):
    """The median, and nan where there is nothing."""
    return statistics.median(values) if values else float("nan")


def warm(path):
    """Read a file once, so that it lies in the page cache."""
    with open(path, "rb", buffering=0) as f:
        buffer = bytearray(1 << 22)
        while f.readinto(buffer):
            pass


def disk_read_rate(path, block=650 << 10, in_flight=8, seconds=4.0):
    """Bytes per second of random direct reads of `block` bytes, `in_flight` at a time: what reading experts can reach."""
    block = block // 4096 * 4096
    size = os.path.getsize(path)
    stop = time.monotonic() + seconds
    counts = [0] * in_flight

    def read(worker):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        # Large pages, as the program has them: a read into small ones is cut into many requests.
        pages = mmap.mmap(-1, 4 << 20)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        buffer = memoryview(pages)[:block]
        draw = random.Random(worker)
        while time.monotonic() < stop:
            counts[worker] += os.preadv(fd, [buffer], draw.randrange(max(1, (size - block) // 4096)) * 4096)
        os.close(fd)

    start = time.monotonic()
    workers = [threading.Thread(target=read, args=(i,)) for i in range(in_flight)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.monotonic() - start)


def disk_write_rate(folder, n_bytes=1 << 30):
    """Bytes per second of writing a new file of `n_bytes` in sequence and syncing it."""
    data = os.urandom(1 << 24)
    with tempfile.NamedTemporaryFile(dir=folder) as f:
        start = time.monotonic()
        for _ in range(n_bytes // len(data)):
            f.write(data)
        f.flush()
        os.fsync(f.fileno())
        return n_bytes / (time.monotonic() - start)


def drop_from_cache(path):
    """Ask the kernel to forget a file's cached pages."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def table(headers, rows):
    """A markdown table."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows])


def gb(n):
    return f"{n / 1e9:.2f} GB"

#!/usr/bin/env python3
"""The LM head's predictor of SmallThinker-Tiny, in the form of the published ones: fc1.weight [32, 192], fc2.weight [2048, 32].

    python make_corpus.py CORPUS --records 1500 --seed 77
    python train_predictor.py ST_TOOL CORPUS OUT.pt

ST_TOOL is the st-tool program, which gives the ids of texts and the logits of every position; the hidden state before the head follows
from the logits, since the head has more rows than columns. Trained (numpy, Adam) to score above 0 the TOP likeliest tokens of each
position. Texts of valid.jsonl are kept apart and measured. The output is what torch.save makes of a state dict of half floats.
"""
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import types
import zipfile

import numpy as np

HIDDEN, TOP, STEPS, BATCH, POSITIVE = 32, 8, 600, 512, 6.0


def safetensors(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    out = {}
    for name, info in header.items():
        if name != "__metadata__":
            kind = {"F32": np.float32, "I32": np.int32, "BF16": np.uint16}[info["dtype"]]
            start, end = info["data_offsets"]
            values = np.frombuffer(data[start:end], kind).reshape(info["shape"])
            if info["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            out[name] = values
    return out


def texts(path, characters):
    records = [json.loads(line) for line in open(path, encoding="utf-8")]
    text = ""
    for record in records:
        if "m" in record:
            text += "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in record["m"])
        else:
            text += record["t"] + "<|endoftext|>"
        if len(text) > characters:
            yield text
            text = ""


def states(tool, path, head, windows):
    """Hidden states before the head, and logits, of some windows of text."""
    inverse, logits = np.linalg.pinv(head), []
    for i, text in zip(range(windows), texts(path, 2500)):
        run = [tool, "run", "tiny", "--raw", "-f", "-", "-n", "1", "--json", "-q"]
        ids = json.loads(subprocess.run(run, input=text, capture_output=True, text=True, check=True).stdout)["prompt_ids"][:2000]
        out = os.path.join(tempfile.gettempdir(), f"predictor-{os.getpid()}-{i}.safetensors")
        subprocess.run([tool, "logits", "tiny", "--token-ids", ",".join(map(str, ids)), "-o", out, "-q"], check=True)
        logits.append(safetensors(out)["logits"].reshape(len(ids), -1))
        os.remove(out)
    logits = np.concatenate(logits)
    return (logits @ inverse.T).astype(np.float32), logits


def measure(fc1, fc2, h, logits, threshold):
    scores = h @ fc1.T @ fc2.T
    best = logits.argmax(1)
    return (scores > threshold).mean(), (scores[np.arange(len(best)), best] <= threshold).mean()


def train(h, logits):
    rng = np.random.default_rng(1)
    n, n_embd = h.shape
    target = np.zeros(logits.shape, np.float32)
    np.put_along_axis(target, np.argpartition(-logits, TOP, 1)[:, :TOP], 1.0, 1)
    # Begins with the directions in which hidden states differ most, and small scores below 0.
    fc1 = np.linalg.svd(h[:: max(1, n // 4000)], full_matrices=False)[2][:HIDDEN].astype(np.float32)
    fc1 /= np.abs(h @ fc1.T).mean()
    fc2 = rng.normal(0, 0.01, (logits.shape[1], HIDDEN)).astype(np.float32)
    moments = [[np.zeros_like(w), np.zeros_like(w)] for w in (fc1, fc2)]
    for step in range(1, STEPS + 1):
        rows = rng.integers(0, n, BATCH)
        x, y = h[rows], target[rows]
        m = x @ fc1.T
        p = 1 / (1 + np.exp(-np.clip(m @ fc2.T, -30, 30)))
        g = (p - y) * np.where(y > 0, POSITIVE, 1.0).astype(np.float32) / BATCH
        gradients = [(g @ fc2).T @ x, g.T @ m]
        rate = 0.01 * min(1, step / 50) * (1 - step / STEPS * 0.9)
        for w, gradient, (a, b) in zip((fc1, fc2), gradients, moments):
            a += 0.1 * (gradient - a)
            b += 0.01 * (gradient**2 - b)
            w -= rate * (a / (1 - 0.9**step)) / (np.sqrt(b / (1 - 0.99**step)) + 1e-8)
        if step % 300 == 0:
            kept, lost = measure(fc1, fc2, x, logits[rows], 0)
            print(f"step {step}: {kept:.1%} of rows kept, {lost:.1%} of likeliest lost", flush=True)
    return fc1, fc2


def save(path, tensors):
    """What torch.save writes, without torch: a zip of a pickle and raw storages."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch.HalfStorage = type("HalfStorage", (), {"__module__": "torch"})
    utils._rebuild_tensor_v2 = lambda *_: None
    utils._rebuild_tensor_v2.__module__, utils._rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2.__name__ = "_rebuild_tensor_v2"
    sys.modules["torch"], sys.modules["torch._utils"] = torch, utils

    class Tensor:
        def __init__(self, key, values):
            self.key, self.values = key, values

        def __reduce__(self):
            rows, columns = self.values.shape
            return utils._rebuild_tensor_v2, (Storage(self), 0, (rows, columns), (columns, 1), False, {})

    class Storage:
        def __init__(self, tensor):
            self.id = ("storage", torch.HalfStorage, tensor.key, "cpu", tensor.values.size)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.id if isinstance(value, Storage) else None

    data = io.BytesIO()
    keyed = {name: Tensor(str(i), values) for i, (name, values) in enumerate(tensors.items())}
    Pickler(data, 2).dump(keyed)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        entry = lambda name: zipfile.ZipInfo(f"model_lm_head/{name}")
        file.writestr(entry("data.pkl"), data.getvalue())
        file.writestr(entry("byteorder"), "little")
        for tensor in keyed.values():
            file.writestr(entry(f"data/{tensor.key}"), tensor.values.astype("<f2").tobytes())
        file.writestr(entry("version"), "3\n")


def main():
    tool, corpus, out = sys.argv[1:]
    here = os.path.dirname(os.path.abspath(__file__))
    head = safetensors(os.path.join(here, "../checkpoint/model.safetensors"))["model.embed_tokens.weight"]
    fc1, fc2 = train(*states(tool, os.path.join(corpus, "train.jsonl"), head, 10))
    held = states(tool, os.path.join(corpus, "valid.jsonl"), head, 2)
    save(out, {"fc1.weight": fc1, "fc2.weight": fc2})
    for threshold in [-4, -2, 0, 1]:
        kept, lost = measure(fc1, fc2, *held, threshold)
        print(f"kept apart, threshold {threshold}: {kept:.1%} of rows kept, {lost:.1%} of likeliest lost")


main()

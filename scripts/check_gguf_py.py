#!/usr/bin/env python3
"""Check a converted file with the Python package `gguf`, an implementation that is not ours.

    pip install gguf numpy
    python scripts/check_gguf_py.py CHECKPOINT_DIR FILE.gguf

Reads the GGUF file with gguf-py and the checkpoint's safetensors with a dozen lines of its own. Every tensor that the
configuration calls for must be there, and no other, with the right type and shape; Q4_0 and Q8_0 tensors must hold the
bytes that gguf-py's own quantizer makes, others the same values; and what gguf-py dequantizes must be what a plain reading
of the block format gives. Prints one line per kind of tensor; exits 1 at the first difference.
"""
import glob
import json
import os
import struct
import sys

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader, dequantize, quantize

NAMES = {  # GGUF name within a layer -> checkpoint name within a layer
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "block_sparse_moe.primary_router", "ffn_gate_exps": "block_sparse_moe.experts.{}.gate",
    "ffn_up_exps": "block_sparse_moe.experts.{}.up", "ffn_down_exps": "block_sparse_moe.experts.{}.down",
}
KEEP_F32 = ("norm", "ffn_gate_inp")


def read_checkpoint(folder):
    """Name -> function that returns the tensor as float32."""
    tensors = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
        with open(path, "rb") as f:
            size = struct.unpack("<Q", f.read(8))[0]
            header = json.loads(f.read(size))
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + size)
        for name, info in header.items():
            if name != "__metadata__":
                tensors[name] = (data, info)

    def load(name):
        data, info = tensors.pop(name)
        start, end = info["data_offsets"]
        raw = np.array(data[start:end])
        if info["dtype"] == "BF16":
            values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw.view({"F16": np.float16, "F32": np.float32}[info["dtype"]]).astype(np.float32)
        return values.reshape(info["shape"])

    return tensors, load


def plain_dequantize(data, ty):
    """The block formats read by their definition: data is (..., bytes of a row)."""
    if ty == T.Q4_0:
        blocks = data.reshape(*data.shape[:-1], -1, 18)
        q = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1).astype(np.int8) - 8
    else:
        blocks = data.reshape(*data.shape[:-1], -1, 34)
        q = blocks[..., 2:].view(np.int8)
    d = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    return (q.astype(np.float32) * d).reshape(*data.shape[:-1], -1)


def fail(message):
    sys.exit(f"error: {message}")


def check(tensor, want):
    """Compares a tensor of the file with the float32 weights that it should hold."""
    name, ty = tensor.name, tensor.tensor_type
    if list(tensor.shape) != list(reversed(want.shape)):
        fail(f"{name}: shape {list(tensor.shape)}, expected {list(reversed(want.shape))}")
    if any(part in name for part in KEEP_F32) and ty != T.F32:
        fail(f"{name}: type {ty.name}, expected F32")
    if ty in (T.Q4_0, T.Q8_0):
        got = np.asarray(tensor.data).view(np.uint8)
        if not np.array_equal(got.reshape(-1), quantize(want, ty).reshape(-1)):
            fail(f"{name}: other {ty.name} bytes than gguf-py's quantizer makes")
        values = dequantize(tensor.data, ty)
        if not np.array_equal(values.reshape(want.shape), plain_dequantize(got.reshape(*want.shape[:-1], -1), ty)):
            fail(f"{name}: gguf-py dequantizes to other values")
        return float(np.abs(values.reshape(want.shape) - want).max())
    if ty == T.BF16:
        values = (np.asarray(tensor.data).view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(want.shape)
    else:
        values = np.asarray(tensor.data, dtype=np.float32).reshape(want.shape)
    error = float(np.abs(values - want).max())
    limit = {T.F32: 0.0, T.F16: 2.0**-11, T.BF16: 2.0**-8}[ty] * float(np.abs(want).max())
    if error > limit:
        fail(f"{name}: off by {error}")
    return error


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder, path = sys.argv[1:]
    config = json.load(open(os.path.join(folder, "config.json"), encoding="utf-8"))
    tensors, load = read_checkpoint(folder)
    reader = GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}

    plan = [("token_embd.weight", ["model.embed_tokens.weight"]), ("output_norm.weight", ["model.norm.weight"])]
    if "lm_head.weight" in tensors:
        plan.append(("output.weight", ["lm_head.weight"]))
    experts = range(config["moe_num_primary_experts"])
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in NAMES.items():
            names = [theirs.format(e) for e in experts] if "{}" in theirs else [theirs]
            plan.append((f"blk.{layer}.{ours}.weight", [f"model.layers.{layer}.{n}.weight" for n in names]))

    worst = {}
    for ours, theirs in plan:
        if ours not in found:
            fail(f"{ours}: missing from the file")
        parts = [load(name) for name in theirs]
        tensor = found.pop(ours)
        if tensor.data_offset % 4096:
            fail(f"{ours}: starts at {tensor.data_offset}, not on a page")
        error = check(tensor, np.stack(parts) if "_exps" in ours else parts[0])
        kind = (ours.split(".")[2] if ours.startswith("blk.") else ours.split(".")[0], tensor.tensor_type.name)
        count, largest = worst.get(kind, (0, 0.0))
        worst[kind] = (count + 1, max(largest, error))
    if found or tensors:
        fail(f"left over: {sorted(found)[:3]} in the file, {sorted(tensors)[:3]} in the checkpoint")
    for (name, ty), (count, error) in worst.items():
        print(f"{name:16} {ty:5} {count:4} tensors, largest rounding error {error:.3g}")
    print(f"{path}: all {len(plan)} tensors are right")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Check that llama.cpp loads a file of ours unchanged and continues prompts with the same greedy tokens as st-tool.

    python3 scripts/check_llama_cpp.py --st-tool target/release/st-tool --llama-src LLAMA_CPP --llama-build BUILD \\
        MODEL.gguf [--prompts FILE] [-n 64] [--threads 1]

LLAMA_CPP is llama.cpp's source tree and BUILD its cmake build folder (targets llama and llama-tokenize; static or
shared). FILE holds prompts, one per line, as comma-separated token ids; without it a few built-in questions are
used (the bundled model's kind), which both programs tokenize, and the ids are compared too. Prompts are cut to 60 tokens.

For each prompt the ids are compared up to the first end token. Where they differ, the distance between llama.cpp's two
best logits there is shown: a distance near zero is a tie that rounding decided. Exit status 1 where any prompt differs
by more than a tie (--tie, 0.05 by default).

One difference is known and is not rounding. The published model chooses experts by the router's logits; llama.cpp chooses
by their sigmoid, which in 32-bit floats is exactly 1 from a logit of 17 on. Where more experts than are wanted exceed that,
llama.cpp takes some of them and the published model the largest. The bundled model has such tokens: of 40 questions like
those here, in 7 the answers part for this reason (and in none when llama.cpp is built to choose by logits: `selection_probs
= logits` in llm_graph_context::build_moe_ffn). The built-in questions are ones that do not meet it.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import procs

LONGEST = 60
QUESTIONS = [
    "Thank you!",
    "What sound does a bee make?",
    "What is 27 - 8?",
    "What color is a banana?",
    "Please write a Python function that counts the values in a list.",
    "How do I write a Rust function that adds 6 to a number?",
    "Write a Python function that sums a list of numbers.",
    "Write a Rust function that returns the absolute value of a number.",
    "“老师”用英语怎么说?",
    "你是谁?",
    "请问1加42是多少?",
]


def build_greedy(source, build, folder):
    """Compile llama_greedy.cpp against the build."""
    program = os.path.join(folder, "llama_greedy")
    libraries = []
    for root, _, files in os.walk(build):
        libraries += [os.path.join(root, f) for f in files
                      if f in ("libllama.so", "libllama.a") or f.startswith("libggml") and f.endswith((".so", ".a"))]
    if not libraries:
        sys.exit(f"no libllama in {build}: build the target `llama` first")
    rpath = {os.path.dirname(p) for p in libraries if p.endswith(".so")}
    command = ["g++", "-O1", "-std=c++17", "-I", os.path.join(source, "include"),
               "-I", os.path.join(source, "ggml", "include"),
               os.path.join(os.path.dirname(os.path.abspath(__file__)), "llama_greedy.cpp"), "-o", program,
               "-Wl,--start-group", *libraries, "-Wl,--end-group", *[f"-Wl,-rpath,{p}" for p in rpath],
               "-fopenmp", "-lpthread", "-ldl", "-lm"]
    subprocess.run(command, check=True)
    return program


def find_tool(build, name):
    path = os.path.join(build, "bin", name)
    return path if os.path.exists(path) else None


def prompts_from_texts(args):
    """The built-in questions as ids, which both programs must agree on."""
    tokenize = find_tool(args.llama_build, "llama-tokenize")
    if not tokenize:
        sys.exit("llama-tokenize is not built; build it or give --prompts")
    prompts = []
    for question in QUESTIONS:
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        theirs = json.loads(procs.run([tokenize, "-m", args.model, "--ids", "--no-bos", "--log-disable", "-p", text]).out)
        answer = procs.run([args.st_tool, "run", args.model, "--raw", "-p", text, "-n", 1, "--temp", 0, "--json",
                            "--quiet"])
        ours = json.loads(answer.out)["prompt_ids"]
        if ours != theirs:
            sys.exit(f"{text!r} is tokenized differently:\n  llama.cpp {theirs}\n  st-tool   {ours}")
        prompts.append(theirs[:LONGEST])
    print(f"{len(prompts)} questions are tokenized alike")
    return prompts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--st-tool", required=True)
    parser.add_argument("--llama-src", required=True)
    parser.add_argument("--llama-build", required=True)
    parser.add_argument("--prompts")
    parser.add_argument("-n", type=int, default=64, help="tokens to generate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tie", type=float, default=0.05, help="logit distance that counts as a tie")
    args = parser.parse_args()

    if args.prompts:
        with open(args.prompts) as f:
            prompts = [[int(x) for x in line.split(",")][:LONGEST] for line in f if line.strip()]
    else:
        prompts = prompts_from_texts(args)
    with tempfile.TemporaryDirectory() as folder:
        program = build_greedy(args.llama_src, args.llama_build, folder)
        lines = "".join(",".join(map(str, p)) + "\n" for p in prompts)
        theirs = procs.run([program, args.model, args.n, args.threads], stdin=lines).out.splitlines()
    failures = 0
    for i, (prompt, line) in enumerate(zip(prompts, theirs, strict=True)):
        ids, margins = ([f(x) for x in part.split(",")] for f, part in zip((int, float), line.split(";")))
        answer = procs.run([args.st_tool, "run", args.model, "--token-ids", ",".join(map(str, prompt)), "-n", args.n,
                            "--temp", 0, "--json", "--quiet", "--threads", args.threads])
        ours = json.loads(answer.out)["ids"]
        # llama.cpp's list ends with the end token; st-tool's may leave it out.
        same = 0
        while same < min(len(ids), len(ours)) and ids[same] == ours[same]:
            same += 1
        if same == len(ids) or same == len(ours) == len(ids) - 1:
            print(f"prompt {i}: {len(prompt)} tokens, same {same} tokens follow")
            continue
        margin = margins[same] if same < len(margins) else float("nan")
        tie = margin <= args.tie
        failures += not tie
        print(f"prompt {i}: {len(prompt)} tokens, {same} of {len(ids)} the same, then llama.cpp {ids[same:same + 3]}, "
              f"st-tool {ours[same:same + 3]}; its two best logits are {margin:.3f} apart{' (a tie)' if tie else ''}")
    if failures:
        sys.exit(f"{failures} of {len(prompts)} prompts differ")
    print("llama.cpp and st-tool agree")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Forecast against fact: what `st-tool plan` says of several budgets, beside what `st-tool bench` measures.

    python3 scripts/bench_forecast.py --st-tool target/release/st-tool MODEL.gguf --memory 1GiB 1.5GiB 2GiB

The routing is recorded first, without a budget; `--built-in` forecasts by that of the bundled model instead. Each budget is forecast
anew just before it is measured, so that the disk is the same. `--wrap CMD` runs each measurement by CMD.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import tempfile


def run(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("--st-tool", default="target/release/st-tool")
    ap.add_argument("--memory", nargs="+", required=True)
    ap.add_argument("--tokens", default="128")
    ap.add_argument("--prompt", default="512")
    ap.add_argument("--repetitions", default="2")
    ap.add_argument("--built-in", action="store_true")
    ap.add_argument("--wrap", default="")
    args = ap.parse_args()
    wrap = shlex.split(args.wrap)
    bench = [*wrap, args.st_tool, "bench", args.model, "-n", args.tokens, "-o", "json"]
    errors = {"generation": [], "prompt": [], "hit rate": []}
    with tempfile.TemporaryDirectory() as folder:
        trace = os.path.join(folder, "trace")
        routing = []
        if not args.built_in:
            run([*bench, "-p", "0", "-r", "2", "--record-routing", trace])
            routing = ["--routing", trace]
        print("| --memory | found: forecast, fact | generation: forecast (range), fact | error | prompt: forecast, fact | error |")
        print("|---|--:|--:|--:|--:|--:|")
        for memory in args.memory:
            limit = [] if memory == "none" else ["--memory", memory]
            plan = json.loads(run([*wrap, args.st_tool, "plan", args.model, "--json", "--ctx", "640", *limit, *routing]))
            forecast = plan["budgets"][-1]["forecast"]
            fact = json.loads(run([*bench, "-p", args.prompt, "-r", args.repetitions, *limit]))
            tests = {test["test"].split()[0]: test for test in fact["tests"]}
            row = [memory]
            found = (tests["generation"]["experts"] or {"hit_rate": 1.0})["hit_rate"]
            row.append(f"{forecast['hit_rate']:.3f}, {found:.3f}")
            errors["hit rate"].append(abs(forecast["hit_rate"] - found))
            for kind in ("generation", "prompt"):
                said = forecast[f"{kind}_tokens_per_second"]
                came = tests[kind]["tokens_per_second"]["median"]
                error = said["expected"] / came - 1
                errors[kind].append(abs(error))
                spread = f" ({said['low']:.1f}–{said['high']:.1f})" if kind == "generation" else ""
                row += [f"{said['expected']:.1f}{spread}, {came:.1f}", f"{error:+.0%}"]
            print("| " + " | ".join(row) + " |", flush=True)
    for kind, all_errors in errors.items():
        print(f"{kind}: median error {statistics.median(all_errors):.1%}, worst {max(all_errors):.1%}")


if __name__ == "__main__":
    main()

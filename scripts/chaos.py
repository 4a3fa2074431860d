#!/usr/bin/env python3
"""Kill engines and the coordinator at random moments, and check every token that clients get.

    PYTHONPATH=.:kernels .venv/bin/python scripts/chaos.py --model smollm2 --dtype float32 --kills 10
    PYTHONPATH=.:kernels .venv/bin/python scripts/chaos.py --executor simulated --kills 10

One server with two engines and a state directory. First every request once, and as a batch,
undisturbed: the outputs to expect. Then clients read streams, and a batch runs, while engines are killed
(SIGKILL) one after another, each with streams on it; then while the coordinator is killed again and again,
each time with lines of a batch running, and started again. At the end all that was recorded is replayed.

Streams must outlive engines with the same tokens; those of a killed coordinator must end with an error,
after tokens that are a beginning of the same. Each batch line must have one result. Where a model's
output differs, Hugging Face's implementation must find each of its tokens within 1e-3 of the best logit,
at no more than 1 % of all positions. Exits with 1 where anything was lost, doubled or else wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.chaos_run.run import run

MOST_TOLD = 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32", help="of a real model")
    parser.add_argument("--executor", choices=("torch", "simulated"), default="torch")
    parser.add_argument("--profile", default="h100/llama-3.1-8b/tp1/bf16", help="of simulated engines")
    parser.add_argument("--time-scale", type=float, default=3.0, help="of simulated engines")
    parser.add_argument("--kills", type=int, default=10, help="of engines, and as many of the coordinator")
    parser.add_argument("--kill-within", type=float, default=2.0, help="seconds to the next kill, at most")
    parser.add_argument(
        "--requests", type=int, default=12, help="that differ; they are asked again and again"
    )
    parser.add_argument("--streams", type=int, default=6, help="read at the same time")
    parser.add_argument("--lines", type=int, default=60, help="of each batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for recordings and the server's log (a new one)")
    parser.add_argument("--json", type=Path, help="write what was seen here; - for standard output")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    folder = options.out or Path(tempfile.mkdtemp(prefix="chiron-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        print(f"{folder} is not empty; what lies there would be taken for this run's", file=sys.stderr)
        return 2
    print(f"recordings and the server's log are in {folder}", file=sys.stderr)
    seen = asyncio.run(run(options, folder))
    text = json.dumps(seen, indent=1)
    if options.json is not None and str(options.json) != "-":
        options.json.write_text(text + "\n")
    print(text if str(options.json) == "-" else table(seen))
    return 1 if seen["violations"] else 0


def table(seen: Mapping[str, Any]) -> str:
    lines = [f"{seen['model']}, {seen['executor']} {seen['precision']}, seed {seen['seed']}"]
    columns = ("kills", "streams whole", "cut", "tokens", "batch lines", "back after s")
    lines.append(f"{'':20}" + "".join(f"{column:>15}" for column in columns))
    for name, phase in seen["phases"].items():
        streams, kills = phase["streams"], phase["kills"]
        back = [kill["back_s"] for kill in kills]
        cells = [len(kills), streams["whole"], streams["cut"], streams["tokens"], phase["batch_lines"]]
        cells.append(f"{statistics.median(back):.1f}-{max(back):.1f}" if back else "")
        lines.append(f"{name:20}" + "".join(f"{cell:>15}" for cell in cells))
    lines.append(
        f"{seen['positions']} tokens compared; {seen['ties']} where another is as good, in "
        f"{seen['outputs_with_ties']} outputs"
    )
    if seen["widest_shortfall"] is not None:
        lines.append(f"no token's logit is more than {seen['widest_shortfall']:.1e} below the best")
    lines.append(
        f"{seen['replayed_files']} recordings replayed in {seen['replayed_sections']} sections; "
        f"{len(seen['differing_files'])} differ"
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in seen["violations"].items())
    lines.append(f"violations: {kinds or 'none (0 lost, 0 doubled)'}; {seen['seconds']:.0f} s")
    return "\n".join([*lines, *seen["violations_told"][:MOST_TOLD]])


if __name__ == "__main__":
    sys.exit(main())

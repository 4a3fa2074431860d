"""Check every causal language model type of transformers with tiny random weights: does this engine
serve it exactly, or refuse it by name?

    PYTHONPATH=.:kernels .venv/bin/python scripts/sweep_families.py --markdown docs/families.md
    PYTHONPATH=.:kernels .venv/bin/python scripts/sweep_families.py --only gemma2,gpt_oss --json out.json

Exits with 1 where a type failed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
import warnings
from pathlib import Path

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from scripts.family_sweep.check import FAILED, Outcome
from scripts.family_sweep.isolation import check_apart
from scripts.family_sweep.report import as_json, as_markdown, counts


def main() -> int:
    options = _options()
    # One thread: a forked child cannot use the threads of its parent.
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    outcomes = [_check(kind, options.timeout) for kind in options.only]
    print(f"{counts(outcomes)}, in {time.perf_counter() - started:.0f} s")
    if options.json is not None:
        options.json.write_text(as_json(outcomes) + "\n")
    if options.markdown is not None:
        command = f"PYTHONPATH=.:kernels .venv/bin/python {' '.join(sys.argv)}"
        options.markdown.write_text(as_markdown(outcomes, options.date, command))
    return int(any(outcome.result == FAILED for outcome in outcomes))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=_kinds, default=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one type")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    parser.add_argument(
        "--date", default=datetime.date.today().isoformat(), help="the date the page names; today by default"
    )
    return parser.parse_args()


def _kinds(text: str) -> list[str]:
    kinds = text.split(",")
    unknown = [kind for kind in kinds if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a causal model type transformers knows")
    return kinds


def _check(kind: str, timeout_s: float) -> Outcome:
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    outcome = check_apart(kind, names if isinstance(names, str) else names[0], timeout_s)
    print(f"{kind:28} {outcome.result:8} {outcome.reason}", flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())

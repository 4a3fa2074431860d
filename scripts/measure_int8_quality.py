#!/usr/bin/env python3
"""What a precision costs in quality: perplexity over continuations that the float32 model drew itself.

The float32 model answers each prompt at temperature 1, round after round with other seeds, until there
are enough tokens. Every precision then scores the same tokens. The float32 model's own perplexity is
the least there can be, and the logarithm of a ratio to it estimates the divergence of the two.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from chiron_engine.model.attention import AttentionBatch, ChunkRows
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.loader import CausalLM, load_model
from chiron_engine.model.precision import FLOAT32, PRECISIONS
from chiron_engine.model.source import resolve_model
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.serving.llm import LLM

CPU = torch.device("cpu")
PROMPTS = Path(__file__).resolve().parent.parent / "tests" / "data" / "prompts.jsonl"
BLOCK = 16
CHUNK = 128


def read_prompts(path: Path) -> list[str]:
    """The field `prompt` of each line of a JSON-lines file."""
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]


def draw_continuations(
    model: str, prompts: list[str], tokens: int, longest: int, threads: int | None
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids of prompts and of what the float32 model says to them, of `tokens` tokens at least."""
    llm = LLM(model, dtype="float32", max_num_seqs=32, max_model_len=2048, threads=threads)
    try:
        drawn = seed = 0
        while drawn < tokens:
            params = SamplingParams(temperature=1.0, max_tokens=longest, seed=seed)
            for output in llm.chat([[{"role": "user", "content": text}] for text in prompts], params):
                drawn += len(output.token_ids)
                yield list(output.prompt_token_ids), list(output.token_ids)
            seed += 1
    finally:
        llm.close()


def score(model: CausalLM, prompt: list[int], continuation: list[int]) -> torch.Tensor:
    """Log-probabilities, float64, of the tokens of the continuation."""
    ids = torch.tensor(prompt + continuation)
    pool = KvPool(-(-len(ids) // BLOCK), BLOCK, model.spec.layers, model.precision.kv)
    table, none = torch.arange(pool.num_blocks), torch.empty(0, dtype=torch.int64)
    found = []
    for start in range(0, len(ids) - 1, CHUNK):
        position = torch.arange(start, min(start + CHUNK, len(ids) - 1))
        chunk = ChunkRows(0, len(position), start, slot=0)
        where = table[position // BLOCK], position % BLOCK
        batch = AttentionBatch(0, table[None], none, none, 0, [chunk], *where)
        wanted = torch.nonzero(position >= len(prompt) - 1).flatten()
        logits = model.forward(ids[position], position, batch, pool, wanted)
        told = torch.log_softmax(logits.double(), dim=-1)
        found.append(told.gather(1, ids[position[wanted] + 1, None]).flatten())
    return torch.cat(found)


def measure(path: Path, name: str, drawn: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Log-probabilities of all tokens drawn, in the precision of this name."""
    model = load_model(path, precision=PRECISIONS[name], device=CPU)
    with torch.inference_mode():
        return torch.cat([score(model, *pair) for pair in drawn])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--longest", type=int, default=128, help="tokens of one continuation at most")
    parser.add_argument("--dtypes", default="int8", help="precisions to compare with float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = arguments.dtypes.split(",")
    compared = ("int8", "bfloat16")
    unknown = sorted(set(names) - set(compared))
    if unknown:
        parser.error(f"--dtypes names {unknown[0]!r}; it must be of {', '.join(compared)}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    path = resolve_model(arguments.model)
    prompts = read_prompts(arguments.prompts)
    drawn = list(
        draw_continuations(arguments.model, prompts, arguments.tokens, arguments.longest, arguments.threads)
    )
    reference = measure(path, FLOAT32.name, drawn)
    perplexity = math.exp(-reference.mean().item())
    result = {"tokens": len(reference), "continuations": len(drawn), "float32": {"perplexity": perplexity}}
    for name in names:
        start = time.perf_counter()
        loss = reference - measure(path, name, drawn)
        result[name] = {
            "perplexity": perplexity * math.exp(loss.mean().item()),
            "ratio": math.exp(loss.mean().item()),
            "ratio_standard_error": loss.std().item() / math.sqrt(len(loss)),
            "seconds": time.perf_counter() - start,
        }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs inside the peer's environment: reads settings, then passes to run, one JSON object a line,
and answers each on the standard output it was started with."""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    # Whatever vLLM and its children print goes to the error stream; answers keep the real output.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    import vllm  # type: ignore[import-not-found]

    engine = vllm.LLM(
        **settings, max_model_len=2048, enable_prefix_caching=False, skip_tokenizer_init=True, seed=0
    )
    print(json.dumps({"version": vllm.__version__}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=request["output_tokens"], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        start = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        produced = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"seconds": seconds, "output_tokens": produced}), file=answers)


if __name__ == "__main__":
    main()

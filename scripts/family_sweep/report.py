"""The outcomes of a sweep as JSON and as a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import torch
import transformers

from scripts.family_sweep.check import Outcome

_INTRODUCTION = """\
# Model families

Which of the causal language models registered in transformers {transformers} this engine serves, and
why it refuses the others. Measured on {date} with torch {torch} on the CPU:

    {command}

Of every model type a tiny model with random weights is built, with windows shorter than the prompts,
saved and loaded as any model is. The engine then generates greedy tokens for several prompts, in chunks
and beside one another, and both those tokens and the logits of every position are compared with the
model's own eager attention. Llama, Mistral, Qwen2 and Qwen3 are checked twice: through the native
decoder and through their class.

- **passed**: the tokens are equal (but for near ties, where the two best logits lie within 0.001), and
  so are the logits within 0.0002 of the largest.
- **refused**: the engine does not load the model, and says why. The reason is what it says.
- **failed**: neither; the type must not be used.

A type has the options of its default configuration here, and sliding windows, shared keys and causal
masks where it can have them. A checkpoint may set others: the engine compares a small copy of every model
that it runs through its class with eager attention before it loads the weights, and refuses it where the
two differ. Types that are several in one (`gemma3`, text and images) are refused; their text model
(`gemma3_text`) is not.

Exact does not mean fast. Latent attention (`deepseek_v3` and others) keeps the keys and values of all heads,
not the latent they come from, and layers that share keys keep a copy each: both take more KV memory than
they need to.

{counts}.

| Model type | Class | Result | Reason |
|---|---|---|---|
"""


def counts(outcomes: Sequence[Outcome]) -> str:
    """How many of each result, in words."""
    found = Counter(outcome.result for outcome in outcomes)
    parts = ", ".join(f"{found[result]} {result}" for result in ("passed", "refused", "failed"))
    return f"{len(outcomes)} model types: {parts}"


def as_json(outcomes: Sequence[Outcome]) -> str:
    return json.dumps(
        {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "outcomes": [asdict(outcome) for outcome in outcomes],
        },
        indent=1,
    )


def as_markdown(outcomes: Sequence[Outcome], date: str, command: str) -> str:
    head = _INTRODUCTION.format(
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        date=date,
        command=command,
        counts=counts(outcomes),
    )
    return head + "".join(_row(outcome) for outcome in outcomes)


def _row(outcome: Outcome) -> str:
    reason = outcome.reason.replace("|", "\\|")
    return f"| {outcome.kind} | {outcome.architecture} | {outcome.result} | {reason} |\n"

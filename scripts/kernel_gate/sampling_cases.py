"""What the engine launches to sample, of logprobs and of penalties: vocabularies from small models up."""

from __future__ import annotations

import torch
from chiron_kernels.gpu.launch import Launch
from chiron_kernels.gpu.logprobs import token_logprobs_launches
from chiron_kernels.gpu.penalties import adjust_launch, penalise_launch
from chiron_kernels.gpu.sampling import greedy_rows_launches, sample_rows_launches

from scripts.kernel_gate.case import Case

VOCABULARIES = (32_000, 49_152, 128_256, 151_936, 256_000)
ROWS = (1, 128)
LIKELIEST = 20
META = torch.device("meta")


def _rows(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(count, dtype=dtype, device=META)


def _sample(rows: int, vocab: int, filtered: bool) -> tuple[Launch, Launch]:
    floats, whole = _rows(rows, torch.float32), _rows(rows, torch.int64)
    return sample_rows_launches(
        torch.empty(rows, vocab, device=META),
        floats,
        floats,
        whole,
        _rows(rows, torch.float64),
        whole,
        whole,
        whole,
        _rows(rows, torch.bool),
        filtered=filtered,
    )


def _greedy(rows: int, vocab: int) -> tuple[Launch, Launch]:
    logits = torch.empty(rows, vocab, device=META)
    return greedy_rows_launches(logits, _rows(rows, torch.int64), _rows(rows, torch.bool))


def _logprobs(rows: int, vocab: int) -> tuple[Launch, Launch]:
    logits, whole = torch.empty(rows, vocab, device=META), _rows(rows, torch.int64)
    few = torch.empty(rows, LIKELIEST, device=META)
    floats = _rows(rows, torch.float32)
    return token_logprobs_launches(logits, whole, whole, LIKELIEST, floats, few.long(), few, whole)


def _adjust(vocab: int) -> Launch:
    logits, whole = torch.empty(128, vocab, device=META), _rows(128, torch.int64)
    return adjust_launch(logits, whole, whole, whole, _rows(128, torch.float32), whole)


def _penalise(vocab: int) -> Launch:
    logits, whole = torch.empty(128, vocab, device=META), _rows(128, torch.int64)
    history = torch.empty(256, 8192, dtype=torch.int32, device=META)
    floats = _rows(128, torch.float32)
    return penalise_launch(logits, history, whole, whole, whole, whole, floats, floats, floats)


def cases() -> list[Case]:
    found = []
    for vocab in VOCABULARIES:
        for rows in ROWS:
            found.append(
                Case(
                    f"block_maxima {vocab} rows {rows}",
                    lambda r=rows, v=vocab: _greedy(r, v)[0],
                    narrow_loads=0,
                )
            )
            # Its narrow loads are the row's number, token and logit.
            name = f"block_summaries {vocab} rows {rows}"
            found.append(Case(name, lambda r=rows, v=vocab: _logprobs(r, v)[0], narrow_loads=3))
        found.append(Case(f"greedy {vocab}", lambda v=vocab: _greedy(128, v)[1]))
        for name, filtered in (("plain", False), ("both", True)):
            found.append(Case(f"sample {name} {vocab}", lambda v=vocab, f=filtered: _sample(128, v, f)[1]))
        found.append(Case(f"likeliest {vocab}", lambda v=vocab: _logprobs(128, v)[1]))
    found.append(Case("adjust", lambda: _adjust(VOCABULARIES[0])))
    found.append(Case("penalise", lambda: _penalise(VOCABULARIES[0])))
    return found

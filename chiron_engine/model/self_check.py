"""Does a model class compute the same over paged KV as with its own eager attention?

A copy of the model, cut to a few layers with random weights and short windows, runs a few short
prompts both ways: whole and eager, then chunked, interleaved and decoded over scattered blocks.
A class that hides a restriction in its mask, or keeps state elsewhere, fails. The verdict depends
on the configuration and the versions alone, and is kept in the user's cache folder.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from chiron_engine.model import hugging_face_attention
from chiron_engine.model.attention import AttentionBatch, ChunkRows, TorchAttention
from chiron_engine.model.cache import cache_dir
from chiron_engine.model.errors import ModelError, UncheckedModel
from chiron_engine.model.hugging_face import PackedModel
from chiron_engine.model.kv_pool import KvPool

log = logging.getLogger(__name__)

# Raise it with every change of what is checked.
CHECK = 2
TOLERANCE = 2e-4
_BLOCK_SIZE = 4
# The last so many layers take the keys and values of the last other layer of their kind.
_SHARED = "num_kv_shared_layers"
_LENGTHS = (37, 9, 22)
_SHORT_WINDOW = 6
_LOW_CAP = 1.0
_SMALLER = {
    "vocab_size": 256,
    "vocab_size_per_layer_input": 256,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
}


@dataclass(frozen=True, slots=True)
class _Verdict:
    error: float
    refusal: str | None = None


def check_architecture(config: Any) -> None:
    """Raise ModelError where the class of `config` differs from its eager form over paged KV."""
    file = cache_dir() / "self_check" / f"{_key(config)}.json"
    try:
        saved = json.loads(file.read_text())
        verdict = _Verdict(float(saved["error"]), saved["refusal"])
    except (OSError, ValueError, KeyError, TypeError):
        verdict = _check(config)
        _save(file, verdict)
    if verdict.refusal is not None:
        raise ModelError(verdict.refusal)
    if not verdict.error <= TOLERANCE:
        raise ModelError(
            f"{config.model_type} differs from its own eager attention by {verdict.error:.1e} (relative) "
            f"over paged KV, more than {TOLERANCE:.0e}: not supported"
        )


def _key(config: Any) -> str:
    parts = (CHECK, torch.__version__, transformers.__version__, config.to_json_string(use_diff=False))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _save(file: Any, verdict: _Verdict) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{id(verdict):x}.tmp")
        temporary.write_text(json.dumps({"error": verdict.error, "refusal": verdict.refusal}))
        temporary.replace(file)
    except OSError as error:
        log.warning("cannot keep the self-check's verdict in %s: %s", file, error)


def _check(config: Any) -> _Verdict:
    verbosity = transformers_logging.get_verbosity()
    # The copy is cut in ways its class remarks on, which is no news for whoever loads the model.
    transformers_logging.set_verbosity_error()
    try:
        return _Verdict(paged_error(small_model(config)))
    except ModelError as error:
        return _Verdict(0.0, str(error))
    except Exception as error:  # whatever a class raises on packed rows; not a verdict to keep
        raise UncheckedModel(f"{config.model_type} fails its self-check: {error!r}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def small_model(config: Any) -> Any:
    """The class of `config` with random weights: few layers, short windows, and where the class
    allows it a small vocabulary, few experts and narrow feed-forward layers."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        try:
            return _build(_cut(config, _SMALLER))
        except Exception as error:  # a field of a class may depend on another: then keep its own sizes
            log.debug("self-check at full width: %s", error)
            return _build(_cut(config, {}))
    finally:
        torch.random.set_rng_state(state)


def _cut(config: Any, sizes: dict[str, int]) -> Any:
    small = copy.deepcopy(config)
    kinds = getattr(small, "layer_types", None)
    layers = min(small.num_hidden_layers, _layers_needed(kinds))
    shared = bool(getattr(small, _SHARED, 0))
    if shared:
        setattr(small, _SHARED, layers)
    small.num_hidden_layers = layers * (1 + shared)
    if kinds is not None:
        small.layer_types = kinds[:layers] * (1 + shared)
    if getattr(small, "sliding_window", None):
        small.sliding_window = _SHORT_WINDOW
    if getattr(small, "attn_logit_softcapping", None):
        small.attn_logit_softcapping = _LOW_CAP
    for name, size in sizes.items():
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, min(size, getattr(small, name)))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(small, name, None)
        if isinstance(token, int) and token >= small.vocab_size:
            setattr(small, name, None)
    # Queries and keys of unit size, so that attention is far from uniform and a wrong position shows.
    for name in ("initializer_range", "init_std"):
        if hasattr(small, name):
            setattr(small, name, small.hidden_size**-0.5)
    return small


def _layers_needed(kinds: list[str] | None) -> int:
    """Enough layers to have one of each kind."""
    if not kinds:
        return 2
    return max(2, *(kinds.index(kind) + 1 for kind in set(kinds)))


def _build(config: Any) -> Any:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    return model.float().eval()


def paged_error(model: Any) -> float:
    """Largest difference of logits, eager against paged, relative to the largest logit."""
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(vocabulary, (length,), generator=generator) for length in _LENGTHS]
    with torch.inference_mode():
        eager = [model(input_ids=prompt[None], use_cache=False).logits[0] for prompt in prompts]
        model.set_attn_implementation(hugging_face_attention.NAME)
        paged = run_paged(PackedModel(model, TorchAttention()), prompts, generator)
    difference = max(float((a - b).abs().max()) for a, b in zip(eager, paged, strict=True))
    largest = max(float(logits.abs().max()) for logits in eager)
    return difference / largest if largest else difference


def run_paged(
    packed: Any,
    prompts: list[torch.Tensor],
    generator: torch.Generator,
    layers: Any = None,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Logits of every position of every prompt: each prompt in two or three chunks, the last of
    its tokens one by one as decodes, all prompts together, over a random permutation of blocks.
    dtype: of the pool."""
    geometry = layers if layers is not None else [layer.geometry for layer in packed.layers]
    tables, count = [], 1
    for prompt in prompts:
        tables.append(list(range(count, count + -(-len(prompt) // _BLOCK_SIZE))))
        count += len(tables[-1])
    pool = KvPool(count, _BLOCK_SIZE, geometry, dtype)
    # Whatever is read before it was written shows: with all bits set, floats of every size are NaN.
    pool.storage.fill_(0xFF)
    order = torch.randperm(count, generator=generator)
    scattered = [order[torch.tensor(table)] for table in tables]
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    for step in _steps([len(prompt) for prompt in prompts]):
        rows, batch, ids, positions = pack_step(step, prompts, scattered, _BLOCK_SIZE)
        out = packed.forward(ids, positions, batch, pool, torch.arange(len(ids)))
        for request, start, stop in rows:
            logits[request].append(out[start:stop])
    return [torch.cat(parts) for parts in logits]


def _steps(lengths: list[int]) -> list[list[tuple[int, int, int]]]:
    """(request, start, count) per step: chunks of uneven size, then up to six decodes. The
    requests are out of phase, so that steps mix both."""
    runs = []
    for request, length in enumerate(lengths):
        decodes = min(6, length // 2)
        first = (length - decodes) * 2 // 3
        cuts = [0, first, length - decodes, *range(length - decodes + 1, length + 1)]
        runs.append([(request, a, b - a) for a, b in itertools.pairwise(cuts) if b > a])
    depth = max(len(run) + 2 * request for request, run in enumerate(runs))
    steps = []
    for turn in range(depth):
        late = [run[turn - 2 * n] for n, run in enumerate(runs) if 0 <= turn - 2 * n < len(run)]
        if late:
            steps.append(late)
    return steps


def pack_step(
    step: list[tuple[int, int, int]], prompts: list[torch.Tensor], tables: list[torch.Tensor], block_size: int
) -> tuple[list[tuple[int, int, int]], AttentionBatch, torch.Tensor, torch.Tensor]:
    """The rows of one step, decodes first: where each request's rows are, the batch, ids, positions."""
    decodes = [entry for entry in step if entry[2] == 1 and entry[1] > 0]
    chunks = [entry for entry in step if entry not in decodes]
    rows, ids, positions, blocks, described = [], [], [], [], []
    row = 0
    for request, start, count in decodes + chunks:
        position = torch.arange(start, start + count)
        rows.append((request, row, row + count))
        ids.append(prompts[request][start : start + count])
        positions.append(position)
        blocks.append(tables[request][position // block_size])
        if (request, start, count) in chunks:
            described.append(ChunkRows(row, count, start, request))
        row += count
    lens = torch.tensor([start + 1 for _, start, _ in decodes], dtype=torch.int64)
    longest = int(lens.max()) if decodes else 0
    slots = torch.tensor([request for request, _, _ in decodes], dtype=torch.int64)
    position = torch.cat(positions)
    batch = AttentionBatch(
        len(decodes),
        pad_sequence(tables, batch_first=True),
        slots,
        lens,
        longest,
        described,
        torch.cat(blocks),
        position % block_size,
    )
    return rows, batch, torch.cat(ids), position

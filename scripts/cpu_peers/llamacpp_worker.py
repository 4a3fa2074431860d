"""llama.cpp through the low-level calls of llama-cpp-python: one batch of one token of every request a
step. Runs in the environment of that."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from scripts.cpu_peers.worker_loop import Started, serve


class LlamaCppEngine:
    """Prompts go in first, as many rows at once as a batch holds; then all requests decode together."""

    def __init__(self, library: Any, model: Any, context: Any, batch_tokens: int) -> None:
        self._library = library
        self._context = context
        self._batch_tokens = batch_tokens
        self._batch = library.llama_batch_init(batch_tokens, 0, 1)
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    def generate(self, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        outputs: list[list[int]] = [[] for _ in prompts]
        rows = [
            (sequence, position, token, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        self._run(rows, outputs)
        for step in range(output_tokens - 1):
            self._run(
                [(s, len(prompt) + step, outputs[s][-1], True) for s, prompt in enumerate(prompts)], outputs
            )
        return outputs

    def _run(self, rows: list[tuple[int, int, int, bool]], outputs: list[list[int]]) -> None:
        """Rows of (sequence, position, token, whether it gives a next token), a batch after another."""
        for start in range(0, len(rows), self._batch_tokens):
            self._decode(rows[start : start + self._batch_tokens], outputs)

    def _decode(self, rows: list[tuple[int, int, int, bool]], outputs: list[list[int]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (sequence, position, token, wanted) in enumerate(rows):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = wanted
        code = self._library.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code} for {len(rows)} tokens")
        for row, (sequence, _, _, wanted) in enumerate(rows):
            if wanted:
                outputs[sequence].append(self._greedy(row))

    def _greedy(self, row: int) -> int:
        import numpy

        logits = self._library.llama_get_logits_ith(self._context, row)
        return int(numpy.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


def start(settings: dict[str, Any]) -> Started:
    import llama_cpp

    llama_cpp.llama_backend_init()
    file = quantised(llama_cpp, Path(settings["gguf"]), Path(settings["exports"]), settings["weights"])
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {file}")
    context = llama_cpp.llama_init_from_model(model, context_parameters(llama_cpp, settings))
    if not context:
        raise RuntimeError("llama.cpp cannot make a context of these settings")
    configuration = {
        "weights": settings["weights"],
        "flash_attention": settings["flash_attention"],
        "unified_kv": settings["unified_kv"],
        "build": llama_cpp.llama_print_system_info().decode(),
    }
    engine = LlamaCppEngine(llama_cpp, model, context, settings["max_num_batched_tokens"])
    return Started(engine, {"llama-cpp-python": llama_cpp.__version__}, configuration)


def context_parameters(library: Any, settings: dict[str, Any]) -> Any:
    """A KV cache of `tokens_per_request` for each of `max_num_seqs` requests."""
    parameters = library.llama_context_default_params()
    parameters.n_seq_max = settings["max_num_seqs"]
    parameters.n_ctx = settings["max_num_seqs"] * settings["tokens_per_request"]
    parameters.n_batch = parameters.n_ubatch = settings["max_num_batched_tokens"]
    parameters.n_threads = parameters.n_threads_batch = settings["threads"]
    parameters.kv_unified = settings["unified_kv"]
    parameters.flash_attn_type = {"auto": -1, "off": 0, "on": 1}[settings["flash_attention"]]
    return parameters


def quantised(library: Any, gguf: Path, exports: Path, weights: str) -> Path:
    """The GGUF file with these weights (`Q8_0`, `Q4_0`, `BF16`, ...; `as-is` takes it as it is), made now
    if need be."""
    if weights == "as-is":
        return gguf
    target = exports / f"{gguf.stem}-{gguf.stat().st_size}-{weights}.gguf"
    if target.exists():
        return target
    exports.mkdir(parents=True, exist_ok=True)
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{weights}")
    parameters.allow_requantize = True
    unfinished = target.with_suffix(".unfinished")
    code = library.llama_model_quantize(
        str(gguf).encode(), str(unfinished).encode(), ctypes.byref(parameters)
    )
    if code:
        raise RuntimeError(f"llama.cpp cannot make {weights} of {gguf}: {code}")
    unfinished.rename(target)
    return target


if __name__ == "__main__":
    serve(start)

"""The text of batch requests: where a stop string ends one, and what is kept of its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from chiron_engine.rpc.v1 import engine_pb2, inference_pb2, types_pb2

from .output_text import OutputText
from .text import ModelText


class BatchText:
    """For requests as `InferenceService.resolve` returns them. Safe to use from several threads."""

    def __init__(self, text: ModelText) -> None:
        self._text = text

    def watcher(self, request: inference_pb2.GenerateRequest) -> Callable[[Sequence[int]], bool] | None:
        """To be called with the tokens as they come: whether a stop string came. None where the request
        has none."""
        if not request.stop:
            return None
        output = OutputText(self._text.detokenizer(), request.stop, request.sampling.min_tokens)

        def is_stopped(tokens: Sequence[int]) -> bool:
            output.feed_all(tokens, False)
            return output.is_stopped

        return is_stopped

    def output(
        self,
        request: inference_pb2.GenerateRequest,
        tokens: Sequence[int],
        finished: engine_pb2.Finished,
    ) -> inference_pb2.GenerateChunk:
        """The whole output in one chunk, with finish reason and usage."""
        output = OutputText(self._text.detokenizer(), request.stop, request.sampling.min_tokens)
        text, taken = output.feed_all(tokens, finished.reason == types_pb2.FINISH_REASON_STOP)
        text += "" if output.is_stopped else output.finish()
        prompt_tokens = len(request.token_ids.ids)
        return inference_pb2.GenerateChunk(
            text=text,
            token_ids=tokens[:taken],
            finish_reason=types_pb2.FINISH_REASON_STOP if output.is_stopped else finished.reason,
            usage=inference_pb2.Usage(
                prompt_tokens=prompt_tokens,
                completion_tokens=taken,
                cached_tokens=min(finished.cached_tokens, prompt_tokens),
            ),
        )

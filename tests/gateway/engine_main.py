"""An engine without a model as a process: `python -m tests.gateway.engine_main STEP_S DRAIN_S`.

Prints its port once it is ready. With a model directory as third argument a gateway runs beside it.
"""

from __future__ import annotations

import asyncio
import logging
import sys

from chiron_engine.core.engine_core import EngineCore
from chiron_engine.gateway.engine_pool import EnginePool
from chiron_engine.gateway.server import Gateway
from chiron_engine.gateway.text import ModelText
from chiron_engine.serving.engine_process import LoadedEngine, run_engine
from tests.gateway.serving_stack import DESCRIPTION, NAME, slow_executor


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    step_s, drain_s = float(sys.argv[1]), float(sys.argv[2])
    text = ModelText.from_directory(sys.argv[3]) if len(sys.argv) > 3 else None
    companion = None if text is None else lambda address: Gateway(text, NAME, EnginePool([address]))
    asyncio.run(
        run_engine(
            lambda report: LoadedEngine(EngineCore(slow_executor(step_s)), DESCRIPTION),
            drain_timeout_s=drain_s,
            companion=companion,
            on_ready=lambda port: print(port, flush=True),
        )
    )


if __name__ == "__main__":
    main()

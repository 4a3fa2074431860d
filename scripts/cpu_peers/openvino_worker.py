"""OpenVINO GenAI's continuous batching on the CPU. Runs in the environment of that, which has what
exports a Hugging Face folder to OpenVINO's format as well."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.cpu_peers.worker_loop import Started, serve

PACKAGES = ("openvino-genai", "openvino", "optimum-intel", "nncf")


class OpenvinoEngine:
    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def generate(self, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        import numpy
        import openvino  # type: ignore[import-not-found]
        import openvino_genai  # type: ignore[import-not-found]

        config = openvino_genai.GenerationConfig()
        config.do_sample = False
        config.ignore_eos = True
        config.min_new_tokens = config.max_new_tokens = output_tokens
        asked = [openvino.Tensor(numpy.array([ids], dtype=numpy.int64)) for ids in prompts]
        results = self._pipeline.generate(asked, [config] * len(asked))
        return [list(result.m_generation_ids[0]) for result in results]


def start(settings: dict[str, Any]) -> Started:
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = settings["cache_gib"]
    scheduler.max_num_seqs = settings["max_num_seqs"]
    scheduler.max_num_batched_tokens = settings["max_num_batched_tokens"]
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    folder = exported(Path(settings["model"]), Path(settings["exports"]), settings["weights"])
    properties = {"INFERENCE_NUM_THREADS": settings["threads"], **settings["properties"]}
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)
    configuration = {
        "weights": settings["weights"],
        "cache_gib": scheduler.cache_size,
        "dynamic_split_fuse": scheduler.dynamic_split_fuse,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "properties": {**device_defaults(), **properties},
    }
    return Started(OpenvinoEngine(pipeline), {name: version(name) for name in PACKAGES}, configuration)


def exported(model: Path, exports: Path, weights: str) -> Path:
    """The model in OpenVINO's format, made now if need be. weights: fp32, fp16, int8 or int4."""
    target = exports / f"{model.parent.name}-{model.name}-{weights}"
    if target.exists():
        return target
    unfinished = target.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"]
    options = ["--model", str(model), "--task", "text-generation-with-past", "--library", "transformers"]
    subprocess.run([*command, *options, "--weight-format", weights, str(unfinished)], check=True)
    unfinished.rename(target)
    return target


def device_defaults() -> dict[str, str]:
    """What the CPU plugin takes where nothing is said."""
    import openvino

    core = openvino.Core()
    names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    found = {name: core.get_property("CPU", name) for name in names}
    return {
        name: value.get_type_name() if hasattr(value, "get_type_name") else str(value)
        for name, value in found.items()
    }


if __name__ == "__main__":
    serve(start)

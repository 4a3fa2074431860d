"""The results of a suite as one JSON file and one page of Markdown tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

NAME = "gpu_suite"


def folder_name(device_name: str) -> str:
    """A device's name as a folder: `NVIDIA H200` is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def write_report(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / f"{NAME}.md").write_text(markdown(results), encoding="utf-8")


def markdown(results: dict[str, Any]) -> str:
    device = results["device"]
    lines = [f"# {device['name']}", ""]
    if not results["is_gpu"]:
        lines += ["**A trial of the script on a CPU. None of these are GPU figures.**", ""]
    lines += [
        f"torch {device['torch']}, {device['memory_gib']:.1f} GiB, {results['seconds']:.0f} s in all, "
        f"tests: {_tests(results['tests'])}; of the kernels: {_tests(results['kernel_tests'])}; "
        f"microbenchmarks: {_benchmarks(results['microbenchmarks'])}.",
        "",
        *_ceilings(results),
    ]
    for model in results["models"]:
        lines += _model(model)
    if results["skipped"]:
        lines += ["## Left out", "", *(f"- {reason}" for reason in results["skipped"]), ""]
    return "\n".join(lines)


def _tests(tests: dict[str, Any]) -> str:
    if "not_run" in tests:
        return f"not run ({tests['not_run']})"
    counts = f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
    return counts + _stopped(tests)


def _benchmarks(benchmarks: dict[str, Any]) -> str:
    if "not_run" in benchmarks:
        return f"not run ({benchmarks['not_run']})"
    return "microbenchmarks.md" + (", with failures" if benchmarks["failed"] else "") + _stopped(benchmarks)


def _stopped(part: dict[str, Any]) -> str:
    return f", stopped after {part['stopped_after_s']} s" if "stopped_after_s" in part else ""


def _ceilings(results: dict[str, Any]) -> list[str]:
    copies, product = results["bandwidth"], results["matmul"]
    return table(
        ("ceiling", "value"),
        [
            ("copy on the device (read + written)", f"{copies['device_gb_per_s']:,.0f} GB/s"),
            ("copy host to device", f"{copies['host_to_device_gb_per_s']:.1f} GB/s"),
            ("copy device to host", f"{copies['device_to_host_gb_per_s']:.1f} GB/s"),
            (
                f"matrix product {product['size']}, {product['dtype']}",
                f"{product['tflop_per_s']:,.1f} TFLOP/s",
            ),
        ],
    )


def _model(model: dict[str, Any]) -> list[str]:
    lines = [f"## {model['name']}, {model['dtype']}, random weights, {model['kernels']} kernels", ""]
    lines += [f"- {model['kv']}"]
    lines += [f"- ready in {model['ready_s']:.1f} s: " + ", ".join(_phases(model["load_phases_s"]))]
    swap = model["swap"]
    if swap:
        lines += [
            f"- a block of {swap['block_bytes']:,} bytes: out {swap['copy_out_gb_per_s']:.1f} GB/s, "
            f"in {swap['copy_in_gb_per_s']:.1f} GB/s; recomputing a token {swap['recompute_s'] * 1e6:,.1f} us"
        ]
    lines += [f"- {_throughput(model['throughput'])}"]
    if fp8 := model.get("fp8_kv"):
        lines += [f"- 8 bits: {fp8['kv']}", f"- 8 bits: {_throughput(fp8['throughput'])}"]
    lines += [""]
    lines += [
        "Milliseconds of a decode step, by batch and context (the last of a row fills the KV pool or "
        "the context):",
        "",
    ]
    lines += _decode_rows(model["grid"])
    lines += ["Milliseconds of a prompt:", ""]
    prompts = [p for p in model["grid"] if p["prompt_tokens"]]
    lines += table(
        ("tokens", "after", "ms"),
        [(p["prompt_tokens"], p["context"], f"{p['ms']:.2f}") for p in prompts],
    )
    return lines


def _throughput(run: dict[str, Any]) -> str:
    return (
        f"{run['requests']} requests of {run['prompt_tokens']} in, {run['output_tokens_each']} out: "
        f"{run['output_tokens_per_s']:,.1f} output tokens/s, decode step {run['decode_step_ms_p50']:.2f} ms, "
        f"{100 * run['outside_executor_share_decode']:.1f} % of it outside the executor"
    )


def _phases(phases: dict[str, float]) -> list[str]:
    return [f"{name} {seconds:.1f} s" for name, seconds in phases.items()]


def _decode_rows(grid: list[dict[str, Any]]) -> list[str]:
    points = [p for p in grid if p["decode_requests"]]
    rows = []
    for batch in sorted({p["decode_requests"] for p in points}):
        cells = [f"{p['context']}: {p['ms']:.2f}" for p in points if p["decode_requests"] == batch]
        rows.append((batch, ", ".join(cells)))
    return table(("batch", "context: ms"), rows)


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """Lines of a Markdown table, and an empty one after it."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return [*lines, ""]

"""The mixed workload: attainment of both classes, and GPU-hours over the lower bound."""

from __future__ import annotations

from chiron_engine.sim.workload import BATCH_SLO

from .measure import Measured, Options, run, workload_of

LOAD = 10.0
ITL_SLOS = ("200ms", "3x", "1.5x")
POLICIES = ("chiron", "paper", "paper-literal", "clairvoyant")
ATTAINED = 0.99
OVER_BOUND = 1.25


def measure(options: Options) -> Measured:
    """Beside the policies asked for, a fixed fleet as large as the first of them ever was: the peak
    that a fleet without scaling would have to be built for."""
    load = LOAD * options.scale
    measured = Measured()
    measured.notes.append(
        f"Azure conversation as interactive and arXiv summarisation lengths as batch, {load:g} instances of "
        f"mean demand each; targets are for the first policy, the others stand beside it"
    )
    for itl_slo in options.itl_slos or ITL_SLOS:
        slos = (options.interactive_slo(itl_slo), BATCH_SLO)
        workload = workload_of(options, "azure-conv", "arxiv-summarization", load, load, slos)
        settings = options.settings(2 * load)
        runs = run(options, workload, POLICIES, settings, itl_slo=itl_slo)
        most = settings.max_gpus // options.load_profile().gpus
        peak = f"static:{min(runs[0].summary['peak_instances'], most)}"
        first = measured.add(runs[0], f"{itl_slo} {runs[0].summary['policy']}")
        _judge(measured, first, runs[0].summary)
        for other in (*runs[1:], *run(options.with_policies(peak), workload, (), settings, itl_slo=itl_slo)):
            measured.add(other, f"{itl_slo} {other.summary['policy']}")
    return measured


def _judge(measured: Measured, name: str, summary: dict) -> None:
    for slo_class, share in summary["slo_attainment"].items():
        seen = "no request" if share is None else f"{100 * share:.3f} %"
        measured.judge(name, f"{slo_class}: 99 % in SLO", seen, share is not None and share >= ATTAINED)
    ratio = summary["gpu_hours"] / summary["lower_bound_gpu_hours"]
    target = f"GPU-hours at most {OVER_BOUND:g} x the bound"
    seen = f"{ratio:.3f} x ({summary['gpu_hours']:.2f} of {summary['lower_bound_gpu_hours']:.2f})"
    measured.judge(name, target, seen, ratio <= OVER_BOUND)

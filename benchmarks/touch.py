"""``python -m benchmarks.touch``: every operator once, checked, for a memory checker or a profiler.

Under compute-sanitizer the whole benchmark would take hours; this runs each fused implementation
forward and backward at the quick sizes, or with ``--measured-sizes`` at those of the benchmarks,
and times nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks import bench_distance, bench_pool, bench_prototype, bench_tps, bench_warp, check
from benchmarks.case import BOTH, FORWARD, Choice


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; raises where a result is wrong."""
    line = argparse.ArgumentParser(prog="python -m benchmarks.touch", description=__doc__)
    line.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    line.add_argument("--only", nargs="+", metavar="OP", help="operators")
    line.add_argument("--measured-sizes", action="store_true", help="for a profiler")
    options = line.parse_args(arguments)
    quick = not options.measured_sizes
    choice = Choice(torch.device(options.device), quick=quick, compile=False)
    touched = 0
    for family in (bench_warp, bench_tps, bench_pool, bench_prototype, bench_distance):
        for case in family.cases(choice):
            if options.only and case.op not in options.only:
                continue
            ours = [p for p in case.providers if p.ours and p.unavailable is None]
            if not ours:
                continue
            tensors = case.inputs(choice.device)
            with torch.no_grad():
                outputs = case.reference(tensors)
            grads = check.output_gradients(outputs)
            expected = check.expected_results(case, tensors, grads)
            for provider in ours:
                name = f"{case.op} {case.shape} {provider.name}"
                chosen = BOTH if case.leaves else FORWARD
                leaves = check.prepared(tensors, case, chosen)
                actual = check.timed_call(provider.run, case, chosen, leaves, grads)()
                error = check.worst_error(name, actual, expected, check.tolerance_of(case))
                print(f"{name}: {error:.1e}", flush=True)
                touched += 1
    if touched == 0:
        print(f"no fused implementation runs on {choice.device}", file=sys.stderr)
    return 0 if touched else 1


if __name__ == "__main__":
    sys.exit(main())

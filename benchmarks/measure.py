"""From a case to its rows: check every provider, then time them in turns beside a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks import check
from benchmarks.case import (
    BACKWARD,
    BOTH,
    DTYPE_NAMES,
    FORWARD,
    Case,
    Choice,
    Outputs,
    Provider,
    Tensors,
)
from benchmarks.rows import Row
from benchmarks.timing import (
    EventClock,
    NoGraphError,
    Replay,
    Settings,
    clock_for,
    interleave,
    percentile,
)
from benchmarks.yardstick import make_copies

COPY = "copy"

# On a GPU, inputs take turns until they fill this, more than any level-2 cache; at most so many.
ROTATED_BYTES = 256 << 20
MOST_INPUT_SETS = 8


@dataclass(frozen=True)
class Subject:
    """A checked function to be timed: the calls of one turn, and its row without the times."""

    row: Row
    calls: Sequence[Callable[[], object]]


def minimal_bytes(
    case: Case, pass_name: str, tensors: Tensors, outputs: Sequence[torch.Tensor]
) -> int:
    """Bytes that must move if every tensor is touched once per direction, whatever the method.

    Forward: inputs read, outputs written. Backward: inputs and output gradients read, gradients of
    the leaves written. What an implementation keeps for its backward pass is not counted.
    """
    given = sum(tensor.nbytes for tensor in tensors.values())
    made = sum(output.nbytes for output in outputs)
    forward = given + made
    if pass_name == FORWARD:
        return forward
    backward = given + made + sum(tensors[name].nbytes for name in case.leaves)
    return forward + backward if pass_name == BOTH else backward


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Device memory that one call takes above what is there before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def time_subjects(
    subjects: Sequence[Subject],
    device: torch.device,
    settings: Settings,
    *,
    moved: int | None = None,
    images: int | None = None,
    graphs: bool = True,
) -> list[Row]:
    """Rows of the subjects, timed in turns; with a row of the copy where bytes are counted.

    Args:
        subjects: the checked providers of one case and pass.
        device: where they run.
        settings: for how long.
        moved: counted minimal bytes of a call.
        images: images a call handles.
        graphs: whether, on CUDA, calls are timed as CUDA graphs beside being launched one by one.
    """
    if not subjects:
        return []
    entries = list(subjects)
    rates: dict[str, int] = {}
    if moved is not None:
        copies, copied, kind = make_copies(device, moved)
        first = subjects[0].row
        note = f"{kind}, {copied / 1e6:.3g} MB moved"
        row = replace(first, implementation=COPY, error=None, peak_mib=None, note=note)
        entries.append(Subject(row, copies))
        rates = {subject.row.implementation: moved for subject in subjects} | {COPY: copied}
    samples = interleave(
        {entry.row.implementation: entry.calls for entry in entries}, clock_for(device), settings
    )
    launched: dict[str, float] = {}
    reasons: dict[str, str] = {}
    if device.type == "cuda" and graphs:
        launched = {name: percentile(times, 0.5) for name, times in samples.items()}
        replayed, reasons = _replayed(entries, settings)
        samples |= replayed
    medians = {name: percentile(times, 0.5) for name, times in samples.items()}
    gb = {name: rates[name] / (1e6 * medians[name]) for name in rates}
    rows = []
    for entry in entries:
        name = entry.row.implementation
        rows.append(
            replace(
                entry.row,
                launched_ms=launched.get(name),
                note="; ".join(filter(None, [entry.row.note, reasons.get(name)])),
                p20_ms=percentile(samples[name], 0.2),
                p50_ms=medians[name],
                p80_ms=percentile(samples[name], 0.8),
                gb_per_s=gb.get(name),
                copy_fraction=gb[name] / gb[COPY] if name in gb else None,
                images_per_s=1e3 * images / medians[name] if images else None,
                calls=len(samples[name]),
            )
        )
    return rows


def _replayed(
    entries: Sequence[Subject], settings: Settings
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of each call inside a CUDA graph, and why others are in none."""
    replays: dict[str, Replay] = {}
    reasons: dict[str, str] = {}
    for entry in entries:
        name = entry.row.implementation
        try:
            replays[name] = Replay(entry.calls)
        except NoGraphError as error:
            reasons[name] = f"launched, no CUDA graph: {error}"
    samples = interleave(
        {name: [replay] for name, replay in replays.items()}, EventClock(), settings
    )
    return {n: [ms / replays[n].count for ms in times] for n, times in samples.items()}, reasons


def _input_sets(case: Case, choice: Choice) -> list[Tensors]:
    first = case.inputs(choice.device)
    size = max(1, sum(tensor.nbytes for tensor in first.values()))
    count = 1
    if choice.device.type == "cuda":
        count = min(MOST_INPUT_SETS, max(1, -(-ROTATED_BYTES // size)))
    return [first] + [{n: t.clone() for n, t in first.items()} for _ in range(count - 1)]


def _missing(case: Case, provider: Provider, reason: str) -> Row:
    dtype = DTYPE_NAMES[case.dtype]
    return Row(case.op, provider.name, "", dtype, case.shape, note=f"not measured: {reason}")


def measure_case(case: Case, choice: Choice, settings: Settings) -> Iterator[Row]:
    """Rows of one case: every pass and provider, the copy, and who could not run and why.

    Raises:
        WrongResultError: a provider's result is not that of the reference in float64.
        RuntimeError: one of our implementations says it can run and fails.

    Either is raised last: what is at fault is not timed, the rows of the others come first.
    """
    problem: Exception | None = None
    sets = _input_sets(case, choice)
    with torch.no_grad():
        outputs = case.reference(sets[0])
    grads = check.output_gradients(outputs)
    expected = check.expected_results(case, sets[0], grads)
    failed: set[str] = set()
    for provider in case.providers:
        if provider.unavailable is not None:
            yield _missing(case, provider, provider.unavailable)
            failed.add(provider.name)
    results = {FORWARD: expected[: len(outputs)], BACKWARD: expected[len(outputs) :]}
    for pass_name in case.passes:
        wanted: Outputs = results.get(pass_name, expected)
        subjects = []
        for provider in case.providers:
            if provider.name in failed or pass_name not in provider.passes:
                continue
            try:
                calls = [
                    check.timed_call(
                        provider.run,
                        case,
                        pass_name,
                        check.prepared(tensors, case, pass_name),
                        grads,
                    )
                    for tensors in sets
                ]
                actual = calls[0]()
            except Exception as error:
                failed.add(provider.name)
                if provider.ours:
                    problem = problem or error
                    continue
                lines = str(error).strip().splitlines() or [type(error).__name__]
                yield _missing(case, provider, f"failed: {lines[0][:200]}")
                continue
            label = f"{case.op} {case.shape} {pass_name}: {provider.name}"
            limit = check.tolerance_of(case) * provider.slack
            try:
                worst = check.worst_error(label, actual, wanted, limit)
            except check.WrongResultError as error:
                problem = problem or error
                failed.add(provider.name)
                continue
            finally:
                del actual
            row = Row(
                case.op,
                provider.name,
                pass_name,
                DTYPE_NAMES[case.dtype],
                case.shape,
                peak_mib=peak_mib(calls[0], choice.device),
                error=worst,
                note=provider.note,
            )
            subjects.append(Subject(row, calls))
        moved = minimal_bytes(case, pass_name, sets[0], outputs)
        yield from time_subjects(subjects, choice.device, settings, moved=moved)
    if problem is not None:
        raise problem

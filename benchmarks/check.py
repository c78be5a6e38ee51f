"""The judge: every timed function's result against the reference in float64, before timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.case import BACKWARD, BOTH, FORWARD, Case, Outputs, Tensors

# A sum of a few hundred float32 products, and one rounding of the result for half types.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}


class WrongResultError(RuntimeError):
    """A provider's result is not what the reference computes in float64."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in the 2-norm; infinite where anything is not finite."""
    if actual.shape != expected.shape:
        raise WrongResultError(f"shape {list(actual.shape)}, wanted {list(expected.shape)}")
    difference = actual.detach().double() - expected.double()
    if not bool(difference.isfinite().all()):
        return float("inf")
    size = float(expected.double().norm())
    error = float(difference.norm())
    return error / size if size > 0.0 else error


def worst_error(
    name: str, actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float
) -> float:
    """The largest relative error of several tensors.

    Raises:
        WrongResultError: it is above the tolerance, or there are fewer tensors than wanted.
    """
    if len(actual) != len(expected):
        raise WrongResultError(f"{name}: {len(actual)} results, wanted {len(expected)}")
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    worst = max(errors, default=0.0)
    if not worst <= tolerance:
        raise WrongResultError(
            f"{name}: error {worst:.2e} against float64 (result {errors.index(worst)} of "
            f"{len(errors)}), at most {tolerance:.2e}"
        )
    return worst


def prepared(tensors: Tensors, case: Case, pass_name: str) -> Tensors:
    """Fresh leaves with the tensors' values, wanting gradients when the pass has a backward."""
    return {
        name: tensor.detach().clone().requires_grad_(pass_name != FORWARD and name in case.leaves)
        for name, tensor in tensors.items()
    }


def output_gradients(outputs: Outputs, seed: int = 11) -> Outputs:
    """What the backward pass starts from: normal figures in the type of each output."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
        for output in outputs
    )


def gradients(
    outputs: Outputs,
    output_grads: Outputs,
    tensors: Tensors,
    leaves: Sequence[str],
    *,
    again: bool = False,
) -> Outputs:
    """Gradients of the outputs that have any, with respect to the named leaves.

    ``again`` keeps the graph, so that they can be computed once more.
    """
    pairs = [
        (output, grad.to(output.dtype))
        for output, grad in zip(outputs, output_grads, strict=True)
        if output.requires_grad
    ]
    return torch.autograd.grad(
        [output for output, _ in pairs],
        [tensors[name] for name in leaves],
        [grad for _, grad in pairs],
        retain_graph=again,
    )


def timed_call(
    run: Callable[[Tensors], Outputs],
    case: Case,
    pass_name: str,
    tensors: Tensors,
    output_grads: Outputs,
) -> Callable[[], Outputs]:
    """The function that is checked and then timed.

    Forward gives the outputs; backward the leaves' gradients, on a graph made before; both gives
    the outputs and then the gradients.
    """
    if pass_name == BACKWARD:
        made = run(tensors)
        return lambda: gradients(made, output_grads, tensors, case.leaves, again=True)

    if pass_name == FORWARD:

        def forward() -> Outputs:
            with torch.no_grad():
                return run(tensors)

        return forward

    def forward_and_backward() -> Outputs:
        outputs = run(tensors)
        return *outputs, *gradients(outputs, output_grads, tensors, case.leaves)

    return forward_and_backward


def expected_results(case: Case, tensors: Tensors, output_grads: Outputs) -> Outputs:
    """Outputs, then the leaves' gradients, of the reference in float64."""
    exact = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    exact = prepared(exact, case, BOTH)
    grads = tuple(grad.double() for grad in output_grads)
    results = timed_call(case.reference, case, BOTH if case.leaves else FORWARD, exact, grads)()
    return tuple(result.detach() for result in results)


def tolerance_of(case: Case) -> float:
    """The case's own tolerance, or that of its type."""
    return TOLERANCES[case.dtype] if case.tolerance is None else case.tolerance

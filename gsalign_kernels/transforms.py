"""Fused operators under ``torch.func``: autograd that its transforms can nest, and batching rules.

``torch.library.register_autograd`` makes operators that ``torch.autograd`` differentiates and
``torch.func.grad`` refuses. Here the same formula is registered in a way that serves both, so that
per-sample gradients, ``jacrev`` and every nesting of ``vmap`` and ``grad`` work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.library import Library

_DEVICES = ("CPU", "CUDA", "Meta")


def register_autograd(
    library: Library,
    name: str,
    *,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    """Register a derivative, for ``torch.autograd`` and for the transforms of ``torch.func``.

    Args:
        library: of the operator's namespace; must outlive the operator.
        name: operator name without namespace.
        backward: ``(ctx, *grads)``, one gradient per argument of the operator.
        setup_context: ``(ctx, inputs, output)``, saves what ``backward`` needs.
    """
    # Serves the device types that have no kernel of their own below.
    torch.library.register_autograd(f"{library.ns}::{name}", backward, setup_context=setup_context)
    op = getattr(getattr(torch.ops, library.ns), name).default
    kernel = _autograd_kernel(op, backward, setup_context)
    for device in _DEVICES:
        library.impl(name, kernel, f"Autograd{device}", with_keyset=True)


def in_transform() -> bool:
    """Whether a transform of ``torch.func``, or forward-mode differentiation, is under way."""
    return (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _autograd_kernel(
    op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    def below_autograd(keys: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx: Any, keys: Any, *arguments: Any) -> Any:
        # Autograd turned gradients off for this call; the levels of outer transforms want them.
        with torch.enable_grad():
            result = below_autograd(keys, arguments)
        setup_context(ctx=ctx, inputs=arguments, output=result)
        return result

    def backward_with_keys(ctx: Any, *grads: Any) -> Any:
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = needs[1:]  # the operator's arguments do not begin with the keys
        try:
            return None, *backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needs

    # Not autograd.Function: under a transform that would look for the transform's level again,
    # while the dispatcher has already unwrapped the arguments to it.
    node = type(
        f"Differentiable_{op._namespace}_{op._opname}",
        (_SingleLevelFunction,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward_with_keys)},
    )

    def kernel(keys: Any, *arguments: Any) -> Any:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        _refuse_tangents(op, tensors)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return below_autograd(keys, arguments)
        allowed = torch._C._functorch.get_single_level_autograd_function_allowed()
        torch._C._functorch.set_single_level_autograd_function_allowed(True)
        try:
            return node.apply(keys, *arguments)  # type: ignore[attr-defined]
        finally:
            torch._C._functorch.set_single_level_autograd_function_allowed(allowed)

    return kernel


def _refuse_tangents(op: Any, tensors: Sequence[Tensor]) -> None:
    """Without this, forward-mode derivatives would silently be zero."""
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"{op._opname}: has no forward-mode derivative (jvp, jacfwd); use reverse mode "
            f"(grad, vjp, jacrev), or implementation='reference'"
        )


def register_vmap(namespace: str, name: str, shared: Sequence[str] | None) -> None:
    """Register how ``vmap`` maps an operator and its backward pass.

    The mapped axis is moved to the front and merged with the batch axis, for one call. Where a
    tensor that the batch shares is mapped itself, or the backward pass sums the gradient of one
    over the batch, the operator is called once per mapped sample.

    Args:
        namespace: dispatcher namespace.
        name: operator name without namespace.
        shared: names of the tensors without a batch axis; None to always call once per sample.
    """
    operators = getattr(torch.ops, namespace)
    forward, backward = (getattr(operators, n).default for n in (name, f"{name}_backward"))
    sums_over_batch = shared is None or len(shared) > 0
    torch.library.register_vmap(f"{namespace}::{name}", _vmap_rule(forward, shared))
    torch.library.register_vmap(
        f"{namespace}::{name}_backward", _vmap_rule(backward, None if sums_over_batch else ())
    )


def register_vmap_one_by_one(namespace: str, name: str) -> None:
    """Register that ``vmap`` calls an operator once per mapped sample.

    Args:
        namespace: dispatcher namespace.
        name: operator name without namespace.
    """
    op = getattr(getattr(torch.ops, namespace), name).default
    torch.library.register_vmap(f"{namespace}::{name}", _vmap_rule(op, None))


def _vmap_rule(op: Any, shared: Sequence[str] | None) -> Callable[..., Any]:
    names = [argument.name for argument in op._schema.arguments]
    has_batch = [shared is not None and name not in shared for name in names]

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        mapped = [dim is not None for dim in in_dims]
        arguments = tuple(
            argument if dim is None else argument.movedim(dim, 0)
            for argument, dim in zip(arguments, in_dims, strict=True)
        )
        merges = all(batch for batch, map_ in zip(has_batch, mapped, strict=True) if map_)
        if merges:
            results = _merged(op, info.batch_size, arguments, mapped, has_batch)
        else:
            results = _one_by_one(op, info.batch_size, arguments, mapped)
        return results, (0,) * len(results) if isinstance(results, tuple) else 0

    return rule


def _each(results: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return tuple(map(function, results)) if isinstance(results, tuple) else function(results)


def _merged(
    op: Any, count: int, arguments: tuple[Any, ...], mapped: list[bool], has_batch: list[bool]
) -> Any:
    batch = next(a.shape[1] for a, map_ in zip(arguments, mapped, strict=True) if map_)
    merged = []
    for argument, map_, batch_axis in zip(arguments, mapped, has_batch, strict=True):
        if isinstance(argument, Tensor) and batch_axis:
            if not map_:
                argument = argument.expand(count, *argument.shape)
            argument = argument.flatten(0, 1)
        merged.append(argument)
    return _each(op(*merged), lambda result: result.unflatten(0, (count, batch)))


def _one_by_one(op: Any, count: int, arguments: tuple[Any, ...], mapped: list[bool]) -> Any:
    def sample(index: int) -> list[Any]:
        return [a[index] if map_ else a for a, map_ in zip(arguments, mapped, strict=True)]

    if count == 0:
        # Nothing to call with, so the fake tells the shapes.
        first = next(a for a, map_ in zip(arguments, mapped, strict=True) if map_)
        described = [
            (a.new_empty(a.shape[1:] if map_ else a.shape, device="meta"))
            if isinstance(a, Tensor)
            else a
            for a, map_ in zip(arguments, mapped, strict=True)
        ]
        return _each(
            op(*described),
            lambda result: first.new_empty((0, *result.shape), dtype=result.dtype),
        )
    results = [op(*sample(index)) for index in range(count)]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(column) for column in zip(*results, strict=True))
    return torch.stack(results)

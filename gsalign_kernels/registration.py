"""Gives a fused operator its fake, autograd, autocast and vmap rules, once for all families.

Native operators live in the dispatcher namespace ``gsalign`` (C++ and CUDA, told apart by the
device of their tensors), Triton ones in ``gsalign_triton``. Both have the same schema, so one
formula serves both. ``<name>`` is the forward pass and ``<name>_backward`` the backward pass.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gsalign_kernels import transforms

NATIVE = "gsalign"
TRITON = "gsalign_triton"

# The libraries must outlive the registrations made through them.
_libraries: dict[str, torch.library.Library] = {}


def define_triton(*modules: str) -> None:
    """Defines the operators of modules of ``gsalign_kernels.triton``, where that is installed.

    triton itself is imported when one of them first runs.
    """
    if importlib.util.find_spec("gsalign_kernels.triton") is not None:
        for module in modules:
            importlib.import_module(f"gsalign_kernels.triton.{module}")


def operator(name: str, implementation: str) -> Any:
    """The dispatcher's operator behind an implementation, as ``torch.ops.gsalign.warp_tokens``."""
    namespace = TRITON if implementation == "triton" else NATIVE
    return getattr(getattr(torch.ops, namespace), name).default


def call(name: str, implementation: str, *arguments: Any) -> Any:
    """Calls an operator, past autograd where there is nothing to differentiate.

    Autograd's part is written in Python, and costs more than a small operator's work. Compilers
    and the transforms of ``torch.func`` always see it.
    """
    op = operator(name, implementation)
    if (
        torch.compiler.is_compiling()
        or transforms.in_transform()
        or (
            torch.is_grad_enabled()
            and any([a.requires_grad for a in arguments if isinstance(a, Tensor)])
        )
    ):
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def namespaces_with(name: str) -> list[str]:
    """The namespaces in which an operator of this name exists in this process."""
    return [
        namespace for namespace in (NATIVE, TRITON) if hasattr(getattr(torch.ops, namespace), name)
    ]


def _library(namespace: str) -> torch.library.Library:
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "IMPL")
    return _libraries[namespace]


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    float32_arguments: Sequence[int] = (),
    shared_arguments: Sequence[str] | None = None,
) -> None:
    """Register everything but the kernels of ``name`` and ``name_backward``.

    Args:
        name: operator name without namespace.
        fake: output metadata of the forward pass, from tensors without data.
        fake_backward: the same for the backward pass.
        setup_context: ``(ctx, inputs, output)``, saves what the backward pass needs.
        backward: ``(call, ctx, *grads)``, where ``call`` is the backward operator of the
            namespace that ran forward; returns one gradient per forward argument.
        float32_arguments: positions of the tensors that autocast lifts to float32 (coordinates;
            features keep the type they come in).
        shared_arguments: names of the tensors without a batch axis; all others, and every result
            of the forward pass, start with one, so that ``vmap`` can merge its axis with it. None
            where that does not hold: ``vmap`` then calls the operator once per mapped sample.
    """
    for namespace in namespaces_with(name):
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, fake)
        torch.library.register_fake(f"{qualified}_backward", fake_backward)
        call = getattr(getattr(torch.ops, namespace), f"{name}_backward").default
        library = _library(namespace)
        transforms.register_autograd(
            library, name, backward=_bind(backward, call), setup_context=setup_context
        )
        transforms.register_autograd(
            library,
            f"{name}_backward",
            backward=_refuse_double_backward(name),
            setup_context=_save_nothing,
        )
        transforms.register_vmap(namespace, name, shared_arguments)
        if float32_arguments:
            _register_autocast(namespace, name, frozenset(float32_arguments))


def register_without_gradient(name: str, *, fake: Callable[..., Any]) -> None:
    """Register everything but the kernels of an operator that has no derivative.

    Args:
        name: operator name without namespace.
        fake: output metadata, from tensors without data.
    """
    for namespace in namespaces_with(name):
        torch.library.register_fake(f"{namespace}::{name}", fake)
        transforms.register_vmap_one_by_one(namespace, name)


def _bind(backward: Callable[..., Any], call: Any) -> Callable[..., Any]:
    def bound(ctx: Any, *grads: Any) -> Any:
        return backward(call, ctx, *grads)

    return bound


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """The backward pass of a backward pass only refuses, so it needs nothing."""


def _refuse_double_backward(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{name}: the fused backward pass cannot be differentiated again; "
            f"call it with implementation='reference', or under use_kernels('reference')"
        )

    return refuse


def _register_autocast(namespace: str, name: str, positions: frozenset[int]) -> None:
    library = _library(namespace)
    target = getattr(getattr(torch.ops, namespace), name).default

    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def lifted(*arguments: Any, _device_type: str = device_type) -> Any:
            with torch.autocast(_device_type, enabled=False):
                return target(
                    *(
                        argument.float()
                        if position in positions and argument.dtype != torch.float64
                        else argument
                        for position, argument in enumerate(arguments)
                    )
                )

        library.impl(name, lifted, key)

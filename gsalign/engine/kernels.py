"""Putting a configuration's choice of kernels in force."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from gsalign_kernels import use_kernels


def chosen_kernels(choice: str) -> AbstractContextManager[None]:
    """A context in which the fused operators run as ``choice`` says.

    ``"auto"`` changes nothing, so that the environment variable ``GSALIGN_KERNELS`` still counts.

    Args:
        choice: ``"auto"``, ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``.

    Raises:
        KernelUnavailableError: on entering, when it cannot run on this machine; says what can.
    """
    return nullcontext() if choice == "auto" else use_kernels(choice)

"""How tests are dealt out to processes that run side by side."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A file's tests stay together, for they share what they compile.

    So do all that run kernels on host threads: two of those at a time take turns at spinning.
    """
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            folder = item.path.parent.name
            group = folder if folder == "native" else f"{folder}/{item.path.name}"
            item.add_marker(pytest.mark.xdist_group(group))

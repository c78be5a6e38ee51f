"""Deterministic training: what is switched, that it is switched back, and what it is for."""

from __future__ import annotations

import os

import pytest
import torch

from gsalign.engine.determinism import WORKSPACE, deterministic


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.delenv(WORKSPACE[0], raising=False)


def test_algorithms_are_deterministic_inside_and_as_before_behind():
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_has_no_deterministic_algorithm_is_refused():
    values = torch.rand(3)
    with deterministic(True), pytest.raises(RuntimeError, match="deterministic"):
        values.put_(torch.tensor([0]), torch.rand(1))
    values.put_(torch.tensor([0]), torch.rand(1))


def test_a_workspace_that_is_set_stays(monkeypatch):
    monkeypatch.setenv(WORKSPACE[0], ":16:8")
    with deterministic(True):
        assert os.environ[WORKSPACE[0]] == ":16:8"


def test_nothing_changes_where_it_is_not_wanted():
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
        assert WORKSPACE[0] not in os.environ

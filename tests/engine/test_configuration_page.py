"""docs/configuration.md lists every key with its default, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from gsalign.config import Config, known_keys
from gsalign.evaluation import PROTOCOLS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([a-z_.]+)` \| `([^`]*)` \| (.+) \|$", PAGE, re.MULTILINE)


def default_of(key: str) -> object:
    value: object = Config().model_dump(mode="json")
    for part in key.split("."):
        assert isinstance(value, dict)
        value = value[part]
    return value


def test_every_key_has_one_row():
    assert sorted(key for key, _, _ in ROWS) == sorted(known_keys())


def test_every_default_is_the_real_one():
    wrong = {
        key: (told, default_of(key))
        for key, told, _ in ROWS
        if yaml.safe_load(told) != default_of(key)
    }
    assert not wrong


def test_every_file_and_protocol_is_named():
    names = [path.name for path in (ROOT / "configs").glob("*.yaml")]
    assert names
    missing = [name for name in (*names, *PROTOCOLS) if f"`{name}`" not in PAGE]
    assert not missing

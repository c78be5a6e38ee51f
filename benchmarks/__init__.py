"""Measurements of every operator and of the whole model, beside the alternatives.

``python -m benchmarks`` measures, ``python -m benchmarks.plot`` draws; docs/benchmarks.md says how
a figure comes about.
"""

from __future__ import annotations

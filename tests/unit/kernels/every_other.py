"""A pytest plugin: of the tests collected, those that are left for one of two processes, by ``EVERY_OTHER`` 0 or 1."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Neighbours are variants of one test and take about as long, so both processes end at about the same time."""
    items[:] = items[int(os.environ["EVERY_OTHER"]) :: 2]

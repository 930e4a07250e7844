"""Shared by all layers of tests."""

from __future__ import annotations

import hypothesis

# Shared machines are slow at times: a deadline would fail tests for that. Derandomised: CI fails the same way twice.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("project")

"""The periodic log line, of counts kept here or on a device."""

from __future__ import annotations

import logging

import pytest

from vllm_rc_backend.observability.meter import Counts, Meter


def test_a_log_line_says_what_came_since_the_last(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm.rc_topk")
    device = Counts(sparse_rows=4, tokens_held=1000, tokens_read=250)
    meter = Meter(interval=1e-9, source=lambda: device.copy())
    meter.log()
    assert "read 250 of 1000 tokens (25.0 %)" in caplog.text
    caplog.clear()
    meter.log()
    assert not caplog.text, "nothing was decoded since"
    device.sparse_rows, device.tokens_held, device.tokens_read = 5, 1100, 300
    meter.log()
    assert "read 50 of 100 tokens (50.0 %)" in caplog.text
    assert "1 sparse and 0 dense" in caplog.text


def test_no_interval_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm.rc_topk")
    Meter(interval=0, counts=Counts(sparse_rows=1, tokens_held=10)).log()
    assert not caplog.text


def test_totals_are_a_snapshot() -> None:
    meter = Meter(counts=Counts(sparse_rows=1))
    totals = meter.totals()
    meter.counts.sparse_rows = 2
    assert totals.sparse_rows == 1
    meter.source = lambda: Counts(sparse_rows=7)
    assert meter.totals().sparse_rows == 7

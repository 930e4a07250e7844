"""The regions of a sequence."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_rc_backend.kernels.geometry import Geometry

geometries = st.builds(
    lambda page, per_block, sink_pages, tail, budget, threshold: Geometry(
        page, page * per_block, page * sink_pages, tail, budget, threshold
    ),
    page=st.sampled_from([4, 16, 64]),
    per_block=st.sampled_from([1, 8]),
    sink_pages=st.integers(0, 3),
    tail=st.integers(1, 200),
    budget=st.one_of(st.integers(1, 5000), st.floats(0.001, 0.999)),
    threshold=st.sampled_from([0, 700]),
)
lengths = st.integers(1, 20_000)


@given(geometries, lengths)
def test_regions_cover_the_sequence(g: Geometry, seq_len: int) -> None:
    mid_end = g.mid_end(seq_len)
    assert g.sink_pages <= mid_end
    if mid_end > g.sink_pages:
        tail = seq_len - mid_end * g.page_size
        assert g.tail_tokens <= tail < g.tail_tokens + g.page_size
        assert mid_end <= seq_len // g.page_size, "the unfinished page is tail"


@given(geometries, lengths)
def test_mid_region_grows_by_at_most_a_page_a_token(g: Geometry, seq_len: int) -> None:
    assert g.mid_end(seq_len + 1) - g.mid_end(seq_len) in (0, 1)


@given(geometries, lengths)
def test_budget_is_kept_where_it_can_be(g: Geometry, seq_len: int) -> None:
    assume(g.is_sparse(seq_len))
    budget = g.budget if g.budget >= 1 else g.budget * seq_len
    least = g.sink_tokens + g.tail_tokens + 2 * g.page_size - 1
    read = g.tokens_read(seq_len)
    assert read <= max(budget, least)
    assert read < seq_len
    # What is left over would not pay for one more page.
    assert read + g.page_size > min(budget, seq_len)


@given(geometries, lengths)
def test_dense_exactly_if_nothing_is_left_unread(g: Geometry, seq_len: int) -> None:
    mid_pages = g.mid_end(seq_len) - g.sink_pages
    everything = g.retrieved_pages(seq_len) == mid_pages
    assert 0 <= g.retrieved_pages(seq_len) <= mid_pages
    assert g.is_sparse(seq_len) == (not everything and seq_len > g.dense_threshold)


def test_a_sequence_that_fits_the_budget_is_dense() -> None:
    g = Geometry(page_size=16, block_size=128, sink_tokens=16, tail_tokens=64, budget=2048, dense_threshold=0)
    assert not any(g.is_sparse(n) for n in range(1, 2049))
    assert all(g.is_sparse(n) for n in range(2080, 4096))


def test_threshold_keeps_sequences_dense() -> None:
    g = Geometry(
        page_size=16, block_size=16, sink_tokens=16, tail_tokens=64, budget=128, dense_threshold=1000
    )
    assert not g.is_sparse(1000)
    assert g.is_sparse(1001)
    assert g.tokens_read(1000) == 1000


@given(
    budget=st.one_of(st.integers(64, 400), st.floats(0.01, 0.9)),
    tail=st.integers(1, 70),
    sink=st.sampled_from([0, 16, 48]),
    threshold=st.integers(0, 500),
    seq_len=st.integers(1, 1000),
)
def test_no_row_reads_more_pages_than_its_list_has_room_for(
    budget: float, tail: int, sink: int, threshold: int, seq_len: int
) -> None:
    pytest.importorskip("triton")
    from vllm_rc_backend.host_kv.page_cache import most_pages_read

    shape = Geometry(16, 16, sink, tail, budget, threshold)
    read = -(-shape.tokens_read(seq_len) // 16)
    assert read <= most_pages_read(shape, 1000)

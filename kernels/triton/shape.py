"""What a kernel is compiled for: one hashable object, passed as a single ``tl.constexpr``."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_rc_backend.kernels.geometry import Geometry


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Shape:
    """One attention layer on one rank.

    Attributes:
        geometry: the regions of a sequence.
        heads: KV heads.
        group: query heads of a KV head.
        head_size: elements of a key.
        query_map: what the second statistic is multiplied with, ``abs`` (box), ``square`` (mean_var), or ``none``
            for a policy with one vector; ``runs`` for the policy of that name, whose score is of another form.
        spread_weight: weight of that second term.
        group_rule: ``max``, ``mean``, ``sum`` or ``share`` over the query heads of a KV head.
        completion: ``linear``, ``paged``, ``features`` or ``none``.
        vectors: statistics kept per page.
        features: of the completion ``features``, D_phi; otherwise 0.
        damping: of the completion, the most there can be.
    """

    geometry: Geometry
    heads: int
    group: int
    head_size: int
    query_map: str
    spread_weight: float
    group_rule: str
    completion: str
    vectors: int
    features: int
    damping: float

    @property
    def block_d(self) -> int:
        """Head size padded to a power of two."""
        return next_power_of_2(self.head_size)

    @property
    def runs_in_row(self) -> int:
        """Neighbouring runs that make one row of the matrix product that scores pages by ``runs``."""
        return max(1, 8 // next_power_of_2(self.group))

    @property
    def columns(self) -> int:
        """Columns of that product: the query heads for each run of a row."""
        return self.runs_in_row * self.block_n

    @property
    def block_q(self) -> int:
        """Bytes of a vector at 2 bits, padded so that a row is what an int8 matrix instruction takes."""
        return max(next_power_of_2(self.head_size // 4), 32 // self.runs_in_row)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, padding included."""
        return self.runs_in_row * self.block_q

    @property
    def rotated(self) -> int:
        """The largest power of two that divides the head size: elements that a rotation mixes."""
        return self.head_size & -self.head_size

    @property
    def block_n(self) -> int:
        """Query heads of a KV head, padded to a power of two, and for a plain product to what an instruction takes."""
        return (
            next_power_of_2(self.group) if self.query_map == "runs" else max(8, next_power_of_2(self.group))
        )

    @property
    def block_m(self) -> int:
        """The same with room for the row of ones that sums the retrieved values."""
        return max(16, next_power_of_2(self.group + 1))

    @property
    def merge_rows(self) -> int:
        """Rows of a partial result: the query heads and the row of ones."""
        return next_power_of_2(self.group + 1)

    @property
    def by_share(self) -> bool:
        """Whether a page's key needs the scores of all pages: it is made when pages are chosen, not when scored."""
        return self.group_rule == "share"

    @property
    def key_width(self) -> int:
        """Numbers that a page's key is made of: itself, or the score of every query head."""
        return self.group if self.by_share else 1

    @property
    def keeps_scores(self) -> bool:
        """Whether the score of every query head is kept, and what a head's pages weigh together."""
        return self.completion == "paged" or self.by_share

    @property
    def first_order(self) -> bool:
        """Whether the completion is ``linear`` or has its state and value: C, K1, V1."""
        return self.completion in ("linear", "paged")

    @property
    def state_rows(self) -> int:
        """Rows of a summary: C, K1, V1; of ``features`` S, and u in as many as it takes."""
        return self.features + -(-self.features // self.head_size) if self.features else self.head_size + 2

    @property
    def block_f(self) -> int:
        """Features padded to a power of two that a matrix instruction takes."""
        return max(16, next_power_of_2(self.features))

    @property
    def sum_rows(self) -> int:
        """Rows of the matrix that is summed up of tokens: C's, or S's, padded."""
        return self.block_f if self.features else self.block_d

    @property
    def block_u(self) -> int:
        """Elements of u's rows, padded to a power of two."""
        return next_power_of_2(-(-self.features // self.head_size) * self.head_size)

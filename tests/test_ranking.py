"""The k lowest of many scores against NumPy's stable sort, also where scores are made anew at every look."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.functional import ranking
from lightning_compress.functional.computed import Computed
from lightning_compress.functional.finite import nonfinite
from lightning_compress.functional.ranking import lowest


class Anew(Sequence[torch.Tensor]):
    """Copies of the scores; counts how often they are asked for."""

    def __init__(self, scores: list[torch.Tensor]) -> None:
        self.scores, self.looks = scores, 0

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, place: Any) -> Any:
        self.looks += 1
        return self.scores[place].clone()


VALUES = [-np.inf, -2.5, -1e-40, -0.0, 0.0, 1e-45, 1e-40, 1.0, 1 + 2**-23, 1.5, 3e38, np.inf]


@settings(max_examples=150)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.floats(0, 1),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_the_lowest_are_those_of_a_stable_sort(
    sizes: list[int], dtype: torch.dtype, share: float, seed: int, histogram: bool
) -> None:
    rng = np.random.default_rng(seed)
    scores = [
        torch.from_numpy(np.where(rng.random(n) < 0.5, rng.choice(VALUES, n), rng.normal(size=n))).to(dtype)
        for n in sizes
    ]
    k = round(share * sum(sizes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ranking, "_PIECE", 7 if histogram else 1 << 20
        )  # with 7 elements at a time, nothing is sorted
        cut = lowest(Anew(scores), k)
        kept = [cut.mask(i, s).numpy() for i, s in enumerate(scores)]
    flat = torch.cat([s.double() for s in scores]).numpy()
    expected = np.ones(flat.size, bool)
    expected[np.argsort(flat, kind="stable")[:k]] = False
    assert np.array_equal(np.concatenate(kept), expected)
    assert [int((~m).sum()) for m in kept] == list(cut.dropped) or k == 0


def test_scores_of_both_precisions_are_ranked_together() -> None:
    scores = [torch.tensor([0.1, 0.3]), torch.tensor([0.1, 0.2], dtype=torch.float64)]
    cut = lowest(scores, 2)  # 0.1 in float32 is a little more than in float64
    assert [cut.mask(i, s).tolist() for i, s in enumerate(scores)] == [[False, True], [False, True]]
    cut = lowest(scores, 1)
    assert [cut.mask(i, s).tolist() for i, s in enumerate(scores)] == [[True, True], [False, True]]


def test_large_rankings_read_the_scores_a_few_times() -> None:
    scores = Anew([torch.rand(400_000) for _ in range(5)])
    cut = lowest(scores, 1_234_567)
    assert sum(cut.dropped) == 1_234_567 and scores.looks <= 4 * 6
    flat = torch.cat(scores.scores)
    assert cut.threshold == float(flat.kthvalue(1_234_567).values)


def test_values_are_made_when_asked_for() -> None:
    made = []
    values = Computed("ab", lambda key: made.append(key) or key.upper())
    assert len(values) == 2 and made == [] and values["b"] == "B" and dict(values) == {"a": "A", "b": "B"}
    assert made == ["b", "a", "b"]
    with pytest.raises(KeyError):
        values["c"]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
def test_values_that_are_not_finite_are_counted(dtype: torch.dtype) -> None:
    values = torch.randn(3, 50, dtype=dtype if dtype.is_complex else torch.float32).to(dtype)
    assert nonfinite(values) == 0
    values[0, 3], values[2, 7] = float("nan"), float("inf")
    assert nonfinite(values) == 2 == int((~torch.isfinite(values)).sum())
    if dtype.is_complex:
        values[1, 1] = complex(0, float("nan"))
        assert nonfinite(values) == 3

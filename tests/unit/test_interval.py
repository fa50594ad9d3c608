"""Student's t, and the interval of a mean that it gives."""

from __future__ import annotations

import numpy as np
import pytest

from cml_dist.run.interval import half_width, t_quantile


@pytest.mark.parametrize(
    ("freedom", "published"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (99, 1.9842), (9999, 1.9602)],
)
def test_quantiles_are_those_of_the_tables(freedom, published):
    assert t_quantile(freedom) == pytest.approx(published, abs=5e-5)


def test_of_five_values_the_interval_holds_the_mean_19_times_in_20():
    """By 1.96 standard errors it would hold it in 88 % of cases."""
    values = np.random.default_rng(0).normal(size=(20_000, 5))
    held = [abs(row.mean()) < half_width(row.std(ddof=1), 5) for row in values]
    assert np.mean(held) == pytest.approx(0.95, abs=0.005)

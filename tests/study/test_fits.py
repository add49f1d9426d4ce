"""Power laws are found where they are, and doubted where the data do not bear them out."""

import doctest

import numpy as np
import pytest

from lion_st.study import bootstrap_fit, fit_power_law, fits

SIZES = np.array([1e6, 2e6, 5e6, 1e7, 3e7])


@pytest.mark.parametrize("exponent", [0.05, 0.3, 1.2, -0.4])
def test_a_known_exponent_is_found(exponent: float) -> None:
    law = fit_power_law(SIZES, (4e5 / SIZES) ** exponent)
    assert law.exponent == pytest.approx(exponent, rel=1e-6)
    assert law.coefficient == pytest.approx(4e5**exponent, rel=1e-6)
    assert law.r_squared == pytest.approx(1)
    np.testing.assert_allclose(law(SIZES), (4e5 / SIZES) ** exponent)


@pytest.mark.parametrize(("exponent", "floor"), [(0.5, 0.2), (0.8, 0.05), (0.3, 0.0)])
def test_a_known_floor_is_found_beside_the_exponent(exponent: float, floor: float) -> None:
    law = fit_power_law(SIZES, (4e5 / SIZES) ** exponent + floor, with_floor=True)
    assert law.exponent == pytest.approx(exponent, rel=0.03)
    assert law.floor == pytest.approx(floor, abs=0.01)


def noisy(exponent: float, spread: float, sizes=SIZES, seeds: int = 2) -> list[tuple[float, list[np.ndarray]]]:
    """Values of 300 queries whose mean follows a power law; a query is as hard for every size."""
    generator = np.random.default_rng(1)
    hardness = generator.normal(1, 0.3, size=300)
    return [
        (
            size,
            [np.stack([(1e6 / size) ** exponent * hardness + generator.normal(0, spread, 300) for _ in range(seeds)])],
        )
        for size in sizes
    ]


def test_the_band_of_a_law_holds_its_exponent() -> None:
    fit = bootstrap_fit(noisy(0.3, 0.05, sizes=SIZES[:3]), samples=300)
    assert fit.low < 0.3 < fit.high < 0.4
    assert fit.doubt == "" and fit.points == 3


def test_a_sample_has_the_same_queries_at_all_points_and_counts_each_test_set_as_much() -> None:
    fit = bootstrap_fit(noisy(0.3, 0.0, sizes=SIZES[:3]), samples=50)  # harder or easier queries move all points
    assert (fit.low, fit.high) == pytest.approx((0.3, 0.3))
    heights = (4e5 / SIZES[:4]) ** 0.5 + 0.2
    two = [(x, [np.full((1, 2), 0.5 * y), np.full((1, 8), 1.5 * y)]) for x, y in zip(SIZES, heights, strict=False)]
    law = bootstrap_fit(two, samples=5).law
    np.testing.assert_allclose(law(SIZES[:4]), heights, rtol=0.01)
    assert law.floor == pytest.approx(0.2, abs=0.01)  # of four points


def test_points_of_one_x_count_each_but_are_one_of_the_points_that_a_fit_needs() -> None:
    law = noisy(0.3, 0.0, sizes=SIZES[:3])
    above, below = ([(SIZES[1], [factor * law[1][1][0]])] for factor in (1.2, 1 / 1.2))
    both = bootstrap_fit([law[0], *above, law[2], *below], samples=10)
    assert both.law.exponent == pytest.approx(0.3, abs=0.01) and both.points == 3
    assert bootstrap_fit([*law[:2], *above]).doubt == "2 point(s), a fit needs 3"


def test_what_the_data_do_not_bear_out_is_said() -> None:
    flat = bootstrap_fit(noisy(0.0, 0.3), samples=300)
    assert "the exponent's band contains 0" in flat.doubt
    assert bootstrap_fit(noisy(0.3, 0.1, sizes=SIZES[:2])).doubt == "2 point(s), a fit needs 3"
    close = bootstrap_fit(noisy(0.3, 0.1, sizes=np.array([1e6, 1.1e6, 1.2e6])))
    assert close.doubt == "x spans a factor of 1.20 alone" and close.law is None
    perfect = [(size, [np.zeros((1, 5))]) for size in SIZES]
    assert "of which there is no logarithm" in bootstrap_fit(perfect).doubt
    jagged = [(size, [np.full((1, 5), value)]) for size, value in zip(SIZES, (1.0, 0.2, 0.9, 0.1, 0.8), strict=True)]
    assert "R²" in bootstrap_fit(jagged, samples=20).doubt


def test_values_that_are_not_positive_are_refused() -> None:
    with pytest.raises(ValueError, match="positive values"):
        fit_power_law(SIZES, np.array([1.0, 0.5, 0.0, 0.2, 0.1]))


def test_the_examples_of_the_modules_run() -> None:
    from lion_st.study import data, results

    assert [doctest.testmod(module).failed for module in (fits, data, results)] == [0, 0, 0]

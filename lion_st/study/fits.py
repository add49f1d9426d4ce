"""Power laws of quality against size or compute, with bands, and whether the data bear them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

LEAST_POINTS = 3  # through two points runs every power law
LEAST_POINTS_WITH_FLOOR = 4  # three parameters
LEAST_SPAN = 1.5  # of the largest x to the smallest
LEAST_R_SQUARED = 0.8
FLOORS = np.linspace(0, 0.995, 200)  # shares of the smallest value that a floor is looked for among
Values: TypeAlias = Sequence[np.ndarray]  # of one point: for each test set, [seeds, queries]


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient / x ** exponent + floor; a positive exponent is a y that falls.

    Fang et al. write (scale / x) ** exponent + floor, of which the coefficient is scale ** exponent.
    """

    exponent: float
    coefficient: float
    floor: float
    r_squared: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Values of the law."""
        return self.coefficient / np.asarray(x, dtype=float) ** self.exponent + self.floor


@dataclass(frozen=True)
class Fit:
    """A power law, the band of its exponent, and why it is not borne out by the data, if it is not.

    Attributes:
        law: None where nothing could be fitted.
        low, high: 95 % of the exponents of the bootstrap.
        points: Different x.
        doubt: "" for a law that the data support.
        curves: Laws of the bootstrap, for a band.
    """

    law: PowerLaw | None
    low: float
    high: float
    points: int
    doubt: str
    curves: tuple[PowerLaw, ...] = ()


def fit_power_law(x: np.ndarray, y: np.ndarray, with_floor: bool = False) -> PowerLaw:
    """Least squares in logarithms; a floor is the one of `FLOORS` that leaves the least error in y itself.

    Args:
        x: [P], positive.
        y: [P], positive.
        with_floor: Fit a floor too.

    Raises:
        ValueError: If a value is not positive.

    Example:
        >>> law = fit_power_law(np.array([1.0, 10.0, 100.0]), np.array([8.0, 4.0, 2.0]))
        >>> round(law.exponent, 4), law.floor
        (0.301, 0.0)
    """
    if not (np.all(x > 0) and np.all(y > 0)):
        raise ValueError("A power law is of positive values: give errors, not qualities, and leave out zeros.")
    (law,) = _fit(np.asarray(x, dtype=float), np.asarray(y, dtype=float)[None], with_floor)
    return law


def bootstrap_fit(points: Sequence[tuple[float, Values]], samples: int = 1000, seed: int = 0) -> Fit:
    """Fit a power law to the means of single queries' values, with a band over queries and seeds.

    A bootstrap sample draws the queries of each test set anew, the same ones for all points as all have answered the
    same, and the seeds of each point.

    Args:
        points: An x and its values; several may have one x, as backbones of the same size.
        samples: Of the bootstrap.
        seed: Of the bootstrap.

    References:
        Fang et al., Scaling Laws For Dense Retrieval, SIGIR 2024: https://arxiv.org/abs/2403.18684.
    """
    points = sorted(points, key=lambda point: point[0])
    xs = np.array([x for x, _ in points], dtype=float)
    different = len(set(xs))
    if different < LEAST_POINTS:
        return Fit(None, np.nan, np.nan, different, f"{different} point(s), a fit needs {LEAST_POINTS}")
    if xs[-1] < LEAST_SPAN * xs[0]:
        return Fit(None, np.nan, np.nan, different, f"x spans a factor of {xs[-1] / xs[0]:.2f} alone")
    means = np.array([np.mean([values.mean() for values in of_point]) for _, of_point in points])
    if not np.all(means > 0):
        return Fit(None, np.nan, np.nan, different, "a value is 0, of which there is no logarithm")
    with_floor = different >= LEAST_POINTS_WITH_FLOOR
    law = fit_power_law(xs, means, with_floor)
    drawn = _resampled([of_point for _, of_point in points], samples, np.random.default_rng(seed))
    curves = tuple(_fit(xs, drawn[(drawn > 0).all(axis=1)], with_floor))
    low, high = np.quantile([curve.exponent for curve in curves], [0.025, 0.975])
    doubts = []
    if low <= 0 <= high:
        doubts.append("the exponent's band contains 0")
    if law.r_squared < LEAST_R_SQUARED:
        doubts.append(f"R² is {law.r_squared:.2f}")
    return Fit(law, float(low), float(high), different, "; ".join(doubts), curves)


def _resampled(points: Sequence[Values], samples: int, generator: np.random.Generator) -> np.ndarray:
    """Means of bootstrap samples, [samples, P]."""
    found = np.zeros((samples, len(points)))
    for test in range(len(points[0])):
        queries = points[0][test].shape[1]
        chosen = generator.integers(queries, size=(samples, queries))
        for place, values in enumerate(points):
            seeds = len(values[test])
            weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=samples) / seeds  # [samples, seeds]
            per_seed = np.stack([row[chosen].mean(axis=1) for row in values[test]], axis=1)  # [samples, seeds]
            found[:, place] += (weights * per_seed).sum(axis=1) / len(points[0])
    return found


def _fit(x: np.ndarray, y: np.ndarray, with_floor: bool) -> list[PowerLaw]:
    """Laws of the rows of y [B, P]."""
    shares = FLOORS if with_floor else FLOORS[:1]
    floors = shares[:, None] * y.min(axis=1)  # [F, B]
    logs = np.log(y[None] - floors[..., None])  # [F, B, P]
    across = np.log(x) - np.log(x).mean()
    slope = (logs * across).sum(axis=-1) / (across**2).sum()  # [F, B]
    level = logs.mean(axis=-1)
    fitted = np.exp(level[..., None] + slope[..., None] * across) + floors[..., None]
    errors = ((fitted - y) ** 2).sum(axis=-1)
    laws = []
    for row, best in enumerate(errors.argmin(axis=0)):
        spread = ((y[row] - y[row].mean()) ** 2).sum()
        exponent = -float(slope[best, row])
        coefficient = float(np.exp(level[best, row] + exponent * np.log(x).mean()))
        r_squared = 1 - float(errors[best, row]) / float(spread) if spread else 0.0
        laws.append(PowerLaw(exponent, coefficient, float(floors[best, row]), r_squared))
    return laws

"""A logistic model with a weak ridge, fitted by Newton's method to many weightings of the same rows at once.

The model is logit P = x @ b. What is maximised is

    sum over rows of w * (y * log P + (1 - y) * log(1 - P)) - 1/2 * sum over columns of penalty * b^2

for a row's weight w and an outcome y in [0, 1] (0.5 is half a win and half a loss). A bootstrap is many rows of
weights: how often each row was drawn. `stats.fit_logistic` fits one weighting without a penalty. Pure: values in,
values out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from almost_eval.stats import Floats

_BLOCK = 4_000_000
"""Probabilities that are held at once (32 MB)."""
_STEPS = 60
_HALVINGS = 40


def fit_ridge(x: Floats, y: Floats, weights: NDArray[np.float64] | NDArray[np.int64], penalty: Floats) -> Floats:
    """The coefficients of each weighting; NaN where it has no maximum or none was reached.

    There is a maximum wherever a column without a penalty is the intercept alone, and the weighted outcomes are neither
    all 0 nor all 1.

    Args:
        x: (n, k) columns, the intercept among them.
        y: (n,) outcomes, 0 to 1.
        weights: (R, n) not negative.
        penalty: (k,) of each coefficient's square.

    Returns:
        (R, k).
    """
    blocks = []
    rows = max(1, _BLOCK // max(1, len(x)))
    for start in range(0, len(weights), rows):
        blocks.append(_fit_block(x, y, np.asarray(weights[start : start + rows], dtype=np.float64), penalty))
    return np.concatenate(blocks)


def _fit_block(x: Floats, y: Floats, weights: Floats, penalty: Floats) -> Floats:
    n, k = x.shape
    products = (x[:, :, None] * x[:, None, :]).reshape(n, k * k)
    b = np.zeros((len(weights), k))
    won, total = weights @ y, weights.sum(axis=1)
    decided = (won > 0) & (won < total)
    b[~decided] = np.nan
    active = np.flatnonzero(decided)
    value = _objective(x, y, weights[active], penalty, b[active])
    for _ in range(_STEPS):
        if not len(active):
            break
        w, mine = weights[active], b[active]
        p = _probability(mine @ x.T)  # (R, n)
        gradient = (w * (y - p)) @ x - penalty * mine  # (R, k)
        hessian = ((w * p * (1 - p)) @ products).reshape(-1, k, k) + np.diag(penalty + 1e-12)
        step = np.asarray(np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0], dtype=np.float64)
        # Half of the Newton decrement: what the objective may still gain.
        gain = 0.5 * np.einsum("rk,rk->r", gradient, step)
        moved, value = _line_search(x, y, w, penalty, mine, step, value)
        b[active] = moved
        left = gain > 1e-12 * total[active]
        active, value = active[left], value[left]
    b[active] = np.nan  # not there after so many steps
    return b


def _line_search(
    x: Floats, y: Floats, w: Floats, penalty: Floats, b: Floats, step: Floats, value: Floats
) -> tuple[Floats, Floats]:
    """Where each row goes, and the objective there: the whole step, or half of it as often as it takes not to lose."""
    length = np.ones(len(b))
    moved = b + step
    after = _objective(x, y, w, penalty, moved)
    for _ in range(_HALVINGS):
        worse = np.flatnonzero(after < value - 1e-9 * np.abs(value))
        if not len(worse):
            break
        length[worse] /= 2
        moved[worse] = b[worse] + length[worse, None] * step[worse]
        after[worse] = _objective(x, y, w[worse], penalty, moved[worse])
    return moved, after


def _objective(x: Floats, y: Floats, w: Floats, penalty: Floats, b: Floats) -> Floats:
    z = b @ x.T
    # y log P + (1 - y) log(1 - P) = y z - log(1 + exp z)
    likelihood = np.einsum("rn,rn->r", w, y * z - np.logaddexp(0.0, z))
    return likelihood - 0.5 * (penalty * b**2).sum(axis=1)


def _probability(z: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-np.clip(z, -500, 500)))


def mean_probability(coefficients: Floats, rows: Floats) -> Floats:
    """(R,) the mean of P over `rows` (m, k) for each row of coefficients (R, k)."""
    return _probability(coefficients @ rows.T).mean(axis=1)


def is_unbounded(x: Floats, y: Floats, row: Floats) -> bool:
    """Whether the likelihood without a penalty has no maximum at a finite row @ b, or the same at several.

    That is: there is a direction d with x @ d >= 0 for every win, <= 0 for every loss and = 0 for every outcome between
    them, along which row @ b changes: the likelihood never falls on the way (Albert and Anderson 1984). Found by two
    linear programs (Konis 2007).

    Args:
        x: (n, k) columns.
        y: (n,) outcomes, 0 to 1.
        row: (k,) what is estimated: a row of columns, or a unit vector for a coefficient.
    """
    from scipy.optimize import linprog

    between = (y > 0) & (y < 1)
    signed = x * np.where(y == 1, 1.0, -1.0)[:, None]
    upper, equal = -signed[~between], x[between]
    rows = {"A_ub": upper, "b_ub": np.zeros(len(upper))} if len(upper) else {}
    rows |= {"A_eq": equal, "b_eq": np.zeros(len(equal))} if len(equal) else {}
    return any(-linprog(sign * row, **rows, bounds=(-1, 1)).fun > 1e-7 for sign in (1.0, -1.0))

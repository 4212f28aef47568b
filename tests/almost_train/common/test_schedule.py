"""The learning rate of every trainer, against numbers by hand and against the logs."""

from __future__ import annotations

import pytest

from almost_train.common.schedule import learning_rate_factor


def test_learning_rate_rises_then_follows_the_schedule() -> None:
    # 10 updates, 2 of warm-up: 1/2, 2/2, then 8 from 0/8 on
    rates = {name: [learning_rate_factor(u, 10, 0.2, name) for u in range(10)] for name in ("linear", "cosine")}
    assert rates["linear"] == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert rates["cosine"][6] == pytest.approx(0.5)  # half way: (1 + cos(pi / 2)) / 2
    assert learning_rate_factor(9, 10, 0.2, "constant") == 1
    assert learning_rate_factor(0, 10, 0.0, "constant") == 1

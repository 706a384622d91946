"""The learning rate of every step as literal numbers."""

from typing import Any

import pytest
import torch

from depthmup.train.config import ScheduleConfig
from depthmup.train.schedule import schedule, set_learning_rate


def factors(num_steps: int = 10, **settings: Any) -> list[float]:
    config = ScheduleConfig(**{"warmup": 0.2, **settings})
    return [schedule(config, step, num_steps) for step in range(num_steps)]


# the cosine of 0, 22.5, 45, 67.5, ... 157.5 degrees, moved and halved to lie between 1 and 0
COSINE = [1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "constant"}, [1 / 2, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"name": "constant", "warmup": 0.0}, [1] * 10),
        ({"name": "constant", "warmup": 0.5}, [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 1, 1, 1, 1, 1]),
        ({"name": "cosine"}, [1 / 2, 1, *COSINE]),
        ({"name": "cosine", "warmup": 0.0, "num_steps": 8}, COSINE),
        ({"name": "wsd", "decay": 0.3}, [1 / 2, 1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3]),
        ({"name": "wsd", "decay": 0.5}, [1 / 2, 1, 1, 1, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]),
        ({"name": "wsd", "decay": 0.8}, [1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ({"name": "wsd", "decay": 0.01}, [1 / 2, 1, 1, 1, 1, 1, 1, 1, 1, 1]),  # less than a step is one
        # shares of 13 steps are rounded: 2.6 steps of warm-up are 3, 3.25 of decay are 3
        (
            {"name": "wsd", "decay": 0.25, "num_steps": 13},
            [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3],
        ),
    ],
)
def test_every_step_has_the_rate_that_the_schedules_name_promises(
    settings: dict[str, Any], expected: list[float]
) -> None:
    assert factors(**settings) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 99])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
def test_no_step_is_without_a_rate_or_above_the_peak_which_one_step_reaches(
    name: str, num_steps: int, warmup: float
) -> None:
    decay = {"decay": min(0.2, 1 - warmup)} if name == "wsd" else {}
    found = factors(num_steps, name=name, warmup=warmup, **decay)
    assert all(0 < factor <= 1 for factor in found)
    assert max(found) == 1


def test_each_group_gets_its_own_multiple_of_the_scheduled_rate() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [weight], "lr_mult": lr_mult} for weight, lr_mult in zip(weights, (1.0, 0.25), strict=True)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for factor in (0.5, 0.125):  # from the base rate each time, not from the last
        set_learning_rate(optimizer, 0.1, factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.025 * factor])

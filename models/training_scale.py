"""The rules for batch and training length as data: what they make of the base's hyperparameters, for all roles alike.

m_B and m_D are the global batch and the samples of a run over the base's. `TRAINING_TABLE` has a row for each
optimizer; its exponents of the learning rate are disputed, and a parameterization may state others.
"""

from dataclasses import dataclass

from depthmup.models.parameterization import Parameterization


@dataclass(frozen=True)
class TrainingRow:
    """One optimizer's exponents of (m_B, m_D): global batch and samples over the base's. They hold for every role."""

    lr: tuple[float, float]
    eps: tuple[float, float] = (0.0, 0.0)  # of AdamW, and of the AdamW beside Muon
    averaging: tuple[float, float] = (0.0, 0.0)  # of 1 - beta, both betas of the same


# Decay has no cell: the share of a weight that a step takes off goes as m_B / m_D under every optimizer and every
# exponent, so that tau_EMA = 1 / (lr * decay * steps) stays what it was (2405.13698, 2505.13738).
TRAINING_TABLE: dict[str, TrainingRow] = {
    # Complete(d)P (2512.22382): the limit of small steps as a stochastic differential equation, over the whole run
    "adamw": TrainingRow(lr=(0.5, -0.5), eps=(-0.5, 0.5), averaging=(1.0, -1.0)),
    # the linear rule (1706.02677); 1/2 is tried too (1404.5997). Of samples it says nothing
    "sgd": TrainingRow(lr=(1.0, 0.0)),
    # the size of its step does not see the gradient's, as AdamW's; of samples nothing is known
    "muon": TrainingRow(lr=(0.5, 0.0), eps=(-0.5, 0.0), averaging=(1.0, 0.0)),
}


def combine_powers(exponents: tuple[float, float], batch_ratio: float, samples_ratio: float) -> float:
    """m_B^p * m_D^q"""
    return batch_ratio ** exponents[0] * samples_ratio ** exponents[1]


@dataclass(frozen=True)
class TrainingFactors:
    """What the batch and the samples of a run make of its base values, for all roles alike."""

    lr: float
    eps: float
    decay: float  # of the share of a weight that a step takes off


def list_lr_exponents(parameterization: Parameterization, optimizer: str) -> tuple[float, float]:
    """Of (m_B, m_D): the optimizer's own unless the parameterization states others."""
    batch, samples = TRAINING_TABLE[optimizer].lr
    p = parameterization
    return batch if p.batch_lr is None else p.batch_lr, samples if p.samples_lr is None else p.samples_lr


def compute_training_factors(
    parameterization: Parameterization, optimizer: str, batch_ratio: float, samples_ratio: float
) -> TrainingFactors:
    """The factors of TRAINING_TABLE at these ratios, the disputed exponents resolved."""
    ratios = batch_ratio, samples_ratio
    return TrainingFactors(
        lr=combine_powers(list_lr_exponents(parameterization, optimizer), *ratios),
        eps=combine_powers(TRAINING_TABLE[optimizer].eps, *ratios),
        decay=batch_ratio / samples_ratio,
    )

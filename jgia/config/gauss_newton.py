"""Options of the attack that climbs the posterior density of the client's images."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from jgia import _checks

ImagePrior = Literal["auto", "gaussian", "isotropic", "low_rank"]
StepSolver = Literal["auto", "dense", "cg"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussNewtonOptions:
    """What changes the answer of `gauss_newton`."""

    image_prior: ImagePrior = "auto"
    """What the attacker expects of an image, from the public ones: their mean and covariance
    (`gaussian`), their mean variance alone (`isotropic`), leading principal components and one
    variance for the rest (`low_rank`); `auto` takes `gaussian` for up to 3,072 pixel values."""

    image_prior_rank: int = 128
    """Components of a low-rank prior; fewer where there are not enough public images."""

    image_prior_shrinkage: float = 1e-3
    """Share of the identity in a Gaussian prior's covariance."""

    assumed_noise: float | None = None
    """Standard deviation of the noise on every shared entry that the attacker assumes; when left
    out, what the threat model declares, and at least what rounding leaves."""

    newton_steps: int = 60
    """Steps in all, of each start."""

    newton_starts: int = 1
    """Starts at most: no further one is tried once the noise explains what is left over, and the
    image of the largest posterior density is returned. The first is the prior's mean, others are
    drawn from the prior; for several images all of them are drawn."""

    newton_tolerance: float = 1e-3
    """Stop once the next step is shorter than this, in posterior standard deviations (root mean
    square over directions)."""

    newton_solver: StepSolver = "auto"
    """How a step is solved: `dense` (conjugate gradients preconditioned by a Gram matrix, which is
    made anew where it no longer helps), `cg` (without one), `auto` (`dense` for up to 4,096
    unknowns)."""

    noise_stages: bool = True
    """Begin as if there were more noise, as much as explains what the start leaves over, and take
    it away step by step."""

    def __post_init__(self) -> None:
        _checks.one_of(get_args(ImagePrior), image_prior=self.image_prior)
        _checks.one_of(get_args(StepSolver), newton_solver=self.newton_solver)
        _checks.at_least(
            1,
            image_prior_rank=self.image_prior_rank,
            newton_steps=self.newton_steps,
            newton_starts=self.newton_starts,
        )
        _checks.fraction(image_prior_shrinkage=self.image_prior_shrinkage)
        _checks.positive(newton_tolerance=self.newton_tolerance)
        if self.assumed_noise is not None:
            _checks.positive(assumed_noise=self.assumed_noise)

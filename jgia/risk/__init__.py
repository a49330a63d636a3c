"""How much can leak, without attacking: InvLoss, InvRE, and what they are made of."""

from jgia.risk.bounds import InvLossBracket, invloss_bracket, lower_bound, prior_draws, upper_bound
from jgia.risk.diagnostics import TRUSTED_RATIO, Diagnostics, diagnose
from jgia.risk.estimate import SUCCESS_PSNR, RiskEstimate, RiskSettings, estimate
from jgia.risk.invloss import (
    Form,
    flat_spectrum_bound,
    invloss,
    predicted_psnr,
    recoverable_fraction,
)
from jgia.risk.invre import RiskError, RiskReport, invre
from jgia.risk.jacobian import Sizes, gram, jacobian, push, sizes, triangular
from jgia.risk.krylov import (
    TopSpectrum,
    TraceBracket,
    invloss_bracket_by_quadrature,
    spectral_norm,
    top_spectrum,
    whitened_matvec,
)
from jgia.risk.posterior import (
    Posterior,
    posterior_from_gram,
    posterior_from_triangular,
    success_rates,
    without_nuisance,
    without_nuisance_triangular,
)
from jgia.risk.prior import Prior
from jgia.risk.release import EmbeddingRelease, Release, UpdateRelease, function_of_image
from jgia.risk.resolvent import (
    differentiable_invloss,
    invloss_of_gram,
    invloss_of_jacobian,
)
from jgia.risk.shaping import (
    covariance_factor,
    expected_error,
    noise_energy,
    shaped_covariance,
    water_filling,
    water_level,
)
from jgia.risk.spectrum import Choice, Route, Spectrum, choose_route, spectrum, spectrum_of_gram
from jgia.risk.structured import structured_gram, structured_grams
from jgia.risk.weighted_shaping import OptimalNoise, geometric_mean, optimal_noise

__all__ = [
    "SUCCESS_PSNR",
    "TRUSTED_RATIO",
    "Choice",
    "Diagnostics",
    "EmbeddingRelease",
    "Form",
    "InvLossBracket",
    "OptimalNoise",
    "Posterior",
    "Prior",
    "Release",
    "RiskError",
    "RiskEstimate",
    "RiskReport",
    "RiskSettings",
    "Route",
    "Sizes",
    "Spectrum",
    "TopSpectrum",
    "TraceBracket",
    "UpdateRelease",
    "choose_route",
    "covariance_factor",
    "diagnose",
    "differentiable_invloss",
    "estimate",
    "expected_error",
    "flat_spectrum_bound",
    "function_of_image",
    "geometric_mean",
    "gram",
    "invloss",
    "invloss_bracket",
    "invloss_bracket_by_quadrature",
    "invloss_of_gram",
    "invloss_of_jacobian",
    "invre",
    "jacobian",
    "lower_bound",
    "noise_energy",
    "optimal_noise",
    "posterior_from_gram",
    "posterior_from_triangular",
    "predicted_psnr",
    "prior_draws",
    "push",
    "recoverable_fraction",
    "shaped_covariance",
    "sizes",
    "spectral_norm",
    "spectrum",
    "spectrum_of_gram",
    "structured_gram",
    "structured_grams",
    "success_rates",
    "top_spectrum",
    "triangular",
    "upper_bound",
    "water_filling",
    "water_level",
    "whitened_matvec",
    "without_nuisance",
    "without_nuisance_triangular",
]

"""Scoring against the truth: per-image metrics, matching, rates and baselines.

Only the scorer imports this package; an attack never does, and a test holds it to that.
"""

from jgia.metrics.baselines import baseline_scores as baseline_scores
from jgia.metrics.image import PSNR_CAP_DB as PSNR_CAP_DB
from jgia.metrics.image import capped_mean_psnr as capped_mean_psnr
from jgia.metrics.image import mse as mse
from jgia.metrics.image import psnr as psnr
from jgia.metrics.image import psnr_of_mean_mse as psnr_of_mean_mse
from jgia.metrics.image import ssim as ssim
from jgia.metrics.lpips import lpips as lpips
from jgia.metrics.matching import PSNR_CEILING_DB as PSNR_CEILING_DB
from jgia.metrics.matching import Matching as Matching
from jgia.metrics.matching import match as match
from jgia.metrics.pairwise import pairwise_mse as pairwise_mse
from jgia.metrics.rates import SUCCESS_THRESHOLDS_DB as SUCCESS_THRESHOLDS_DB
from jgia.metrics.rates import Rate as Rate
from jgia.metrics.rates import success_rate as success_rate
from jgia.metrics.rates import wilson_interval as wilson_interval
from jgia.metrics.score import score as score

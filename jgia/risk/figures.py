"""Pictures of a risk estimate: what leaks where, and through which layer."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 8
_COLORS = "viridis"


class RiskPictures(NamedTuple):
    """What is drawn, as NumPy arrays with a leading axis of images.

    Attributes:
      images: (N, H, W, C) in [0, 1].
      pixel_errors: (N, H, W, C) expected squared errors.
      risk: (N,) scores.
      sigma: (N, k) whitened singular values, or ``None``.
      layers: names.
      layer_risk: (N, layers).
    """

    images: np.ndarray
    pixel_errors: np.ndarray
    risk: np.ndarray
    sigma: np.ndarray | None
    layers: tuple[str, ...]
    layer_risk: np.ndarray


def risk_figures(pictures: RiskPictures) -> dict[str, bytes]:
    """PNG files by name: ``pixels.png``, and ``spectrum.png`` and ``layers.png`` where there are.

    ``pixels.png`` shows the first images over the root of the expected squared error of each of
    their pixels: dark pixels leak.
    """
    files = {"pixels.png": _png(_pixels(pictures))}
    if pictures.sigma is not None:
        files["spectrum.png"] = _png(_spectrum(pictures.sigma, pictures.risk))
    if pictures.layers:
        files["layers.png"] = _png(_layers(pictures))
    return files


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()


def _pixels(pictures: RiskPictures) -> Figure:
    count = min(_SHOWN, len(pictures.images))
    figure = _figure(1.4 * count + 0.8, 3.2)
    axes = figure.subplots(2, count, squeeze=False)
    errors = np.sqrt(pictures.pixel_errors.mean(-1))
    top = float(errors[:count].max()) or 1.0
    for index in range(count):
        image = np.clip(pictures.images[index], 0, 1)
        if image.shape[-1] == 1:
            axes[0, index].imshow(image[..., 0], cmap="gray", vmin=0, vmax=1)
        else:
            axes[0, index].imshow(image)
        axes[0, index].set_title(f"risk {pictures.risk[index]:.3f}", fontsize=9)
        axes[1, index].imshow(errors[index], cmap=_COLORS, vmin=0, vmax=top)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(axes[1, 0].images[0], ax=axes[1].tolist(), label="expected error", shrink=0.9)
    return figure


def _spectrum(sigma: np.ndarray, risk: np.ndarray) -> Figure:
    figure = _figure(6.0, 3.6)
    axis = figure.subplots()
    tiny = np.finfo("float32").tiny
    for index in np.argsort(risk):
        values = np.maximum(sigma[index], tiny)
        axis.loglog(np.arange(1, len(values) + 1), values, lw=0.8, alpha=0.8)
    axis.axhline(1, color="black", lw=0.8, ls="--")
    axis.set_ylim(max(sigma.min(), sigma.max() * 1e-9, tiny) / 2, sigma.max() * 2)
    axis.set_xlabel("direction")
    axis.set_ylabel("signal over noise")
    axis.set_title("singular values; below the dashed line noise hides a direction", fontsize=9)
    return figure


def _layers(pictures: RiskPictures) -> Figure:
    count = len(pictures.layers)
    figure = _figure(6.0, 0.9 + 0.32 * count)
    axis = figure.subplots()
    risk = pictures.layer_risk
    places = np.arange(count)[::-1]
    axis.barh(places, risk.mean(0), color="#4878a8", label="mean")
    axis.plot(risk.max(0), places, "k|", ms=10, label="worst")
    axis.set_yticks(places, pictures.layers)
    axis.set_xlim(0, 1)
    axis.set_xlabel("risk of the layer alone")
    axis.legend(fontsize=8)
    return figure

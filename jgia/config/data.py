"""Where images come from."""

from __future__ import annotations

import dataclasses

from jgia import _checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from, and which of them are the client's."""

    data: str = "sample"
    """`sample`, `faces[:STYLE][:NUMBER]` (drawn; styles `photo`, `cartoon`, `art`),
    `tfds:NAME[:split]`, `npz:PATH` or `folder:PATH`."""

    image_size: int | None = None
    """Side in pixels to resize to (`sample` has 32 and 64, and resizes to less; `faces` are
    drawn in 16 to 64); as they are when left out."""

    limit: int | None = None
    """Load at most this many images."""

    download: bool = False
    """Let tensorflow-datasets download a data set that is not on disk."""

    data_dir: str | None = None
    """Folder of tensorflow-datasets' data sets."""

    calibration: str = "holdout"
    """Public images the server calibrates on: `holdout` (the same data set, never the client's
    images) or any data specification."""

    num_public: int = 1024
    """How many public images at most."""

    normalize: bool = True
    """Normalize inputs by the public images' channel means and deviations; raw pixels if not."""

    def __post_init__(self) -> None:
        _checks.at_least(1, num_public=self.num_public)
        for name in ("image_size", "limit"):
            if (value := getattr(self, name)) is not None:
                _checks.at_least(1, **{name: value})

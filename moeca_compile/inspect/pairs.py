"""A picture of uncached and cached samples side by side, with a map of their difference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moeca_compile.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PAIRS = 4


def pairs(uncached: np.ndarray[Any, Any], cached: np.ndarray[Any, Any]) -> Figure:
    """Draw one row for each of the first samples.

    Args:
        uncached, cached: [N, C, H, W] images, or [N, F, C, H, W] videos, whose middle frame is drawn. One channel is
            drawn gray, three as RGB; of other numbers of channels (latents) the mean is drawn.

    Raises:
        UserError: samples of another shape, or matplotlib is missing.
    """
    from moeca_compile.inspect.plots import _figure

    if uncached.ndim == 5:
        middle = uncached.shape[1] // 2
        uncached, cached = uncached[:, middle], cached[:, middle]
    if uncached.ndim != 4 or uncached.shape != cached.shape:
        raise UserError(
            f"a picture needs samples [N, C, H, W] or [N, F, C, H, W], and these are {list(uncached.shape)}"
        )
    count = min(len(uncached), MAX_PAIRS)
    low, high = float(uncached.min()), float(uncached.max())
    difference = np.abs(uncached[:count] - cached[:count]).mean(1)
    largest = float(difference.max())
    figure, first = _figure(7.5, 2.5 * count)
    first.remove()
    axes = figure.subplots(count, 3, squeeze=False)
    titles = ("uncached", "cached", f"difference, white is {largest:.2g}")
    for row in range(count):
        for column, images in enumerate((uncached, cached)):
            image = np.clip((images[row] - low) / max(high - low, 1e-12), 0.0, 1.0)
            shown = image.transpose(1, 2, 0) if len(image) == 3 else image.mean(0)
            axes[row][column].imshow(shown, cmap="gray", vmin=0.0, vmax=1.0)
        axes[row][2].imshow(difference[row], cmap="gray", vmin=0.0, vmax=largest or 1.0)
        for column, title in enumerate(titles):
            axes[row][column].set_axis_off()
            if row == 0:
                axes[row][column].set_title(title, fontsize=9)
    return figure

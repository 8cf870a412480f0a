"""Draw the letters and digits of a typeface, 32 x 32 grey, and say which typefaces are fit to learn from.

All glyphs of a face share one scale and one baseline, so that o, O and 0, or c and C, differ in size as in text.
"""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase  # the classes, in order
SIZE = 32
MARGIN = 2  # pixels left free on each side
OVERSAMPLE = 4  # drawn that much larger, then averaged
TRIAL = 200.0  # the font size, in pixels, at which a face is measured
MISSING = "\U0010ffff"  # no font has it: FreeType draws the glyph for missing characters

Images = NDArray[np.uint8]


def render(path: str | Path) -> Images:
    """Draw a face.

    Args:
        path: a font file that FreeType reads (.otf, .ttf).

    Returns:
        (62, 32, 32) uint8, one image for each of `CHARACTERS`; paper is 0, ink 255.
    """
    trial = ImageFont.truetype(path, TRIAL, layout_engine=ImageFont.Layout.BASIC)
    boxes = np.array([trial.getbbox(character, anchor="ls") for character in CHARACTERS])
    top, bottom = boxes[:, 1].min(), boxes[:, 3].max()
    width = (boxes[:, 2] - boxes[:, 0]).max()
    room = (SIZE - 2 * MARGIN) * OVERSAMPLE
    scale = room / max(bottom - top, width, 1)
    font = ImageFont.truetype(path, TRIAL * scale, layout_engine=ImageFont.Layout.BASIC)
    baseline = SIZE * OVERSAMPLE / 2 - scale * (top + bottom) / 2
    return np.stack([_draw(font, character, baseline) for character in CHARACTERS])


def _draw(font: ImageFont.FreeTypeFont, character: str, baseline: float) -> Images:
    """One glyph, centred from left to right; (32, 32) uint8."""
    left, _, right, _ = font.getbbox(character, anchor="ls")
    side = SIZE * OVERSAMPLE
    image = Image.new("L", (side, side))
    ImageDraw.Draw(image).text(((side - left - right) / 2, baseline), character, fill=255, font=font, anchor="ls")
    return np.asarray(image.reduce(OVERSAMPLE))


def fault(path: str | Path) -> str:
    """Say why a face is not fit to learn from, or "" where it is.

    The rule: every character has a glyph of its own and not the one for missing characters; no glyph is blank or a
    solid block; capitals are at least 10 pixels high; and at least 45 of the 62 images differ (small capitals may stand
    for lower case, but a face of symbols or boxes may not pass).
    """
    trial = ImageFont.truetype(path, TRIAL, layout_engine=ImageFont.Layout.BASIC)
    missing = bytes(trial.getmask(MISSING))
    if any(bytes(trial.getmask(character)) == missing for character in CHARACTERS):
        return "a character is missing"
    images = render(path)
    ink = images.mean(axis=(1, 2)) / 255
    if ink.min() < 0.008 or ink.max() > 0.6:
        return "a glyph is blank or a block"
    if len({image.tobytes() for image in images}) < 45:
        return "too few different glyphs"
    height = (images[CHARACTERS.index("H")].max(axis=1) > 127).sum()
    return "" if height >= 10 else "too small to read"

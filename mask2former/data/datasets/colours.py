"""Colours of classes that have none of their own."""

import colorsys


def class_colours(number: int) -> list[list[int]]:
    """Distinct fixed colours (RGB), so that a class looks the same in all drawings."""
    # Golden-ratio steps spread any number of hues evenly.
    hues = (i * 0.618034 % 1 for i in range(number))
    shades = ((0.85, 0.9), (0.55, 0.95), (0.9, 0.6))
    return [
        [round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, *shades[i % len(shades)])]
        for i, hue in enumerate(hues)
    ]

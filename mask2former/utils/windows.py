"""Windows of an image: rows and columns as slices, both with a start and a stop."""

Window = tuple[slice, slice]


def intersection(first: Window, second: Window) -> Window:
    """The pixels that two windows share; without any, one of its slices is empty."""
    rows, columns = (
        slice(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop)))
        for a, b in zip(first, second, strict=True)
    )
    return rows, columns


def shifted(window: Window, origin: Window) -> Window:
    """A window of the image as one of its part `origin`."""
    rows, columns = (
        slice(a.start - b.start, a.stop - b.start) for a, b in zip(window, origin, strict=True)
    )
    return rows, columns

"""Writes predictions for GeoTIFF images as files that lie where the image does.

    panoptic.tif    segment ids, uint32, 0 for none
    semantic.tif    labels, nodata where the type has a value to spare
    instances.geojson    polygons in the coordinate reference system of the image

Needs the package rasterio. H W pixels of the image.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..data.formats.windows import Georeference, import_rasterio, open_image
from ..utils.files import MissingPackageError, atomic_write, explained_write_errors, make_folder
from .result import Result

# Height and width of the tiles of a TIFF, and rows that are written at a time.
_BLOCK = 512


def save_georeferenced(result: Result, folder: str, image_file: str | None = None) -> list[str]:
    """Write the maps of a result as GeoTIFF and its instances as GeoJSON.

    Args:
        result: for an image with georeference.
        folder: made if missing.
        image_file: the image; default: that of the result.

    Returns:
        The files.

    Raises:
        MissingPackageError: rasterio is not installed.
        ValueError: the image has no georeference, or another size than the result.
        WriteError: a file cannot be written.
    """
    image_file = image_file or result.file_name
    if image_file is None:
        raise ValueError("the result does not name its image: give image_file")
    rasterio = import_rasterio()
    if rasterio is None:
        raise MissingPackageError("GeoTIFF needs the package rasterio: pip install rasterio")
    with open_image(image_file, None) as image:
        reference, size = image.georeference, image.size
    if reference is None:
        raise ValueError(f"{image_file} has no coordinate reference system; use Result.save")
    if size != result.image_size:
        raise ValueError(
            f"{image_file} has (height, width) {size}, but the result is of {result.image_size}"
        )
    make_folder(folder)
    files = []
    if result.panoptic is not None:
        ids = result.panoptic.segment_ids.view(np.uint32)
        files.append(_write_tiff(os.path.join(folder, "panoptic.tif"), ids, reference, 0))
    if result.semantic is not None:
        labels = result.semantic
        nodata = np.iinfo(labels.dtype).max
        unused = nodata if len(result.class_names) <= nodata else None
        files.append(_write_tiff(os.path.join(folder, "semantic.tif"), labels, reference, unused))
    if result.instances is not None:
        files.append(os.path.join(folder, "instances.geojson"))
        with atomic_write(files[-1]) as stream:
            json.dump(
                {
                    "type": "FeatureCollection",
                    # Not in the present standard, which is WGS 84 only, but what programs read.
                    "crs": {"type": "name", "properties": {"name": reference.crs.to_string()}},
                    "features": [*_features(result, reference)],
                },
                stream,
            )
    return files


def _write_tiff(file: str, values: np.ndarray, reference: Georeference, nodata: int | None) -> str:
    rasterio = import_rasterio()
    height, width = values.shape
    temporary = f"{file}.tmp"
    with explained_write_errors(file):
        with rasterio.open(
            temporary,
            "w",
            driver="GTiff",
            height=height,
            width=width,
            count=1,
            dtype=values.dtype.name,
            crs=reference.crs,
            transform=reference.transform,
            nodata=nodata,
            tiled=True,
            blockxsize=_BLOCK,
            blockysize=_BLOCK,
            compress="deflate",
            bigtiff="if_safer",
        ) as dataset:
            for top in range(0, height, _BLOCK):
                rows = slice(top, min(top + _BLOCK, height))
                window = rasterio.windows.Window.from_slices(rows, slice(0, width))
                dataset.write(values[rows], 1, window=window)
        os.replace(temporary, file)
    return file


def _features(result: Result, reference: Georeference) -> Iterator[dict[str, Any]]:
    """A GeoJSON feature of each instance; its outline follows the borders of pixels."""
    from rasterio import features
    from rasterio.transform import Affine

    instances = result.instances
    assert instances is not None
    offsets = instances.masks.offsets.tolist()
    for i, (crop, (x, y)) in enumerate(zip(instances.masks.crops, offsets, strict=True)):
        transform = reference.transform * Affine.translation(x, y)
        shapes = features.shapes(crop.astype(np.uint8), mask=crop, transform=transform)
        label = int(instances.labels[i])
        yield {
            "type": "Feature",
            "geometry": {
                "type": "MultiPolygon",
                "coordinates": [shape["coordinates"] for shape, _ in shapes],
            },
            "properties": {
                "label": label,
                "class": result.class_names[label],
                "score": round(float(instances.scores[i]), 4),
                "pixels": int(np.count_nonzero(crop)),
            },
        }

import json

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_origin

from mask2former.inference import (
    InstanceMasks,
    InstanceResult,
    PanopticResult,
    Result,
    Segment,
)
from mask2former.inference.geo import save_georeferenced

# Half a metre a pixel, from the top left corner at (1000, 2000).
TRANSFORM = from_origin(1000, 2000, 0.5, 0.5)


@pytest.fixture
def image(tmp_path):
    file = str(tmp_path / "map.tif")
    options = {"driver": "GTiff", "height": 6, "width": 8, "count": 3, "dtype": "uint8"}
    with rasterio.open(file, "w", crs="EPSG:32632", transform=TRANSFORM, **options) as dataset:
        dataset.write(np.zeros((3, 6, 8), np.uint8))
    return file


def make_result(file_name):
    ids = np.zeros((6, 8), np.int32)
    ids[2:4, 3:6] = 1
    masks = InstanceMasks.from_full((ids == 1)[None])
    return Result(
        (6, 8),
        ("car", "road"),
        InstanceResult(masks, [0.75], [0]),
        PanopticResult(ids, [Segment(1, 0, True, 0.75, 6)]),
        (1 - ids).astype(np.uint8),
        file_name,
    )


def test_files_lie_where_the_image_does(image, tmp_path):
    result = make_result(image)
    files = save_georeferenced(result, str(tmp_path / "out"))
    assert [file.rsplit("/", 1)[1] for file in files] == [
        "panoptic.tif",
        "semantic.tif",
        "instances.geojson",
    ]
    for file, expected, nodata in zip(
        files, (result.panoptic.segment_ids, result.semantic), (0, 255), strict=False
    ):
        with rasterio.open(file) as dataset:
            assert np.array_equal(dataset.read(1), expected)
            assert dataset.crs.to_epsg() == 32632 and dataset.transform == TRANSFORM
            assert dataset.nodata == nodata
    content = json.loads((tmp_path / "out" / "instances.geojson").read_text())
    assert content["crs"]["properties"]["name"] == "EPSG:32632"
    (feature,) = content["features"]
    assert feature["properties"] == {"label": 0, "class": "car", "score": 0.75, "pixels": 6}
    ((outline,),) = feature["geometry"]["coordinates"]
    # Columns 3 to 6 and rows 2 to 4 in metres.
    corners = {(1001.5, 1999.0), (1003.0, 1999.0), (1003.0, 1998.0), (1001.5, 1998.0)}
    assert {tuple(point) for point in outline} == corners
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "instances.geojson",
        "panoptic.tif",
        "semantic.tif",
    ]


def test_images_without_georeference_are_refused(tmp_path):
    file = str(tmp_path / "plain.png")
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(file)
    with pytest.raises(ValueError, match=r"plain.png has no coordinate reference system"):
        save_georeferenced(make_result(file), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="does not name its image"):
        save_georeferenced(make_result(None), str(tmp_path / "out"))


def test_results_of_another_size_are_refused(image, tmp_path):
    result = make_result(image)
    result.image_size = (8, 6)
    with pytest.raises(ValueError, match=r"map.tif has .* \(6, 8\), but the result is of \(8, 6\)"):
        save_georeferenced(result, str(tmp_path / "out"))

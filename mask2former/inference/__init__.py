"""What a trained model is used with: results as plain objects, filters, models in one folder.

Results         result.py, result_files.py: COCO, PNG, supervision; filters.py, overlaps.py
Models          model_file.py: weights, config and classes in one folder; pretrained.py finds them
Images          input_images.py: paths, Pillow, arrays, tensors → pixels
Large images    tiles.py; tile_merging.py, tile_matching.py, tile_instances.py: one result of many
                tiles; tiled_model.py: for evaluators; geo.py: GeoTIFF, GeoJSON
Folders         folder_run.py; image_files.py finds images, drawing_files.py names drawings;
                folder_results.py: COCO files; html_report.py, report_objects.py, html/: the report
Videos          video.py, video_run.py
"""

from ..utils.instance_masks import InstanceMasks
from .filters import PredictionFilter
from .result import InstanceResult, PanopticResult, Result, Segment

__all__ = [
    "InstanceMasks",
    "InstanceResult",
    "PanopticResult",
    "PredictionFilter",
    "Result",
    "Segment",
]

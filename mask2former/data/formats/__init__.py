"""One typed reader per annotation format, used by loaders, mappers, evaluators and checks.

    coco_instances.py    COCO instance JSON, LVIS included
    coco_schemas.py      what its entries must and may have
    coco_panoptic.py     COCO panoptic JSON and its PNGs
    coco_results.py      predictions in the COCO result format
    cityscapes.py        polygons and label maps of Cityscapes
    semantic_folders.py  folders of images and label maps
    annotation_formats.py  the formats of labelling tools: yolo.py, labelme.py, via.py, cvat_xml.py,
                         voc.py, mask_files.py, coco_export.py; annotated_images.py is what they
                         return, drawings.py and splits.py are what they share
    images.py            pixels of images, label maps and panoptic PNGs
    json_files.py        JSON in any encoding, decoded entry by entry against a schema
    other_formats.py     names what is given instead of COCO JSON
    masks.py             checks of polygons and RLEs before they reach C code
    findings.py          problems and warnings

A reader returns the usable content and collects what is wrong in `Findings`. A *problem* is data
that training or evaluation cannot use: both raise the first one before they start, and
`tools/check_dataset.py` reports all. A *warning* is data that is used but doubtful: training logs
what the check reports.
"""

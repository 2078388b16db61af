"""Converts annotations of any format to the formats that are trained on; tools/convert_dataset.py.

files of a labelling tool ─ sources.py ─→ COCO instance JSON
instance JSON and label maps ─ panoptic.py ─→ COCO panoptic JSON and PNGs
panoptic JSON and PNGs ─ semantic.py ─→ label maps

composition.py composes the panoptic annotation of an image: what is on top of what.
label_files.py finds the label maps of images, and their classes.
output.py writes what is complete, and nothing else; checks it.
"""

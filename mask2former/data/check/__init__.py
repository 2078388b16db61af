"""Checks of whole data sets, file by file, that go on after an error.

    name → index.py   the images of a data set and their annotations, as JSON and folders list them
         → images.py  each image and annotation, read and compared; counts per class, sizes
         → report.py  totals, JSON, Markdown, a sheet of examples

tools/check_dataset.py is the program.
"""

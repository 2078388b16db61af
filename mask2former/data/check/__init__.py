"""Checks of whole data sets that continue after errors; used by tools/check_dataset.py.

name → index.py   list the images and annotations of a data set from its JSON and folders
     → images.py  read and check each image and annotation; count classes and sizes
     → report.py  totals as JSON and Markdown, contact sheet of examples

run.py does all of it for several data sets.
"""

"""Weights from and to other libraries: read under the names of each, written for `transformers`.

conversion.py           recognises what a file holds and gives it our names
file_conversion.py      files and folders of one library → those of another
coverage.py             how much of each module a file fills
backbones.py            ImageNet weights of torchvision, timm, Swin's authors, EfficientNets
names.py                names of the `transformers` package ↔ ours
transformers.py         its folders: read and written
transformers_config.py  its config.json and preprocessor_config.json ↔ our config
metadata.py             class names, things and stuff, the task
timm_features.py        models of timm as `transformers` builds them
folders.py              folders of Hugging Face: which file, shards, JSON
"""

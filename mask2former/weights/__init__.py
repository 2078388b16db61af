"""Weights from and to other libraries: read under any published name, written for `transformers`.

coverage.py             how much of each module a file fills
folders.py              folders of Hugging Face: which file, shards, JSON
names.py                names of the `transformers` package ↔ ours
transformers_config.py  its config.json and preprocessor_config.json ↔ our config
metadata.py             class names, things and stuff, the task
timm_features.py        models of timm as `transformers` builds them
transformers.py         folders of `transformers`: read and written
"""

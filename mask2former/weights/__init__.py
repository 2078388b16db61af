"""Weights from and to other libraries: read under any published name, written for `transformers`.

    coverage.py            how much of each module a file fills
    names.py               names of the `transformers` package ↔ ours
    transformers_config.py its config.json and preprocessor_config.json ↔ our config
    transformers.py        its folders: read and written
"""

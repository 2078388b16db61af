"""Builds mask2former; everything that is only declared stands in pyproject.toml."""

from setuptools import setup

setup()

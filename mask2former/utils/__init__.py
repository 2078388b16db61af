"""Helpers shared by the parts."""

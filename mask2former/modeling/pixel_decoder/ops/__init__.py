"""The deformable attention op under the original import paths; its home is `mask2former.ops`."""

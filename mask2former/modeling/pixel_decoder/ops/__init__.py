"""Published import paths of the deformable attention op; its home is `mask2former.ops`."""

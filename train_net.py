"""Forwards to tools/train_net.py, for commands and imports written for a train_net.py here."""

import os
import runpy

_PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools", "train_net.py")
globals().update(runpy.run_path(_PROGRAM, run_name=__name__))

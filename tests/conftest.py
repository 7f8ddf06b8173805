"""Settings of all tests."""

import os

from tests.support.forked import forks as forks

# A load trial starts a process with transformers, which takes seconds; its own tests switch it on.
os.environ.setdefault("HAWQTOOL_LOAD_TRIAL", "0")

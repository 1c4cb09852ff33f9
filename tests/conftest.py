"""Hypothesis: new examples each time at a desk, the same ones in CI, where a change is judged by what it changed."""

import os

from hypothesis import settings

settings.register_profile("desk", deadline=None)  # no test is about time, and machines are busy
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "desk")

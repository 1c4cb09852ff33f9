"""Hypothesis: new examples each time at a desk, the same ones in CI, where a change is judged by what it changed."""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

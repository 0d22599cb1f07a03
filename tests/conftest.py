"""What every test shares: how hypothesis looks for counterexamples.

Two cores shared with others make any deadline a coin toss, so there is none.  In CI the examples are the same
each time, so that a change is judged by what it changes; at a desk they differ, and find more.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("engine", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("engine")

"""The dtypes that the format holds and the installed torch has: float8_e8m0fnu came with 2.7, float4 with 2.8."""

from __future__ import annotations

import torch

from engine.format.layout import DTYPES

TORCH_DTYPES = {name: dtype for name, dtype in DTYPES.items() if hasattr(torch, name)}

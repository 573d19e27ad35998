"""Finds the module that `make metal-shim` builds."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, os.environ.get("METAL_SHIM_BUILD", str(ROOT / "build/metal_shim")))
sys.path.insert(0, str(Path(__file__).resolve().parent))

"""How, where and when figures came about."""

import os
import platform
import shlex
import sys
import time
from typing import Any

import jax


def made_here() -> dict[str, Any]:
    """Command, time, device and versions of this process, ready for JSON."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }

"""`train.py --plan`: what stage transfer or distill takes on a machine that is not here.

Its updates themselves are compiled for that machine; nothing is run or written, and no checkpoint
and no pairs are read.
"""

from linvideo_jax.plan import page
from linvideo_jax.plan.planned import make


def run(config, text: str) -> int:
    """Prints the plan for the machine that `text` names; 0, or 1 if an update does not fit."""
    plan = make(config, text)
    print(page.text(plan))
    return 0 if plan.fits else 1

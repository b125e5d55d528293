"""The replaceability figure: single layers, and ranges of two and three.

python train.py --config=configs/ablations/profile.py --workdir=runs/ablations/profile

WORKDIR/rows/width_N/seed0/profile has profile.svg and profile.json. 33 ranges of 100 updates of MSE
(two seconds each on an H200, by the rate in docs/results.md) and 64 sampled videos each.
"""

from ml_collections import ConfigDict

from configs.ablations import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.stages = ("collect", "profile")
    config.sweep = tuple((f"width_{width}", {"profile.width": width}) for width in (1, 2, 3))
    return config

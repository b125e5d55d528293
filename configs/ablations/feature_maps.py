"""Feature maps of the linear branch, and what fitting them first is worth.

python train.py --config=configs/ablations/feature_maps.py --workdir=runs/ablations/feature_maps

The paper: Hedgehog best. A row of Hedgehog took an H200 under a minute of training
(docs/results.md) and half a minute of evaluation. Taylor's state is 9 times as large (273 features
a head) and its time is not known. One compilation for each map.
"""

from ml_collections import ConfigDict

from configs.ablations import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.sweep = (
        ("hedgehog", {}),
        ("relu", {"transfer.feature_map": "relu"}),
        ("taylor", {"transfer.feature_map": "taylor"}),
        # Without the fit, and as many updates of all weights more.
        ("hedgehog_not_fitted", {"transfer.warmup_steps": 0}),
    )
    config.sweep_seeds = (0, 1, 2)
    return config

"""How many layers can become linear: 0 to 12 of 12.

python train.py --config=configs/ablations/targets.py --workdir=runs/ablations/targets

The paper's quality holds to 60% of the layers and falls after. A row took an H200 under a minute of
training (docs/results.md) and half a minute of evaluation; one compilation serves all.
"""

from ml_collections import ConfigDict

from configs.ablations import common


def get_config() -> ConfigDict:
    config = common.get_config()
    # 0, 25, 42, 50, 58, 75 and 100% of the layers.
    config.sweep = tuple(
        (f"{target}_of_12", {"transfer.target": target}) for target in (0, 3, 5, 6, 7, 9, 12)
    )
    config.sweep_seeds = (0, 1, 2)
    return config

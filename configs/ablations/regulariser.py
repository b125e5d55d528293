"""The regulariser of the scores: without it, alpha fixed or annealed, lambda, r's start, rounding.

python train.py --config=configs/ablations/regulariser.py --workdir=runs/ablations/regulariser

The paper: without L_reg the model collapses when it is rounded, since r stays near 0.5. There
rounding ends the run; the rows *_late do so too and are measured after it, the others train on for
700 updates. A row took an H200 under a minute of training (docs/results.md) and half a minute of
evaluation; one compilation serves all.
"""

from ml_collections import ConfigDict

from configs.ablations import common


def get_config() -> ConfigDict:
    config = common.get_config()
    # An alpha of 0 makes L_reg and its slope zero.
    off, late = {"transfer.alpha": (0.0, 0.0, 1.0)}, {"transfer.round_at": 1499}
    nearest = {"transfer.rounding": "nearest"}
    config.sweep = (
        ("annealed", {}),  # 20 to 2
        ("off", off),
        ("annealed_late", late),
        ("off_late", {**off, **late}),
        ("annealed_late_nearest", {**late, **nearest}),
        ("off_late_nearest", {**off, **late, **nearest}),
        ("alpha_20", {"transfer.alpha": (20.0, 20.0, 1.0)}),
        ("alpha_2", {"transfer.alpha": (2.0, 2.0, 1.0)}),
        ("annealed_to_the_end", {"transfer.alpha": (20.0, 2.0, 1.0)}),
        ("lambda_0.001", {"transfer.lambda_": 0.001}),  # the paper's range; the default is 0.03
        ("lambda_0.01", {"transfer.lambda_": 0.01}),
        ("lambda_0.1", {"transfer.lambda_": 0.1}),
        ("r_0.6", {"transfer.r_init": 0.6}),
        ("r_0.99", {"transfer.r_init": 0.99}),
        ("r_1", {"transfer.r_init": 1.0}),
        ("nearest", nearest),  # rounding alone, whatever the number of linear layers
    )
    return config

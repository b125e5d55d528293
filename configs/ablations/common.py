"""What the tables of configs/ablations share: half the steps and half the batch of
configs/digits.py, the paper's objective with an anchor, and figures that need no untrained student.
By itself it is one row, half of the layers.

Settings are chosen on other prompts and noise than the tables' own: settings.py beside this.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()

    transfer = config.transfer
    transfer.objective = "adm"  # that of configs/digits.py was chosen by these tables
    # Half of configs/digits.py each, so that a row with a score network is minutes too; the same
    # for all rows of a table.
    transfer.batch_size = 32
    transfer.num_steps = 1500
    transfer.warmup_steps = 200
    transfer.round_at = 800
    transfer.save_every = 500
    transfer.log_every = 10  # medians of the time between lines

    evaluate = config.evaluate
    evaluate.num_shown = 4
    evaluate.own_before = False  # 0.0% in docs/results.md
    return config

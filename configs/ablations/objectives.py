"""The paper's table of objectives, with the forms that were proposed against its divergence.

python train.py --config=configs/ablations/objectives.py --workdir=runs/ablations/objectives

Interrupted, the same command goes on; a part, for a rented GPU in pieces of minutes:
--config.sweep_rows=mse,adm. On an H200 that two rows shared (docs/results.md) 1,500 updates took
half a minute for mse, three quarters for adm and own_next, two minutes for adm_score_short, and
would have taken four for dmd; a row's evaluation half a minute. More seeds:
--config.sweep_seeds="(0, 1, 2)".
"""

from ml_collections import ConfigDict

from configs.ablations import common


def get_config() -> ConfigDict:
    config = common.get_config()
    printed = {"transfer.weighting": "paper", "transfer.t_to": "uniform", "transfer.beta": 0.0}
    # Scores that reach 0.5 after half of the run and a tenth of the rate: the student stays near
    # the teacher, as the paper's 3,000 steps may keep it. The final rule decides at the end.
    slow = {
        "transfer.learning_rate": 1e-4,
        "transfer.r_learning_rate": 2e-3,
        "transfer.round_at": 1400,
    }
    # Half of the samples at the student's points where nothing is said.
    own = {"transfer.objective": "own_points", "transfer.own_share": 0.5}
    whole = {**own, "transfer.own_steps": 20}  # the grid's length: from noise
    config.sweep = (
        ("mse", {"transfer.objective": "mse"}),
        ("adm", {}),  # next step, clipped weight, anchor
        ("adm_printed", printed),
        ("adm_printed_slow", {**printed, **slow}),
        ("mse_slow", {"transfer.objective": "mse", **slow}),  # what slow alone does
        ("adm_no_anchor", {"transfer.beta": 0.0}),
        ("adm_paper_weight", {"transfer.weighting": "paper"}),
        ("adm_uniform_t", {"transfer.t_to": "uniform"}),
        # On a GPU prototype own points mended motion and lost digits: hence smaller shares.
        ("own_next", {**own, "transfer.own_steps": 1}),
        ("own_few", {**own, "transfer.own_steps": 4}),
        ("own_whole", whole),
        ("own_whole_fifth", {**whole, "transfer.own_share": 0.2}),  # configs/digits.py's
        ("adm_score", {"transfer.objective": "adm_score"}),
        # One Euler step to the critic's samples: the cost is nearest the paper's factor of 4.4.
        ("adm_score_short", {"transfer.objective": "adm_score", "transfer.rollout_steps": 1}),
        ("dmd", {"transfer.objective": "dmd", "transfer.beta": 0.0}),  # the paper's has no anchor
        ("dmd_anchored", {"transfer.objective": "dmd"}),
    )
    return config

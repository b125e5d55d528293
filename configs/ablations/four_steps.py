"""Four steps (DMD2) from a half-linear, a dense, and in one stage from the dense model.

python train.py --config=configs/ablations/four_steps.py --workdir=runs/ablations/four_steps

The paper distils after the transfer: both at once collapses. Rows *_every_5 have the published
codes' ratio of both networks' updates, half_linear_dmd2_every_5_start a first step that begins on
the teacher's samples. What was not distilled, and the shipped model, are measured by
configs/digits_dmd2_table.py. A row took an H200 that eight programs shared six minutes.
"""

from ml_collections import ConfigDict

from configs import digits_dmd2


def get_config() -> ConfigDict:
    config = digits_dmd2.get_config()
    dense = {"checkpoint": "assets/wan_digits"}
    every_5 = {"distill.generator_every": 5}  # the codes' ratio: 400 updates of the generator
    one_stage = {**dense, "distill.one_stage": True}
    dense |= {"distill.require_selection": False}
    start = {"distill.start_steps": 200}  # against a first step that stays at the prompt's mean
    config.sweep = (
        ("half_linear_dmd2", {}),
        ("dense_dmd2", dense),
        ("one_stage", one_stage),
        ("half_linear_dmd2_every_5", every_5),
        ("dense_dmd2_every_5", {**dense, **every_5}),
        ("one_stage_every_5", {**one_stage, **every_5}),
        ("half_linear_dmd2_every_5_4000", {**every_5, "distill.num_steps": 4000}),
        ("half_linear_dmd2_every_5_start", {**every_5, **start}),
    )
    config.sweep_seeds = (0, 1, 2)
    config.evaluate.num_shown = 4
    config.evaluate.own_before = False
    # The teacher's; a distilled model is sampled as it is trained.
    config.evaluate.sampling = ConfigDict({"num_inference_steps": 50})
    return config

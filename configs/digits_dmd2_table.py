"""What four steps are compared with: the teacher and the half-linear model, undistilled.

python train.py --config=configs/digits_dmd2_table.py --workdir=runs/dmd2/table

WORKDIR/evaluate has table.md and contact_sheet.png, with the shipped model of four steps. Those of
configs/ablations/four_steps.py are trained and measured there.
"""

from ml_collections import ConfigDict

from configs import digits_dmd2


def get_config() -> ConfigDict:
    config = digits_dmd2.get_config()
    config.stages = ("evaluate",)
    evaluate = config.evaluate
    evaluate.sampling = ConfigDict({"num_inference_steps": 50})  # the teacher, and the half linear
    evaluate.others = ConfigDict(
        {
            "teacher_25_steps": "assets/wan_digits",
            "teacher_4_steps": "assets/wan_digits",
            "half_linear": "assets/wan_digits_linear",
            "half_linear_4_steps": "assets/wan_digits_linear",
            "half_linear_dmd2_shipped": "assets/wan_digits_four_step",
        }
    )
    # Distilled models are sampled as their own config.json says.
    evaluate.others_sampling = ConfigDict(
        {
            "teacher_25_steps": {"num_inference_steps": 25},
            "teacher_4_steps": {"num_inference_steps": 4},
            "half_linear_4_steps": {"num_inference_steps": 4},
        }
    )
    evaluate.others_before = False
    evaluate.num_shown = 4
    return config

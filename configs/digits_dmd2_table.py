"""The table of four steps: what configs/digits_dmd2.py has trained so far, beside the teacher.

python train.py --config=configs/digits_dmd2_table.py --workdir=runs/dmd2/table

WORKDIR/evaluate has table.md and contact_sheet.png. Rows whose run is not there are left out; the
runs are looked for in runs/dmd2, from the folder that the command is given in.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import digits_dmd2

RUNS = {
    "dense + DMD2": "runs/dmd2/dense/final",
    "half linear + DMD2": "runs/dmd2/half_linear/final",
    "one stage": "runs/dmd2/one_stage/final",
}


def get_config() -> ConfigDict:
    config = digits_dmd2.get_config()
    config.stages = ("evaluate",)
    evaluate = config.evaluate
    evaluate.sampling = ConfigDict({"num_inference_steps": 50})  # the teacher, and the half linear
    others = {
        "teacher 25 steps": "assets/wan_digits",
        "teacher 4 steps": "assets/wan_digits",
        "half linear": "assets/wan_digits_linear",
        "half linear 4 steps": "assets/wan_digits_linear",
    }
    others |= {name: folder for name, folder in RUNS.items() if Path(folder).exists()}
    evaluate.others = ConfigDict(others)
    # Distilled models are sampled as their own config.json says.
    evaluate.others_sampling = ConfigDict(
        {
            "teacher 25 steps": {"num_inference_steps": 25},
            "teacher 4 steps": {"num_inference_steps": 4},
            "half linear 4 steps": {"num_inference_steps": 4},
        }
    )
    evaluate.others_before = False
    evaluate.num_shown = 4
    return config

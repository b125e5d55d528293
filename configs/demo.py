"""The whole way on two cores: python train.py --config=configs/demo.py --workdir=runs/demo

Collects pairs of the shipped small model, converts a few of its layers on the spot, and compares
with the teacher both this student and the shipped half-linear one, which a GPU made
(configs/digits.py). To fit minutes it scores latents, takes few steps, and decodes what it shows.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.dtype = "float32"

    config.collect.num_videos = 64
    config.collect.batch_size = 16
    config.collect.sampling = ConfigDict({"num_inference_steps": 8})

    transfer = config.transfer
    transfer.target = 3  # of 12 layers
    transfer.num_steps = 110
    transfer.batch_size = 8
    transfer.warmup_steps = 30
    transfer.round_at = 60
    transfer.rewind = True
    transfer.r_learning_rate = 1.0
    transfer.lr_warmup_steps = 5
    transfer.save_every = 20
    transfer.log_every = 2

    evaluate = config.evaluate
    evaluate.num_prompts = 64
    evaluate.seeds = (0,)
    evaluate.sampling = ConfigDict({"num_inference_steps": 8})
    evaluate.batch_size = 16
    evaluate.reads = "latents"
    evaluate.others = ConfigDict(
        {
            "half linear, shipped": "assets/wan_digits_linear",
            "four steps, shipped": "assets/wan_digits_four_step",
        }
    )
    evaluate.others_before = False  # docs/results.md has that gap
    return config

"""wan-digits in four steps (DMD2), from the half-linear model:

python train.py --config=configs/digits_dmd2.py --workdir=runs/dmd2
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.checkpoint = "assets/wan_digits_linear"  # what is distilled
    config.teacher = "assets/wan_digits"
    config.stages = ("distill", "evaluate")

    config.distill = distill = ConfigDict()
    distill.require_selection = True
    distill.one_stage = False
    distill.round_at = 1000
    distill.fake_score = ""
    distill.sampling = ConfigDict()
    distill.sampler = "renoise"
    distill.denoising_steps = (1000.0, 750.0, 500.0, 250.0)
    distill.warp_steps = True
    distill.flow_shift = 3.0
    distill.guidance_scale = 2.0
    distill.guidance_convention = "standard"
    distill.normalise = True
    distill.generator_every = 5
    distill.num_steps = 2000
    distill.batch_size = 64
    distill.learning_rate = 1e-4
    distill.fake_learning_rate = 1e-4
    distill.lr_warmup_steps = 50
    distill.final_learning_rate = 1.0
    distill.betas = (0.0, 0.999)
    distill.weight_decay = 0.01
    distill.clip_norm = 10.0
    distill.ema_decay = 0.99
    distill.remat = "products"
    distill.divergence_factor = 100.0
    distill.divergence_steps = 20
    distill.save_every = 500
    distill.keep = 2
    distill.log_every = 50
    distill.report_every = 30.0
    distill.sample_every = 250
    distill.sample_prompts = 4
    distill.profile_at = 0
    return config

"""wan-digits in four steps (DMD2), on one GPU. From the shipped half-linear model:

python train.py --config=configs/digits_dmd2.py --workdir=runs/dmd2/half_linear

configs/ablations/four_steps.py does it from three seeds, from the dense model, and in one stage.

Values are those of Self-Forcing-Plus (self_forcing_14b_dmd.yaml), which distils Wan2.1 14B with all
frames at once, where nothing else is said; "ours" are for a model this small.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.checkpoint = "assets/wan_digits_linear"  # what is distilled: its layers stay as they are
    config.teacher = "assets/wan_digits"
    config.stages = ("distill", "evaluate")

    config.distill = distill = ConfigDict()
    distill.require_selection = True  # False: a checkpoint without linear layers is meant
    distill.fake_score = ""  # the folder that the fake score starts from; "": the teacher
    distill.sampling = ConfigDict()  # size and negative prompt, where not the teacher's

    # How the generator is sampled, in training and after. The list counts timesteps before the
    # flow shift; warp_steps False tells them to the network as they stand.
    distill.sampler = "renoise"  # as it is trained; euler is LightX2V's hop
    distill.denoising_steps = (1000.0, 750.0, 500.0, 250.0)
    distill.warp_steps = True
    distill.flow_shift = 3.0  # wan-digits' own; Self-Forcing-Plus: 5. Of the noised times too

    # Of the teacher: what wan-digits is sampled with. "from_conditional" counts from the
    # conditional velocity, as CausVid and Self-Forcing write it: one less.
    distill.guidance_scale = 2.0
    distill.guidance_convention = "standard"
    distill.normalise = True  # DMD's weight of each sample

    distill.num_steps = 2000  # LinVideo's second stage
    # Of these, the first so many teach the generator's first step the teacher's own samples, of so
    # many steps. From pure noise the teacher's velocity leads to the prompt's mean, and with a
    # generator_every of 5 DMD2 alone left a third of the trainings there (docs/results.md).
    distill.start_steps = 0
    distill.start_sampling_steps = 10
    distill.start_learning_rate = 1e-4
    distill.batch_size = 64
    # Two time scales: the fake score learns at every step. Ours: the codes' 5 leaves a model this
    # small too few updates of the generator (docs/results.md).
    distill.generator_every = 2
    # Ours: both networks at 50 times Self-Forcing-Plus' rate of the generator. wan-digits learns at
    # 1e-3 where Wan learns at 1e-5, and 1,000 updates of the generator must do.
    distill.learning_rate = 1e-4
    distill.fake_learning_rate = 1e-4
    distill.lr_warmup_steps = 20  # ours
    distill.final_learning_rate = 0.1  # ours: a cosine to this share; the codes keep it
    distill.betas = (0.0, 0.999)
    distill.weight_decay = 0.01
    distill.clip_norm = 10.0
    distill.ema_decay = 0.99  # of the generator, which is what is kept
    distill.remat = "products"
    distill.accumulate = 1  # parts of a batch, one after the other, whose gradients are averaged

    # Ours: transfer and DMD2 at once, from a dense model whose scores move until `round_at`, with
    # r_init, target, lambda_, alpha and r_learning_rate of `transfer`. The paper: it collapses.
    distill.one_stage = False
    distill.round_at = 1000

    # The fake score's loss; DMD's own says little (Self-Forcing, issue 51).
    distill.divergence_factor = 100.0
    distill.divergence_steps = 20
    distill.save_every = 500
    distill.keep = 2
    distill.log_every = 50
    distill.report_every = 30.0
    distill.sample_every = 500  # contact sheets for the report
    distill.sample_prompts = 2
    distill.profile_at = 0
    return config

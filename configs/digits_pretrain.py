"""wan-digits from scratch, in parts or at once:

python train.py --config=configs/digits_pretrain.py --workdir=runs/pretrain

On one rented GPU, in pieces of minutes: --config.pretrain.vae.minutes=4, the same for the
transformer, and --config.pretrain.parts="('transformer',)" --config.checkpoint=FOLDER to go on from
the weights of an earlier piece. Measured: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "wan_digits"
    config.checkpoint = ""  # a folder to go on from
    config.prompts = "assets/prompts_digits_test.txt"
    config.seed = 0
    config.stages = ("pretrain",)

    config.pretrain = pretrain = ConfigDict()
    pretrain.parts = ("vae", "classifier", "transformer")
    pretrain.sampling = ConfigDict(
        {
            "sampler": "unipc",
            "num_inference_steps": 20,
            "guidance_scale": 2.0,  # measured: docs/results.md
            "flow_shift": 3.0,  # Wan2.1 at 480p, diffusers' default
            "height": 96,
            "width": 96,
            "num_frames": 25,
        }
    )

    pretrain.vae = vae = ConfigDict()
    # As long as what is decoded: of two VAEs trained on 17 frames one had a background that drifted
    # from frame 18 on, by chance (docs/results.md).
    vae.num_frames = 25
    vae.freeze_encoder = False  # True: the decoder alone, for latents already in use
    vae.batch_size = 32
    vae.num_steps = 4300  # on 17 frames 3.8 minutes on an H100, without compilation
    vae.minutes = 0.0  # not 0: as many steps as fit, compilation included
    vae.learning_rate = 2e-3
    vae.digit_weight = 4.0  # digits are 10% of the pixels and all of the information
    vae.kl_weight = 5e-5  # near the evidence bound at the error reached: 2 mse latents / pixels
    vae.dtype = "bfloat16"
    vae.validation_clips = 512
    vae.save_every = 2000
    vae.log_every = 50

    pretrain.classifier = classifier = ConfigDict()
    classifier.dtype = "bfloat16"
    classifier.pixels = ConfigDict(
        {
            "num_steps": 3000,  # the shipped one: 5,000
            "batch_size": 128,
            "num_frames": (25, 81),
            "pool_clips": 0,  # 0: every batch is drawn anew
            "validation_clips": 1024,
        }
    )
    classifier.latents = ConfigDict(
        {
            "num_steps": 4000,  # the shipped one: 2,500
            "batch_size": 128,
            "num_frames": (25, 81),
            "pool_clips": 32_768,  # encoding costs more than classifying
            "validation_clips": 1024,
        }
    )

    pretrain.transformer = transformer = ConfigDict()
    # The long size takes each `every`-th step, the short one the others; no clips: left out.
    transformer.sizes = ConfigDict(
        {
            "short": {"num_frames": 25, "num_clips": 131_072, "batch_size": 256, "every": 1},
            "long": {"num_frames": 81, "num_clips": 0, "batch_size": 96, "every": 2},
        }
    )
    transformer.captions_per_clip = 3
    transformer.encode_batch_size = 128
    transformer.caption_dropout = 0.1
    transformer.flow_shift = 3.0  # of the training times, as prototypes of this task did
    transformer.num_steps = 9_700  # 9 minutes on an H100
    transformer.minutes = 0.0
    transformer.learning_rate = 2e-3
    transformer.lr_warmup_steps = 300
    transformer.ema_decay = 0.999
    transformer.dtype = "bfloat16"
    transformer.remat = "products"
    transformer.save_every = 3000
    transformer.log_every = 50
    return config

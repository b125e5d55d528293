"""Wan2.1-T2V-1.3B at 480p: 16 of its 30 layers become linear. On 8 GPUs of 80 GB or a TPU slice:

python train.py --config=configs/wan1_3b.py --plan=h100:8
python train.py --config=configs/wan1_3b.py --workdir=gs://BUCKET/wan1_3b

The same command on every host (docs/pods.md). Not run yet: where the paper is silent, the values
are our choice, most of them what wan-digits was converted with, and --plan says what they cost.
"Paper" is arXiv 2510.08318; what it does not give is marked "ours".
"""
# ruff: noqa: RUF001 (the published negative prompt has full-width commas)

from ml_collections import ConfigDict

# `sample_neg_prompt` of Wan2.1's wan/configs/shared_config.py.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "wan2_1_t2v_1_3b"
    config.checkpoint = "models/wan1.3b"  # what docs/wan.md converts to
    config.prompts = "assets/prompts.txt"  # ours: the paper's prompts are not published
    config.seed = 0
    config.dtype = "bfloat16"  # of the products, as Wan runs; weights and sums are float32
    config.stages = ("collect", "transfer", "evaluate")

    # Sizes of the mesh's axes; -1: what the others leave. Ours: 8 chips share the weights, each
    # with samples of its own; on more chips let `context` share a video's tokens (docs/pods.md).
    config.mesh = ConfigDict({"data": -1, "fsdp": 8, "context": 1})

    config.collect = collect = ConfigDict()
    collect.num_videos = 1000  # the paper: 50K pairs; 50 steps a video
    collect.batch_size = 8  # videos at a time; ours
    collect.negative_prompt = NEGATIVE_PROMPT
    collect.sampling = ConfigDict(
        {
            "sampler": "unipc",  # Wan2.1's default
            "num_inference_steps": 50,  # paper
            "guidance_scale": 5.0,  # paper
            "flow_shift": 3.0,  # diffusers, for 480p; the paper gives none
            "height": 480,  # paper
            "width": 832,
            "num_frames": 81,  # paper
        }
    )

    config.transfer = transfer = ConfigDict()
    transfer.target = 16  # paper, of 30
    transfer.selection = "selective"  # paper
    transfer.layers = ()
    transfer.selection_seed = 0
    transfer.objective = "adm"  # paper
    transfer.num_steps = 3000  # paper
    transfer.batch_size = 16  # ours: the paper gives none; two samples a GPU
    transfer.accumulate = 1
    # Ours: the feature maps are first fitted layer by layer (docs/method.md).
    transfer.warmup_steps = 200
    transfer.warmup_learning_rate = 1e-2  # LoLCATs' rate for feature maps
    transfer.round_at = 1400  # ours, as wan-digits
    transfer.r_init = 0.9  # the paper: at or near 1; at 1 the linear branch has no gradient
    transfer.r_learning_rate = 0.3  # ours, as wan-digits
    transfer.lambda_ = 0.01  # paper
    transfer.alpha = (20.0, 2.0, 0.6)  # the paper: 20 to 2; by 60% of the scores' time is ours
    transfer.freeze_steps = 0
    transfer.t_to = "next"  # ours: the paper says t < t'
    transfer.weighting = "clipped"  # ours: the paper's grows without bound as t falls to 0
    transfer.beta = 1.0  # of the anchor, ours; 0 is the paper's form (docs/method.md)
    transfer.own_steps = 1
    transfer.own_share = 0.5
    transfer.score_network = ""
    transfer.score_updates = 5
    transfer.score_learning_rate = 1e-6  # between the critics' 4e-7 and 8e-6 of DMD2 codes for Wan
    transfer.rollout_steps = 4
    transfer.negative_fraction = 0.1  # ours
    # Ours: the paper gives no rate. AdamW at 1e-5, since Wan was trained with Adam and is to stay
    # near itself; the new feature maps learn at 1e-3.
    transfer.optimizer = "adamw"
    transfer.learning_rate = 1e-5
    transfer.final_learning_rate = 0.1
    transfer.lr_warmup_steps = 100
    transfer.feature_map_rate = 100.0
    transfer.weight_decay = 0.0
    transfer.clip_norm = 1.0  # usual for video transformers
    transfer.ema_decay = 0.0
    transfer.final_weights = "raw"
    transfer.remat = "full"  # products alone are 45 GB a sample at this size (--plan)
    transfer.save_every = 250
    transfer.keep = 2
    transfer.best = ""
    transfer.log_every = 10

    config.evaluate = evaluate = ConfigDict()
    evaluate.prompts = "assets/prompts.txt"
    evaluate.num_prompts = 8
    evaluate.seeds = (0,)
    evaluate.height = 480
    evaluate.width = 832
    evaluate.num_frames = 81
    evaluate.sampling = ConfigDict()  # of the checkpoint, where nothing is said
    evaluate.batch_size = 1
    evaluate.num_shown = 4
    return config

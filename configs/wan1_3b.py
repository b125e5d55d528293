"""Wan2.1-T2V-1.3B at 480p: 16 of its 30 layers become linear. On 8 GPUs of 80 GB or a TPU slice:

python train.py --config=configs/wan1_3b.py --plan=h100:8
python train.py --config=configs/wan1_3b.py --workdir=/shared/wan1_3b

The same command on every host (docs/pods.md). Not run yet: where the paper is silent, the values
are our choice, most of them what wan-digits was converted with, and --plan says what they cost.
"Paper" is arXiv 2510.08318; what it does not give is marked "ours".
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "wan2_1_t2v_1_3b"
    config.checkpoint = "models/wan1.3b"  # what docs/wan.md converts to
    config.prompts = "assets/prompts.txt"  # ours: the paper's prompts are not published
    config.seed = 0
    config.dtype = "bfloat16"  # of the products, as Wan runs; weights and sums are float32
    config.stages = ("collect", "transfer", "evaluate")

    # Sizes of the mesh's axes; -1: what the others leave. Ours: all chips share the weights, and
    # each has samples of its own. On more chips than samples let `context` share the tokens of a
    # video (docs/pods.md); exchange: between softmax layers, auto, ulysses or ring.
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "context": 1, "exchange": "auto"})
    config.mesh.start_seconds = 300.0  # ours: that all hosts may take to come
    config.mesh.silent_seconds = 60.0  # ours: after so long without a sign of life a host is lost

    config.collect = collect = ConfigDict()
    collect.mode = "stored"  # paper
    collect.folder = ""  # in the workdir; one of its own lets several runs share the pairs
    collect.num_videos = 1000  # the paper: 50K pairs; 50 steps a video
    collect.batch_size = 8  # videos at a time, and in a file; ours
    collect.store_velocity = "both"  # ours: what the anchor compares with
    collect.buffer = 4  # of mode "online", as the next
    collect.reuse = 1.0
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
    transfer.feature_map = "hedgehog"  # paper
    transfer.rounding = "target"  # ours: the smallest `target` scores, whatever their values
    transfer.selection_seed = 0
    # Paper, with our anchor below. On wan-digits own_points is ahead and cheaper (docs/method.md);
    # neither has run on Wan.
    transfer.objective = "adm"
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
    transfer.rewind = False  # paper
    transfer.freeze_steps = 0
    transfer.t_to = "next"  # ours: the paper says t < t'
    transfer.weighting = "clipped"  # ours: the paper's grows without bound as t falls to 0
    transfer.beta = 1.0  # of the anchor, ours; 0 is the paper's form (docs/method.md)
    transfer.own_steps = 50  # whole trajectories, as wan-digits
    transfer.own_share = 0.2  # as wan-digits
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
    transfer.divergence_factor = 100.0  # ours, as wan-digits
    transfer.divergence_steps = 20
    transfer.save_every = 250  # ours: an hour or so between two states
    transfer.keep = 2
    transfer.best = ""
    transfer.log_every = 10
    transfer.report_every = 60.0
    transfer.sample_every = 0
    transfer.sample_prompts = 2
    transfer.profile_at = 0

    config.evaluate = evaluate = ConfigDict()
    # Without a classifier the student's videos are compared with the teacher's of the same noise,
    # and stored under the names that VBench looks for. All ours.
    evaluate.prompts = "assets/prompts.txt"
    evaluate.num_prompts = 8
    evaluate.seeds = (0,)
    evaluate.height = 480
    evaluate.width = 832
    evaluate.num_frames = 81
    evaluate.sampling = ConfigDict()  # of the checkpoint, where nothing is said
    evaluate.batch_size = 1
    evaluate.reads = "pixels"
    evaluate.classifier = ""
    evaluate.num_shown = 4
    evaluate.others = ConfigDict()
    evaluate.others_before = False
    evaluate.own_before = False  # ours: two models to sample instead of three
    evaluate.shared = ""
    return config

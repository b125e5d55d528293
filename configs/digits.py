"""Half of wan-digits' layers become linear:

python train.py --config=configs/digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "wan_digits"
    config.checkpoint = "assets/wan_digits"
    config.prompts = "assets/prompts_digits_train.txt"
    config.seed = 0
    config.dtype = "bfloat16"
    config.stages = ("collect", "transfer", "evaluate")

    config.mesh = mesh = ConfigDict()  # sizes of the axes; -1: what the others leave
    mesh.data = -1
    mesh.fsdp = 1
    mesh.context = 1
    mesh.exchange = "auto"  # of softmax layers over context: ulysses or ring
    mesh.start_seconds = 300.0  # that all hosts may take to come
    mesh.silent_seconds = 60.0  # after which a host without a sign of life counts as lost

    config.collect = collect = ConfigDict()
    # stored: pairs are made before the transfer and kept in `folder`, which runs may share ("": one
    # of this run's); online: the teacher makes them during it, and nothing is kept.
    collect.mode = "stored"
    collect.folder = ""
    collect.num_videos = 4096
    collect.batch_size = 256  # videos made at a time, and in a file
    # Which of the teacher's velocities are stored beside the states: both, cond, none. What a
    # training needs of them and does not find costs it a forward of the teacher.
    collect.store_velocity = "both"
    # Of online: rounds of `batch_size` videos in memory, and how often a pair is trained on.
    collect.buffer = 4
    collect.reuse = 1.0
    collect.sampling = ConfigDict()  # of the checkpoint, where nothing is said

    config.transfer = transfer = ConfigDict()
    transfer.target = 6  # of 12 layers
    # How the layers are chosen: selective (learned scores), manual (`layers`, as many as `target`),
    # grid (greedy by the stage profile), random (by `selection_seed`).
    transfer.selection = "selective"
    transfer.layers = ()
    transfer.selection_seed = 0
    # own_points (velocities on stored pairs and at the student's own points), adm, adm_score (the
    # score from a network of its own), mse (on stored pairs alone), dmd (t = 0 alone). The paper:
    # adm; why not here is in docs/method.md.
    transfer.objective = "own_points"
    transfer.feature_map = "hedgehog"  # of the linear branch; relu and taylor for the ablation
    transfer.num_steps = 3000
    transfer.batch_size = 64
    # The feature maps are first fitted layer by layer, at softmax's states: from the initial maps,
    # which only imitate softmax to first order, the mixed layers would start from noise.
    transfer.warmup_steps = 200
    transfer.warmup_learning_rate = 1e-2  # LoLCATs' rate for feature maps
    # Scores move until `round_at`, then the rounded model is trained.
    transfer.round_at = 1400
    transfer.r_init = 0.9  # the paper: at or near 1; at 1 the linear branch has no gradient
    transfer.r_learning_rate = 0.3  # plain descent; every score ended at 0 or 1
    transfer.lambda_ = 0.03  # the paper: 0.01, and 0.001 to 0.1 change the result by about 1%
    transfer.alpha = (20.0, 2.0, 0.6)  # the paper: 20 to 2; reached at 60% of the scores' time
    # At round_at: the `target` smallest scores ("target"), or for the ablation all below 1/2
    # ("nearest").
    transfer.rounding = "target"
    # Whether the weights begin anew at round_at, as the teacher's; the feature maps never do.
    transfer.rewind = False
    transfer.freeze_steps = 0  # updates within 0.02 of 0 or 1 that freeze a layer; 0: none does
    transfer.t_to = "next"  # ADM's t, a lower step of the grid: the next, or uniform
    transfer.weighting = "clipped"
    transfer.beta = 1.0  # of the anchor; 0 is the printed form
    # Of own_points: moves from a stored state, the grid's length or more for whole trajectories;
    # and the share of the batch that is not stored pairs (docs/results.md).
    transfer.own_steps = 20
    transfer.own_share = 0.2
    # Of adm_score and dmd: the folder that the score network starts from ("": the teacher), its
    # updates for each of the student's, and the Euler steps of the student's samples.
    transfer.score_network = ""
    transfer.score_updates = 5
    transfer.score_learning_rate = 1e-4  # not tuned
    transfer.rollout_steps = 4
    transfer.negative_fraction = 0.1  # of samples of the negative branch; the rest are conditional
    transfer.learning_rate = 1e-3
    transfer.final_learning_rate = 0.02
    transfer.lr_warmup_steps = 50
    transfer.feature_map_rate = 3.0  # times the rate of the weights
    transfer.clip_norm = 1.0
    # muon (for the matrices of the layers, Adam for the rest) or adamw; decay of matrices alone.
    transfer.optimizer = "muon"
    transfer.weight_decay = 0.0
    transfer.accumulate = 1  # parts of a batch, one after the other, whose gradients are averaged
    transfer.ema_decay = 0.0  # of the weights' moving average; 0: none is kept
    transfer.final_weights = "raw"  # what the student is made of: raw, or ema
    # What the backward pass keeps of a layer: none (all), products (those with weights), full (the
    # layer's input), offload (that, in the host's memory).
    transfer.remat = "products"
    # A run stops where its velocity error is above this factor times its running median for so many
    # steps; 0: never. Making a layer linear raises the error up to (1 / 0.2)^2 times while r falls
    # from 0.8 to 0; runs that diverged grew without bound.
    transfer.divergence_factor = 100.0
    transfer.divergence_steps = 20
    transfer.save_every = 1000
    transfer.keep = 2  # of the newest states
    transfer.best = ""  # a metric: the state where it was least is kept too
    transfer.log_every = 50
    transfer.report_every = 30.0  # seconds; report.html grows while training
    transfer.sample_every = 0  # steps; teacher and student from one noise, in the report; 0: none
    transfer.sample_prompts = 2
    transfer.profile_at = 0  # a step; a trace of the 3 after it is in state/transfer/profile-trace

    config.profile = profile = ConfigDict()  # not among the stages above: selection "grid" needs it
    profile.width = 2  # consecutive layers replaced at a time
    profile.num_steps = 100  # updates of recovery
    profile.num_validation = 64  # videos whose pairs are not trained on
    profile.num_prompts = 64  # of evaluate's, sampled and judged for every range; 0: none

    config.evaluate = evaluate = ConfigDict()
    evaluate.prompts = "assets/prompts_digits_test.txt"  # combinations and images never trained on
    evaluate.num_prompts = 256
    evaluate.seeds = (0, 1, 2)
    evaluate.height = 96
    evaluate.width = 96
    evaluate.num_frames = 25
    evaluate.sampling = ConfigDict()  # of the checkpoint, where nothing is said
    evaluate.batch_size = 64
    evaluate.reads = "pixels"  # every video is decoded
    evaluate.classifier = "assets/digits_classifier"
    evaluate.num_shown = 8
    evaluate.others = ConfigDict()
    evaluate.others_before = True  # whether they are compared with what they were before training
    evaluate.own_before = True  # and the student of this run
    evaluate.shared = ""  # another folder for what is of the teacher alone; a sweep has one

    # Rows of a table (configs/ablations): (name, {field: value}) each, of which sweep_rows picks
    # some by name, and the training seeds that each has.
    config.sweep = ()
    config.sweep_rows = ()
    config.sweep_seeds = (0,)
    return config

"""The long size, 81 frames: objectives there, and models off the length they were trained at.

python train.py --config=configs/ablations/length.py --workdir=runs/ablations/length \
    --config.checkpoint=runs/long_teacher/final

Rows are long_ or short_ by the length of the pairs that they are trained on, and _at_81 or _at_25
by that of the videos that are measured; two evaluations of one training share it. The teacher must
know both lengths; the one in assets/ has seen 25 frames alone. It is trained on, twice, by

python train.py --config=configs/digits_pretrain.py --workdir=runs/long_first \
    --config.checkpoint=assets/wan_digits --config.pretrain.parts="('transformer',)" \
    --config.pretrain.transformer.sizes.short.num_clips=32768 \
    --config.pretrain.transformer.sizes.long.num_clips=24576 \
    --config.pretrain.transformer.learning_rate=1e-3 --config.pretrain.transformer.minutes=7.5

and the same with --workdir=runs/long_teacher, --config.checkpoint=runs/long_first/final, 32,768
long clips, 9 minutes, and --config.seed=1.
"""

from ml_collections import ConfigDict

from configs.ablations import common, objectives


def get_config() -> ConfigDict:
    config = common.get_config()
    config.collect.sampling = ConfigDict({"num_frames": 81})
    config.collect.num_videos = 1280  # about as many latent frames as 4,096 short videos have
    evaluate = config.evaluate
    evaluate.num_frames = 81
    evaluate.prompts = "assets/prompts_digits_test_81.txt"
    evaluate.num_prompts = 128
    evaluate.batch_size = 32

    of = dict(objectives.get_config().sweep)
    at_25 = {"evaluate.num_frames": 25, "evaluate.prompts": "assets/prompts_digits_test.txt"}
    short = {"collect.sampling": {"num_frames": 25}, "collect.num_videos": 4096}
    config.sweep = (
        ("long_at_81", {}),  # adm
        ("long_mse_at_81", of["mse"]),
        ("long_printed_at_81", of["adm_printed"]),
        ("long_own_whole_at_81", of["own_whole"]),
        ("long_at_25", at_25),
        ("short_at_81", short),
        ("short_at_25", {**short, **at_25}),
    )
    return config

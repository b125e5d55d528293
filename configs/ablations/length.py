"""Off the trained length: linearised at 25 frames and sampled at 81, and the other way.

python train.py --config=configs/ablations/length.py --workdir=runs/ablations/length \
    --config.checkpoint=TEACHER

The teacher must know both lengths; the one in assets/ has seen 25 frames alone (docs/results.md),
so TEACHER is that trained on, by configs/digits_pretrain.py with clips of both. Two trainings, each
evaluated at both lengths. An 81-frame pair has three times the tokens; how long that takes is not
known.
"""

from ml_collections import ConfigDict

from configs.ablations import common


def get_config() -> ConfigDict:
    config = common.get_config()
    at_81 = {
        "evaluate.num_frames": 81,
        "evaluate.prompts": "assets/prompts_digits_test_81.txt",
        "evaluate.batch_size": 32,
    }
    # About as many latent frames as 4,096 short videos have.
    trained_at_81 = {"collect.sampling": {"num_frames": 81}, "collect.num_videos": 1280}
    config.sweep = (
        ("short_at_25", {}),
        ("short_at_81", at_81),
        ("long_at_81", {**trained_at_81, **at_81}),
        ("long_at_25", trained_at_81),
    )
    return config

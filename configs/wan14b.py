"""Wan2.1-T2V-14B at 720p: 22 of its 40 layers become linear. On 32 GPUs of 80 GB or a TPU slice:

python train.py --config=configs/wan14b.py --plan=v5p:4x4x4
python train.py --config=configs/wan14b.py --workdir=/shared/wan14b

The same command on every host (docs/pods.md). Every other value and its source is in wan1_3b.py.
"""

from ml_collections import ConfigDict

from configs import wan1_3b


def get_config() -> ConfigDict:
    config = wan1_3b.get_config()
    config.model = "wan2_1_t2v_14b"
    config.checkpoint = "models/wan14b"

    # Ours: groups of 8 chips, on GPUs those of one host, share the tokens of a video (40 heads
    # divide by 8), and all chips the weights: 4 groups on 32 chips, 8 on 64.
    config.mesh.context = 8

    collect = config.collect
    collect.sampling.flow_shift = 5.0  # Wan2.1 and diffusers, for 720p
    collect.sampling.height = 720  # paper
    collect.sampling.width = 1280

    transfer = config.transfer
    transfer.target = 22  # paper, of 40
    transfer.learning_rate = 5e-6  # ours: half of 1.3B's, as larger models usually take less

    evaluate = config.evaluate
    evaluate.height = 720
    evaluate.width = 1280
    return config

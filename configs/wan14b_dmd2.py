"""Wan2.1-T2V-14B with linear layers, distilled to four steps (DMD2), at 720p:

python train.py --config=configs/wan14b_dmd2.py --workdir=/shared/wan14b_dmd2

Three models of 14B: generator, fake score and teacher. Every other value and its source is in
wan1_3b_dmd2.py. Not run yet.
"""

from ml_collections import ConfigDict

from configs import wan1_3b_dmd2


def get_config() -> ConfigDict:
    config = wan1_3b_dmd2.get_config()
    config.model = "wan2_1_t2v_14b"
    config.checkpoint = "/shared/wan14b/final"
    config.teacher = "models/wan14b"

    config.mesh = ConfigDict({"data": -1, "fsdp": 8, "context": 4})  # ours; 40 heads divide by 4

    distill = config.distill
    distill.sampling.height = 720  # paper
    distill.sampling.width = 1280
    distill.accumulate = 2  # ours: by --plan=v5p:4x4x4 the whole batch takes 103 GiB of a chip
    distill.guidance_scale = 6.0  # SF+ for 14B: 5.0 counted from the conditional velocity

    evaluate = config.evaluate
    evaluate.height = 720
    evaluate.width = 1280
    return config

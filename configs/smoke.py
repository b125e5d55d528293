"""The first minute on a new machine: three updates on random weights and pairs, no files.

python train.py --config=configs/smoke.py
python train.py --config=configs/smoke.py --config.model=wan2_1_t2v_1_3b
python train.py --config=configs/smoke.py --config.model=wan2_1_t2v_14b --config.mesh.context=8

It is the update of stage transfer on the mesh of all hosts, with videos of the model's own size,
and prints seconds a step, MFU and memory. The same command on every host.
"""

from ml_collections import ConfigDict

from configs import wan1_3b


def get_config() -> ConfigDict:
    config = wan1_3b.get_config()
    config.stages = ("smoke",)
    config.smoke = smoke = ConfigDict()
    smoke.num_steps = 3  # after one that compiles
    smoke.samples = 1  # of every part of the batch, data x fsdp

    config.model = "wan_digits"
    config.checkpoint = config.prompts = ""
    del config.evaluate
    config.collect.sampling.update({"height": 0, "width": 0, "num_frames": 0})  # 0: the model's
    config.transfer.target = 6
    return config

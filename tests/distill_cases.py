"""What tests/test_distill.py looks at of meshes, computed with 4 devices in a process of its own.

python tests/distill_cases.py OUT.json
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from configs import digits_dmd2
from linvideo_jax.models import wan
from linvideo_jax.models.module import shapes
from linvideo_jax.parallel import rules
from linvideo_jax.parallel.placement import Placement
from linvideo_jax.transfer import distill_training, training
from linvideo_jax.transfer.distill_training import Knobs, Recipe, Texts

BATCH, SHAPE, HEADS = 4, (3, 2, 6, 4), 4
TEACHER = wan.WanConfig(
    num_layers=2, num_attention_heads=HEADS, attention_head_dim=8, ffn_dim=48,
    in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
)  # fmt: skip
MESHES = ({}, {"fsdp": 2, "context": 2})


def trained(sizes, teacher, texts):
    """([loss and gradient norm of each step], whether the state lies by the table)."""
    single = not sizes
    placement = Placement.by_sizes(sizes, HEADS, devices=None if sizes else jax.devices()[:1])
    settings = digits_dmd2.get_config().distill
    settings.update(batch_size=BATCH, remat="none")
    student = training.student_config(TEACHER)
    recipe = Recipe.of(
        settings, student=student, teacher=TEACHER, fake=TEACHER,
        sigmas=(1.0, 0.9, 0.75, 0.5, 0.0), start_sampler="euler", start_sigmas=(1.0, 0.0),
        shape=SHAPE, dtype="float32", layout=placement.layout,
    )  # fmt: skip
    maps = {name: np.asarray(leaf) for name, leaf in wan.initial_feature_map(student).items()}
    attn1 = teacher["blocks"]["attn1"] | {"feature_map": maps}
    linear = teacher | {"blocks": teacher["blocks"] | {"attn1": attn1}}
    mode = np.array([wan.SOFTMAX, wan.LINEAR], np.int32)

    def make(student, fake):
        return distill_training.initial_state(recipe, student, fake, 1.0 - mode, mode)

    placed = placement.params(teacher)
    state = placement.make(make, placement.params(linear), placed)
    texts = placement.batch(texts, BATCH)
    knobs, found = Knobs(1e-3, 1e-3, 2.0, 3.0, True, 0.99, 0), []
    for step in range(2):
        arguments = (recipe, state, placed, texts, knobs, jax.random.key(step))
        # It runs all three networks; the fake score's update is a part of that to compile again.
        state, metrics = distill_training.update_generator(*arguments)
        found.append([float(metrics[name]) for name in ("generator_loss", "gradient_norm")])
    lies = single or all(
        jax.tree.leaves(
            jax.tree.map(
                lambda leaf, wanted: leaf.sharding == wanted,
                state,
                rules.shardings(state, placement.mesh),
            )
        )
    )
    return found, lies


def main(path: str) -> None:
    rng = np.random.default_rng(0)
    teacher = jax.tree.map(
        lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype),
        shapes(wan.WanTransformer, TEACHER),
    )
    lengths = np.array([2, 4, 3, 5], np.int32)
    text = rng.normal(size=(BATCH, 6, 16)) * (np.arange(6) < lengths[:, None])[..., None]
    texts = Texts(text.astype(np.float32), lengths, 0 * text.astype(np.float32), 0 * lengths + 1)
    out = [trained(sizes, teacher, texts) for sizes in MESHES]
    Path(path).write_text(json.dumps(out))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    main(sys.argv[1])

"""Floating-point operations of whole stages: an update of each objective, and the collection.

Counted as in `flops.py`, from sizes: XLA's own cost_analysis counts the body of a scan once and a
Pallas kernel as nothing.
"""

from dataclasses import dataclass
from typing import NamedTuple

from linvideo_jax.metrics import flops
from linvideo_jax.models.wan import TEXT_TOKENS, WanConfig
from linvideo_jax.transfer import distill_training
from linvideo_jax.transfer.recipe import Recipe, passes


@dataclass(frozen=True)
class Work:
    """FLOPs. recomputed: what the backward pass computes a second time to save memory."""

    forward: float = 0
    backward: float = 0
    recomputed: float = 0

    @property
    def model(self) -> float:
        """What MFU counts: forward and backward, without what is recomputed."""
        return self.forward + self.backward

    @property
    def total(self) -> float:
        """All that the chips compute."""
        return self.model + self.recomputed

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recomputed + other.recomputed,
        )

    def __rmul__(self, times: float) -> "Work":
        return Work(times * self.forward, times * self.backward, times * self.recomputed)


class Size(NamedTuple):
    """Of one video: tokens of its latents, and keys of cross-attention."""

    tokens: int
    text_tokens: int = TEXT_TOKENS


class Layers(NamedTuple):
    """How many layers compute softmax attention, linear attention, or both."""

    softmax: int
    linear: int
    mixed: int

    def forward(self, config: WanConfig, size: Size) -> Work:
        """One forward of one video."""
        return Work(
            flops.forward(
                config, size.tokens, range(self.linear), size.text_tokens, range(self.mixed)
            )
        )


def gradient(config: WanConfig, size: Size, layers: Layers, remat: str) -> Work:
    """One forward of one video and the gradient of all its weights.

    Each product has two gradients of its own cost. A fused softmax kernel makes its logits again.
    remat: of `Recipe.remat`.
    """
    forward = layers.forward(config, size).forward
    quadratic = (layers.softmax + layers.mixed) * flops.softmax_attention(config, size.tokens)
    logits = quadratic / 2
    again = 0
    if remat != "none":
        linear = layers.linear + layers.mixed
        again = quadratic + linear * flops.linear_attention(config, size.tokens)
        again += config.num_layers * flops.cross_attention(config, *size)
        if remat == "full":
            again += config.num_layers * flops.weight_products(config, *size)
    return Work(forward, 2 * forward, again + logits)


def update(recipe: Recipe, size: Size, layers: Layers, batch: int) -> Work:
    """One update of the student (`training.update`) on `batch` samples, on all chips together.

    The optimiser's own work, some operations a parameter, is not counted; nor Muon's, which does
    not grow with the batch (`muon`).
    """
    student, teacher = recipe.student, recipe.teacher
    run = layers.forward(student, size)
    train = gradient(student, size, layers, recipe.remat)
    other = Layers(teacher.num_layers, 0, 0)  # the teacher, and a score network
    ask = other.forward(teacher, size)
    counted = passes(recipe)
    sample = counted.student * run + counted.student_gradients * train
    sample += (counted.teacher + counted.score) * ask
    sample += counted.score_gradients * gradient(teacher, size, other, recipe.remat)
    if recipe.objective == "dmd":
        # Each step of the rollout is computed again before its gradient.
        sample += recipe.rollout_steps * Work(recomputed=run.forward)
    return batch * sample


def distillation(recipe: distill_training.Recipe, size: Size, layers: Layers) -> dict[str, Work]:
    """One update of stage distill by name, on all chips together; layers: of the student.

    "generator": the way to a random step, the student's gradient there, the fake score and both
    halves of the guided teacher. "fake score": the way, the student's sample, the fake score's
    gradient. "start": the guided teacher's sampling, and the student's gradient.
    """
    whole = Layers(recipe.teacher.num_layers, 0, 0)
    run, ask = layers.forward(recipe.student, size), whole.forward(recipe.teacher, size)
    told = whole.forward(recipe.fake, size)
    train = gradient(recipe.student, size, layers, recipe.remat)
    way = (len(recipe.sigmas) - 2) / 2 * run  # the mean over the steps
    critic = gradient(recipe.fake, size, whole, recipe.remat)
    samples = {
        "generator": way + train + told + 2 * ask,
        "fake score": way + run + critic,
        "start": 2 * (len(recipe.start_sigmas) - 1) * ask + train,
    }
    return {name: recipe.batch_size * work for name, work in samples.items()}


def warmup(recipe: Recipe, size: Size, batch: int) -> Work:
    """One update of the feature maps (`training.warmup`): the model's forward with both attentions
    in every layer, and the gradient of the linear one."""
    config = recipe.student
    forward = Layers(0, 0, config.num_layers).forward(config, size).forward
    linear = config.num_layers * flops.linear_attention(config, size.tokens)
    return batch * Work(forward, 2 * linear)


def collect(config: WanConfig, size: Size, num_videos: int, num_steps: int) -> Work:
    """The teacher's guided trajectories: two forwards a step."""
    return num_videos * num_steps * 2 * Layers(config.num_layers, 0, 0).forward(config, size)


def muon(config: WanConfig, iterations: int = 5) -> float:
    """Orthogonalisation of the blocks' matrices in one update: Newton and Schulz's three products
    an iteration."""

    def one(rows: int, columns: int) -> float:
        small, large = sorted((rows, columns))
        return iterations * (4 * small**2 * large + 2 * small**3)

    return config.num_layers * (
        8 * one(config.dim, config.dim) + 2 * one(config.dim, config.ffn_dim)
    )

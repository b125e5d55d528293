"""Stage transfer, for a plan: one program serves its warm-up, its mixed and its rounded layers."""

from dataclasses import replace
from functools import cached_property

from linvideo_jax import rehearsal
from linvideo_jax.metrics import step_flops
from linvideo_jax.metrics.step_flops import Layers, Work
from linvideo_jax.plan import memory
from linvideo_jax.plan.stage import Phase, Program, Stage
from linvideo_jax.transfer import training
from linvideo_jax.transfer.recipe import Recipe


class Transfer(Stage):
    """As `stages/transfer.py` runs it."""

    group = "transfer"

    def recipe(self, mesh, batch_size) -> Recipe:
        """UserError as `rehearsal.recipe`."""
        return replace(rehearsal.recipe(self.config, self.given, mesh), batch_size=batch_size)

    def programs(self, recipe, mesh):
        """`training.update`; the warm-up is less than that."""
        linear = self.settings.target / recipe.student.num_layers
        counted = {"mixed": (0, 0, 1), "rounded": (1 - linear, linear, 0)}
        arguments = rehearsal.arguments(self.config, recipe, self.given, mesh)
        return [Program(training.update, arguments, counted)]

    def held(self, programs):
        """Of the state, of the teacher, and of a batch."""
        state, teacher, batch, *_ = programs[0].arguments
        parts = {name: memory.held(tree) for name, tree in state.items()}
        return {
            "student's weights": parts.pop("params"),
            "optimiser": parts.pop("optimizer") + parts.pop("warmup"),
            "other state": sum(parts.values()),  # scores, average, what an objective keeps
            "teacher": memory.held(teacher),
            "batch": memory.held(batch),
        }

    def phases(self, recipe):
        """Warm-up, mixed layers until `round_at`, rounded layers."""
        settings, layers = self.settings, recipe.student.num_layers
        rounded = Layers(layers - settings.target, settings.target, 0)
        size, batch = self.given.size, recipe.batch_size
        by_scores = settings.selection == "selective"
        choose_at = settings.round_at if by_scores else settings.warmup_steps
        mixed = step_flops.update(recipe, size, Layers(0, 0, layers), batch)
        after = step_flops.update(recipe, size, rounded, batch)
        warmup = step_flops.warmup(recipe, size, batch)
        return (
            Phase("warm-up", settings.warmup_steps, warmup, "mixed"),  # which sends less than that
            Phase("mixed", choose_at - settings.warmup_steps, mixed, "mixed"),
            Phase("rounded", settings.num_steps - choose_at, after, "rounded"),
        )

    @cached_property
    def collection(self) -> Work:
        """What stage collect computes, without the text encoder (below a thousandth)."""
        given, count = self.given, self.config.collect.num_videos
        steps = given.sampling["num_inference_steps"]
        return step_flops.collect(given.models.transformer, given.size, count, steps)

    def estimate(self, recipe, mesh, held):
        """held: once, for the new state is written over the old one (donated). gradients: float32,
        shared as the weights are. copies: both networks in the dtype of the products."""
        student, size = recipe.student, self.given.size
        tokens = memory.tokens(mesh, recipe.batch_size // recipe.accumulate, size)
        copied = held["student's weights"] + held["teacher"]
        return {
            "held": sum(held.values()),
            "gradients": held["student's weights"],
            "copies": copied // 2 if recipe.dtype.itemsize == 2 else 0,
            "layers": memory.layers(mesh, student),
            "kept": memory.kept(student, tokens, recipe.remat),
            "working": memory.working(student, tokens, size.text_tokens),
        }

    def about(self, recipe):
        """With the target, and how the batch is divided."""
        parts = f"{recipe.accumulate} part{'s' * (recipe.accumulate > 1)}"
        return (
            f"{self.settings.target} of {recipe.student.num_layers} layers linear",
            f"update: {recipe.objective}, batch {recipe.batch_size} in {parts}, "
            f"{recipe.optimizer}, remat {recipe.remat}, products in {recipe.dtype}",
        )

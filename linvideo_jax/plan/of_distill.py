"""Stage distill, for a plan: the updates of the generator and of the fake score."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from linvideo_jax import rehearsal
from linvideo_jax.errors import UserError
from linvideo_jax.metrics import step_flops
from linvideo_jax.metrics.step_flops import Layers
from linvideo_jax.models import wan
from linvideo_jax.models.module import shapes
from linvideo_jax.parallel.layout import layout_of
from linvideo_jax.parallel.placement import exchange_of
from linvideo_jax.plan import memory
from linvideo_jax.plan.stage import Phase, Program, Stage
from linvideo_jax.stages import distill
from linvideo_jax.transfer import distill_training, training
from linvideo_jax.transfer.distill_training import Recipe, Texts


class Distill(Stage):
    """As `stages/distill.py` runs it, from a student with half of its layers linear.

    No checkpoint is read, which would say how many they are; without `require_selection` none is.
    """

    group = "distill"

    def recipe(self, mesh, batch_size) -> Recipe:
        """UserError as `stages.distill.check` and `layout_of`, and for one stage."""
        distill.check(self.config)
        teacher, settings = self.given.models.transformer, self.settings
        if settings.one_stage:
            raise UserError(
                "distill.one_stage is not planned: plan stage transfer and stage distill apart."
            )
        dense = not settings.require_selection
        student = teacher if dense else training.student_config(teacher)
        layout = layout_of(mesh, teacher.num_attention_heads, exchange_of(self.config))
        given = self.given
        made = distill.recipe_of(
            self.config, student, teacher, given.sampling, given.latent_shape, layout
        )
        return replace(made, batch_size=batch_size)

    @staticmethod
    def _linear(recipe) -> int:
        return 0 if recipe.student.feature_map is None else recipe.student.num_layers // 2

    def programs(self, recipe, mesh):
        """Of the generator, of the fake score, and of the start if there is one."""
        student, teacher = (
            shapes(wan.WanTransformer, one) for one in (recipe.student, recipe.teacher)
        )
        mode = jax.ShapeDtypeStruct((recipe.student.num_layers,), jnp.int32)
        r = jax.ShapeDtypeStruct(mode.shape, jnp.float32)
        begin = partial(distill_training.initial_state, recipe)
        state = jax.eval_shape(begin, student, teacher, r, mode)
        frozen = jax.eval_shape(lambda params: training.frozen(params, recipe.dtype), teacher)
        state, frozen = (rehearsal.by_table(tree, mesh) for tree in (state, frozen))
        tokens, dim = self.given.text_shape
        text = jax.ShapeDtypeStruct((recipe.batch_size, tokens, dim), recipe.dtype)
        lengths = jax.ShapeDtypeStruct((recipe.batch_size,), jnp.int32)
        texts = rehearsal.by_batch(Texts(text, lengths, text, lengths), mesh, recipe.batch_size)
        knobs = distill.knobs_at(self.config, 0, self.settings.guidance_scale, 1.0)
        rest = rehearsal.everywhere((knobs, jax.eval_shape(lambda: jax.random.key(0))), mesh)

        linear = self._linear(recipe) / recipe.student.num_layers
        shares, loops = (1 - linear, linear, 0), (len(recipe.sigmas) - 2) / 2
        generator = distill_training.update_generator, (state, frozen, texts, *rest), "generator"
        fake = distill_training.update_fake_score, (state, texts, *rest), "fake score"
        start = distill_training.update_start, (state, frozen, texts, *rest), "start"
        made = (generator, fake, *((start,) if self.settings.start_steps else ()))
        return [Program(update, given, {name: shares}, loops) for update, given, name in made]

    def held(self, programs):
        """Of both networks, of the generator's average, of the teacher, and of a batch's texts."""
        state, teacher, texts, *_ = programs[0].arguments
        parts = {name: memory.held(tree) for name, tree in state.items()}
        return {
            "generator's weights": parts["params"],
            "its optimiser": parts["optimizer"],
            "its average": parts["ema"],
            "fake score, its optimiser": parts["fake"],
            "teacher": memory.held(teacher),
            "texts": memory.held(texts),
        }

    def phases(self, recipe):
        """The generator at every `generator_every`-th step, the fake score at each."""
        settings, linear = self.settings, self._linear(recipe)
        layers = Layers(recipe.student.num_layers - linear, linear, 0)
        work = step_flops.distillation(recipe, self.given.size, layers)
        start = settings.start_steps
        phases = [Phase("start", start, work["start"], "start")] if start else []
        later = (settings.num_steps - start) // settings.generator_every
        return (
            *phases,
            Phase("generator", later, work["generator"], "generator"),
            Phase("fake score", settings.num_steps, work["fake score"], "fake score"),
        )

    def estimate(self, recipe, mesh, held):
        """In the generator's update. gradients: float32, shared as the weights are. copies: of the
        generator and of the fake score in the dtype of the products, half as wide."""
        config, size = recipe.student, self.given.size
        tokens = memory.tokens(mesh, recipe.batch_size // recipe.accumulate, size)
        return {
            "held": sum(held.values()),
            "gradients": held["generator's weights"],
            "copies": held["generator's weights"] if recipe.dtype.itemsize == 2 else 0,
            "layers": memory.layers(mesh, config),
            "kept": memory.kept(config, tokens, recipe.remat),
            "working": memory.working(config, tokens, size.text_tokens),
        }

    def about(self, recipe):
        """With what no checkpoint was asked for."""
        linear, every = self._linear(recipe), self.settings.generator_every
        return (
            f"{linear} of {recipe.student.num_layers} layers linear (assumed)",
            f"updates: DMD2 to {len(recipe.sigmas) - 1} steps, batch {recipe.batch_size} in "
            f"{recipe.accumulate} part{'s' * (recipe.accumulate > 1)}, adamw, "
            f"remat {recipe.remat}, products in {recipe.dtype}; the generator at one step of "
            f"{every}",
        )

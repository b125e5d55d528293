"""What to change where an update does not fit."""

from linvideo_jax.plan.chips import GIB
from linvideo_jax.plan.planned import Plan


def changes(plan: Plan) -> list[str]:
    """Flags that make the update fit, the nearest first; of a plan that does not."""
    settings, sizes, found = plan.stage.settings, plan.sizes, []
    field, kept = f"--config.{plan.stage.group}", plan.chosen.kept
    if kept > plan.limit:
        return [
            f"weights, optimiser and teacher alone take {kept / GIB:.1f} GiB of a chip: share them "
            f"between more chips, --config.mesh.fsdp={2 * sizes['fsdp']} or more"
        ]
    largest = plan.largest_batch
    if largest:
        parts = -(-settings.batch_size // largest) * settings.accumulate
        found.append(f"{field}.accumulate={_divisor(settings.batch_size, parts)}")
        found.append(f"{field}.batch_size={largest}")
    if settings.remat in ("none", "products"):
        found.append(f"{field}.remat=full")
    fsdp, batch = sizes["fsdp"], settings.batch_size
    if fsdp % 2 == batch % 2 == 0:
        found.append(
            f"--config.mesh.fsdp={fsdp // 2} --config.mesh.context={2 * sizes['context']} "
            f"{field}.batch_size={batch // 2} (half the samples, each on twice the chips)"
        )
    found.append(f"more chips, such as with --config.mesh.context={2 * sizes['context']}")
    return found


def _divisor(batch_size: int, least: int) -> int:
    return next(n for n in range(least, batch_size + 1) if batch_size % n == 0)

"""What to change where an update does not fit, or wastes what is there."""

from linvideo_jax.plan.chips import GIB
from linvideo_jax.plan.planned import Plan


def changes(plan: Plan) -> list[str]:
    """Flags that make the update fit, the nearest first; of a plan that does not."""
    transfer, sizes, found = plan.config.transfer, plan.sizes, []
    kept = plan.chosen.held.total
    if kept > plan.limit:
        return [
            f"weights, optimiser and teacher alone take {kept / GIB:.1f} GiB of a chip: share them "
            f"between more chips, --config.mesh.fsdp={2 * sizes['fsdp']} or more"
        ]
    largest = plan.largest_batch
    if largest:
        parts = -(-transfer.batch_size // largest) * transfer.accumulate
        found.append(f"--config.transfer.accumulate={_divisor(transfer.batch_size, parts)}")
        found.append(f"--config.transfer.batch_size={largest}")
    if transfer.remat in ("none", "products"):
        found.append("--config.transfer.remat=full")
    if sizes["data"] > 1:
        name = (
            "context"
            if plan.recipe.student.num_attention_heads % (2 * sizes["context"]) == 0
            else "fsdp"
        )
        found.append(f"--config.mesh.{name}={2 * sizes[name]}")
    found.append(
        f"more chips, with --config.mesh.context={2 * sizes['context']} or "
        f"--config.mesh.fsdp={2 * sizes['fsdp']}"
    )
    return found


def _divisor(batch_size: int, least: int) -> int:
    return next(n for n in range(least, batch_size + 1) if batch_size % n == 0)

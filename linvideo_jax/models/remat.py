"""What the backward pass keeps of every layer, by name, and what it computes anew."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

# none: everything is kept. products: the products with weights alone. full: the layers' inputs
# alone. offload: these too, in the host's memory, which `available` may refuse.
POLICIES = ("none", "products", "full", "offload")
_INPUT = "layer_input"
_HOST = "pinned_host"


def available(name: str) -> bool:
    """Whether this backend can do it: offload takes a host memory that the device reads."""
    if name != "offload":
        return name in POLICIES
    device = jax.devices()[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    return device.platform != "cpu" and _HOST in kinds


def rematerialised(layer: Callable, name: str) -> Callable:
    """The body `layer(x, inputs)` of a scan over layers, differentiated as the policy says.

    Raises: ValueError for an unknown name.
    """
    if name not in POLICIES:
        raise ValueError(f"remat is {name!r}: one of {', '.join(POLICIES)}")
    if name == "none":
        return layer
    policies = jax.checkpoint_policies
    policy = {
        "products": policies.dots_with_no_batch_dims_saveable,
        "full": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_INPUT],
            offload_src="device",
            offload_dst=_HOST,
        ),
    }[name]

    def named(x, inputs):
        return layer(checkpoint_name(x, _INPUT), inputs)

    return jax.checkpoint(named if name == "offload" else layer, policy=policy, prevent_cse=False)

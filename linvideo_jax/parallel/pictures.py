"""How videos lie on the mesh while the VAE works on them: by video, then by parts of the picture.

The partitioner gives every convolution the rows and columns of its neighbours that it looks at
(halo exchange), so that the result is that of one device, and no device holds a whole video.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float


def sharding(mesh: Mesh, videos: int, height: int, width: int) -> NamedSharding:
    """Of `[videos, frames, height, width, channels]`: latents, and pixels in the same parts.

    All devices of the mesh share the videos as far as these divide; of each video they share rows
    and columns, in parts of one size with the shortest edges. Devices left over repeat the work.
    """
    devices = np.reshape(mesh.devices, parts(mesh.size, videos, height, width))
    axes = ("videos", "rows", "columns", "same")
    own = Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))
    return NamedSharding(own, PartitionSpec("videos", None, "rows", "columns"))


def placed(
    latents: Float[Array, "videos frames height width channels"], params: Any, mesh: Mesh
) -> tuple[Float[Array, "videos frames height width channels"], Any]:
    """The latents by parts (`sharding`), and the VAE's parameters whole on every device."""
    videos, _, height, width, _ = latents.shape
    by_parts = sharding(mesh, videos, height, width)
    everywhere = NamedSharding(by_parts.mesh, PartitionSpec())
    return jax.device_put(latents, by_parts), jax.device_put(params, everywhere)


def parts(num_devices: int, videos: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(parts by video, of rows, of columns, devices with the same part); their product is all."""
    by_video = math.gcd(num_devices, videos)
    left = num_devices // by_video
    rows, columns = min(
        _divisors(left, height, width),
        key=lambda cut: (-cut[0] * cut[1], cut[0] * width + cut[1] * height),
    )
    return by_video, rows, columns, left // (rows * columns)


def _divisors(devices: int, height: int, width: int) -> Iterator[tuple[int, int]]:
    for rows in range(1, devices + 1):
        for columns in range(1, devices // rows + 1):
            if devices % (rows * columns) == 0 and height % rows == 0 and width % columns == 0:
                yield rows, columns

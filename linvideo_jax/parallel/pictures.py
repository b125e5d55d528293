"""How videos lie on the mesh while the VAE works on them: by video, then by parts of the picture.

The partitioner gives every convolution the rows and columns of its neighbours that it looks at
(halo exchange), so that the result is that of one device, and no device holds a whole video.
"""

import math
from collections.abc import Iterator

import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def sharding(mesh: Mesh, videos: int, height: int, width: int) -> NamedSharding:
    """Of `[videos, frames, height, width, channels]`: latents, and pixels in the same parts.

    All devices of the mesh share the videos as far as these divide; of each video they share rows
    and columns, in parts of one size with the shortest edges. Devices left over repeat the work.
    """
    by_video = math.gcd(mesh.size, videos)
    left = mesh.size // by_video
    rows, columns = min(
        _divisors(left, height, width),
        key=lambda parts: (-parts[0] * parts[1], parts[0] * width + parts[1] * height),
    )
    devices = np.reshape(mesh.devices, (by_video, rows, columns, left // (rows * columns)))
    axes = ("videos", "rows", "columns", "same")
    own = Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))
    return NamedSharding(own, PartitionSpec("videos", None, "rows", "columns"))


def _divisors(devices: int, height: int, width: int) -> Iterator[tuple[int, int]]:
    for rows in range(1, devices + 1):
        for columns in range(1, devices // rows + 1):
            if devices % (rows * columns) == 0 and height % rows == 0 and width % columns == 0:
                yield rows, columns

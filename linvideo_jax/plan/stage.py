"""What a plan asks of a stage: the programs to compile, and how often a run runs them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from jax.sharding import AbstractMesh, Mesh

from linvideo_jax import rehearsal
from linvideo_jax.metrics.step_flops import Work
from linvideo_jax.rehearsal import Problem

# How often a layer is softmax, linear and mixed, in the order of `wan`.
Shares = tuple[float, float, float]


class Program(NamedTuple):
    """A jitted update and its arguments, as ShapeDtypeStructs behind the recipe.

    counted: by name, the layers with which its communication is counted. loops: how often a loop of
    unknown length runs, on the mean.
    """

    update: Any
    arguments: tuple[Any, ...]
    counted: dict[str, Shares]
    loops: float = 1.0


class Phase(NamedTuple):
    """So many updates of a run that are alike; work: of one, on all chips; sent: of `counted`."""

    name: str
    count: int
    work: Work
    sent: str


class Stage(ABC):
    """A stage of a configuration; UserError if the model is unknown.

    group: of the configuration. held: bytes of one chip by name, of what lives from update to
    update. collection: what its pairs take to make, None if it has none.
    """

    group: ClassVar[str]
    collection: Work | None = None

    def __init__(self, config):
        self.given: Problem = rehearsal.problem(config)
        self.config, self.settings = config, config[self.group]

    @abstractmethod
    def recipe(self, mesh: Mesh | AbstractMesh, batch_size: int) -> Any:
        """What the updates are compiled for; UserError for settings that cannot be."""

    @abstractmethod
    def programs(self, recipe: Any, mesh: Mesh) -> list[Program]:
        """Those that decide what a run takes; the first has everything that is held."""

    @abstractmethod
    def held(self, programs: list[Program]) -> dict[str, int]:
        """Bytes of one chip by name."""

    @abstractmethod
    def phases(self, recipe: Any) -> tuple[Phase, ...]:
        """The updates of a run."""

    @abstractmethod
    def estimate(
        self, recipe: Any, mesh: Mesh | AbstractMesh, held: Mapping[str, int]
    ) -> dict[str, int]:
        """Bytes of one chip at the busiest moment by name, by a formula from shapes."""

    @abstractmethod
    def about(self, recipe: Any) -> tuple[str, str]:
        """(which layers are linear, what an update is), for the head of the page."""

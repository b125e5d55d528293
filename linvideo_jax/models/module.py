"""Modules as pure functions of their parameters: a nested dict in, a bound NNX module out."""

from typing import Any, Protocol, TypeVar

from flax import nnx

Params = dict[str, Any]


class Configured(Protocol):
    """A module class that is built from one configuration object."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs): ...


M = TypeVar("M", bound=Configured)


def init(cls: type[M], config: Any, seed: int = 0) -> Params:
    """Random parameters of `cls(config)`, a pure nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(cls(config, rngs=nnx.Rngs(seed))))


def shapes(cls: type[M], config: Any) -> Params:
    """The same tree as `init`, of ShapeDtypeStructs: nothing is computed."""
    module = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(module))


def bind(cls: type[M], config: Any, params: Params) -> M:
    """`cls(config)` holding `params`; cheap enough to call inside a traced function."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, params)

"""Choice of an implementation: the first of a list that supports the inputs serves."""

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")

_log = logging.getLogger(__name__)
_logged = set()

_target = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """What is traced inside is for platform `name` ("cpu", "gpu" or "tpu"), not for this machine.

    For compilation ahead of time. A function that jit has traced before keeps what it chose.
    """
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


def platform() -> str:
    """Platform to choose implementations for: JAX's default, or `compiling_for`'s."""
    return _target.get() or jax.default_backend()


def dispatch(
    implementations: Mapping[str, Callable[..., T]],
    names: str | Sequence[str] | None,
    *args: Any,
    **kwargs: Any,
) -> T:
    """Calls the first implementation in `names` that accepts the inputs.

    `names`: one name, several in order of preference, or None for all in the mapping's order.
    An implementation refuses by raising NotImplementedError with the reason. Which one serves,
    and why not those before it, is logged the first time (level INFO).

    Raises: ValueError for an unknown name; NotImplementedError with every reason if all refuse.
    """
    if names is None:
        names = tuple(implementations)
    elif isinstance(names, str):
        names = (names,)
    refusals = []
    for name in names:
        if name not in implementations:
            raise ValueError(f"no implementation {name!r}; there are {sorted(implementations)}")
        function = implementations[name]
        try:
            result = function(*args, **kwargs)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
        else:
            _log_once(f"{function.__name__}: {name} serves", refusals)
            return result
    raise NotImplementedError("; ".join(refusals))


def _log_once(choice: str, refusals: Sequence[str]) -> None:
    text = f"{choice} ({'; '.join(refusals)})" if refusals else choice
    if text not in _logged:
        _logged.add(text)
        _log.info(text)


def einsum_float32(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Einsum of operands of one dtype, accumulated and returned in float32."""
    if platform() == "cpu":
        # The CPU back end lacks bf16 x bf16 -> f32; the products are exact in float32 anyway.
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)

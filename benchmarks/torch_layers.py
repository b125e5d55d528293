"""The same layers in PyTorch, for kernels_gpu.py: what a PyTorch user would run."""

import functools
from collections.abc import Callable
from typing import Any


def compiled_layer(tokens: int, heads: int, head_dim: int, direction: str) -> Callable[[], float]:
    """Hedgehog linear attention as a few lines of PyTorch, by torch.compile."""
    torch = _torch()

    def features(x, weight):
        z = torch.einsum("bthd,hdf->bthf", x, weight).float()
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], dim=-1).to(x.dtype)

    def layer(q, k, v, w_q, w_k):
        phi_q, phi_k = features(q, w_q), features(k, w_k)
        kv = torch.einsum("bthf,bthd->bhfd", phi_k, v)
        mass = phi_k.float().sum(dim=1)
        numerator = torch.einsum("bthf,bhfd->bthd", phi_q, kv)
        denominator = torch.einsum("bthf,bhf->bth", phi_q.float(), mass) + 1e-12
        return (numerator / denominator[..., None]).to(q.dtype)

    weights = [_random(heads, head_dim, head_dim // 2) / head_dim**0.5 for _ in range(2)]
    tensors = [*(_random(1, tokens, heads, head_dim) for _ in range(3)), *weights]
    return _sampler(torch.compile(layer), tensors, direction)


def chunk_linear_attn(
    tokens: int, heads: int, head_dim: int, direction: str
) -> Callable[[], float]:
    """flash-linear-attention's chunk kernel on given features: causal, so not the same function."""
    from fla.ops.linear_attn import chunk_linear_attn as kernel

    tensors = [_random(1, tokens, heads, head_dim).abs() for _ in range(2)]
    tensors.append(_random(1, tokens, heads, head_dim))
    return _sampler(lambda q, k, v: kernel(q, k, v, normalize=True)[0], tensors, direction)


def sparse_linear_attention(
    tokens: int, heads: int, head_dim: int, direction: str
) -> Callable[[], float]:
    """SLA's layer, its sparse branch (a tenth of the blocks) and its linear one together."""
    from sparse_linear_attention import SparseLinearAttention

    module = SparseLinearAttention(head_dim=head_dim, topk=0.1, feature_map="softmax").cuda()
    tensors = [_random(1, heads, tokens, head_dim) for _ in range(3)]
    return _sampler(module, tensors, direction)


LAYERS = {
    "linear, PyTorch compiled": compiled_layer,
    "linear, causal, flash-linear-attention": chunk_linear_attn,
    "sparse and linear, SLA": sparse_linear_attention,
}


@functools.cache
def _torch() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise NotImplementedError("needs a GPU that PyTorch sees")
    return torch


def _random(*shape: int) -> Any:
    torch = _torch()
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _sampler(function: Callable[..., Any], tensors: Any, direction: str) -> Callable[[], float]:
    """Seconds of a call, by the device's events."""
    torch = _torch()
    backward = direction != "forward"
    for tensor in tensors:
        tensor.requires_grad_(backward)

    def call():
        out = function(*tensors)
        if backward:
            torch.autograd.grad(out, tensors, grad_outputs=cotangent)
        return out

    with torch.no_grad():
        cotangent = torch.randn_like(function(*tensors))

    def sample(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        with torch.set_grad_enabled(backward):
            for _ in range(calls):
                call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    sample(3)
    calls = max(1, min(200, round(0.02 / max(1e-6, sample(3)))))
    return lambda: sample(calls)

"""Runs the linear layers of a LinVideo student in diffusers: needs PyTorch and safetensors alone.

    from diffusers import WanPipeline
    from linvideo_processor import use_linear_layers

    pipeline = WanPipeline.from_pretrained(FOLDER)
    use_linear_layers(pipeline.transformer, FOLDER + "/linvideo.safetensors")

Self-attention of the layers that the file names becomes Hedgehog linear attention,
phi(q) (sum_k phi(k) v) / (phi(q) sum_k phi(k)) with phi(x) = [softmax(x W), softmax(-x W)];
all other layers stay as they are.
"""

import torch
from safetensors.torch import load_file


def use_linear_layers(transformer: torch.nn.Module, path: str) -> list[int]:
    """Gives the linear layers of a WanTransformer3DModel their processor; returns their numbers."""
    tensors = load_file(path)
    layers = sorted({int(key.split(".")[1]) for key in tensors})
    for layer in layers:
        attention = transformer.blocks[layer].attn1
        device = attention.to_q.weight.device
        maps = (tensors[f"blocks.{layer}.attn1.feature_map.{name}"].to(device) for name in "qk")
        attention.set_processor(LinearAttentionProcessor(*maps))
    return layers


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [batch, tokens, heads, head_dim] by diffusers' tables."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class LinearAttentionProcessor:
    """An attention processor of diffusers' WanAttention; maps are [heads, head_dim, features]."""

    def __init__(self, map_q: torch.Tensor, map_k: torch.Tensor):
        self.map_q, self.map_k = map_q, map_k

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        rotary_emb=None,
    ):
        """See diffusers' WanAttnProcessor; for self-attention without a mask."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("linear layers take neither other keys nor a mask")
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        q, k = self.features(q.type_as(v), self.map_q), self.features(k.type_as(v), self.map_k)
        state = torch.einsum("bkhf,bkhd->bhfd", k, v.float())
        mass = k.sum(dim=1)
        mixed = torch.einsum("bqhf,bhfd->bqhd", q, state)
        weight = torch.einsum("bqhf,bhf->bqh", q, mass).unsqueeze(-1)
        out = (mixed / (weight + 1e-12)).flatten(2).type_as(hidden_states)
        return attn.to_out[1](attn.to_out[0](out))

    @staticmethod
    def features(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Hedgehog's features in float32."""
        y = torch.einsum("bthd,hdf->bthf", x.float(), weight.to(x.device).float())
        return torch.cat([y.softmax(dim=-1), (-y).softmax(dim=-1)], dim=-1)

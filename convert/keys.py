"""Names of parameters in PyTorch's checkpoints and ours: one table per part, read both ways.

A rule is (torch key, our flat name, transform). `{x}` stands for one component of a name, or a part
of one, `{x*}` for several; what it matched in one name is put into the other. The first rule that
fits counts. The torch names are those of diffusers' WanTransformer3DModel and AutoencoderKLWan and
of transformers' UMT5EncoderModel.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Transform(NamedTuple):
    """An array's layout in PyTorch to ours, and back; each undoes the other."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(np.transpose, np.transpose)  # [out, in] <-> [in, out]
CONV = Transform(  # [out, in, *spatial] <-> [*spatial, in, out]
    lambda x: np.transpose(x, (*range(2, x.ndim), 1, 0)),
    lambda x: np.transpose(x, (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2))),
)
GAMMA_IMAGE = Transform(np.ravel, lambda x: x.reshape(-1, 1, 1))
GAMMA_VIDEO = Transform(np.ravel, lambda x: x.reshape(-1, 1, 1, 1))

Table = tuple[tuple[str, str, Transform], ...]

# A patch is ordered (channel, time, height, width) in PyTorch's patch_embedding, but (time, height,
# width, channel), as here, in its proj_out: hence CONV for the one and LINEAR for the other.
TRANSFORMER: Table = (
    ("patch_embedding.weight", "patch_embedding.kernel", CONV),
    ("blocks.{i}.attn1.feature_map.{x}", "blocks.{i}.attn1.feature_map.{x}", SAME),
    ("blocks.{i}.{attn}.to_out.0.weight", "blocks.{i}.{attn}.to_out.kernel", LINEAR),
    ("blocks.{i}.{attn}.to_out.0.bias", "blocks.{i}.{attn}.to_out.bias", SAME),
    ("blocks.{i}.{attn}.norm_{x}.weight", "blocks.{i}.{attn}.norm_{x}.scale", SAME),
    ("blocks.{i}.norm2.weight", "blocks.{i}.norm2.scale", SAME),
    ("blocks.{i}.ffn.net.0.proj.weight", "blocks.{i}.ffn.linear_1.kernel", LINEAR),
    ("blocks.{i}.ffn.net.0.proj.bias", "blocks.{i}.ffn.linear_1.bias", SAME),
    ("blocks.{i}.ffn.net.2.weight", "blocks.{i}.ffn.linear_2.kernel", LINEAR),
    ("blocks.{i}.ffn.net.2.bias", "blocks.{i}.ffn.linear_2.bias", SAME),
    ("{x*}.weight", "{x*}.kernel", LINEAR),
    ("{x*}", "{x*}", SAME),
)

VAE: Table = (
    ("{x*}.attentions.{i}.norm.gamma", "{x*}.attentions.{i}.norm.scale", GAMMA_IMAGE),
    ("{x*}.gamma", "{x*}.scale", GAMMA_VIDEO),
    ("{x*}.weight", "{x*}.kernel", CONV),
    ("{x*}.bias", "{x*}.bias", SAME),
)

TEXT_ENCODER: Table = (
    ("shared.weight", "shared.embedding", SAME),
    (
        "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight",
        "blocks.{i}.attention.relative_attention_bias.embedding",
        SAME,
    ),
    (
        "encoder.block.{i}.layer.0.SelfAttention.{x}.weight",
        "blocks.{i}.attention.{x}.kernel",
        LINEAR,
    ),
    ("encoder.block.{i}.layer.0.layer_norm.weight", "blocks.{i}.attention_norm.scale", SAME),
    ("encoder.block.{i}.layer.1.DenseReluDense.{x}.weight", "blocks.{i}.ffn.{x}.kernel", LINEAR),
    ("encoder.block.{i}.layer.1.layer_norm.weight", "blocks.{i}.ffn_norm.scale", SAME),
    ("encoder.final_layer_norm.weight", "final_layer_norm.scale", SAME),
)

TABLES = {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": TEXT_ENCODER}

# A second name under which a file may hold the same array: transformers ties the two embeddings.
ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}


class Entry(NamedTuple):
    """Where a torch tensor belongs: our flat name, the layout change, and its shape in PyTorch."""

    ours: str
    transform: Transform
    shape: tuple[int, ...]


def compile_template(template: str) -> re.Pattern:
    """What matches a template, with its placeholders as named groups."""
    pieces = re.split(r"\{(\w+)(\*?)\}", template)
    pattern = re.escape(pieces[0])
    for name, several, literal in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        pattern += f"(?P<{name}>{'.+' if several else '[^.]+'}){re.escape(literal)}"
    return re.compile(pattern)


_RULES = {
    part: [
        (compile_template(ours), torch.replace("*}", "}"), transform)
        for torch, ours, transform in rows
    ]
    for part, rows in TABLES.items()
}


def torch_entries(part: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Entry]:
    """Torch key to `Entry` of each of our parameters, `shapes` by flat name."""
    entries = {}
    for ours, shape in shapes.items():
        for pattern, torch, transform in _RULES[part]:
            if match := pattern.fullmatch(ours):
                # Zero strides: a shape to transform without its memory.
                layout = transform.to_torch(np.broadcast_to(np.float32(0), shape))
                key = torch.format(**match.groupdict())
                entries[key] = Entry(ours, transform, layout.shape)
                break
        else:
            raise KeyError(f"No rule of {part} names our parameter {ours}.")
    return entries

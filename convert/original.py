"""The names of the original Wan2.1 repository, and of diffusers and transformers for the same.

Rules as in `keys`: the first that fits counts. Source: diffusers' convert_wan_to_diffusers.py.
"""

from collections.abc import Iterable
from functools import cache

from convert.keys import compile_template

Names = tuple[tuple[str, str], ...]


def _attention(original: str, diffusers: str) -> Names:
    here, there = f"blocks.{{i}}.{original}", f"blocks.{{i}}.{diffusers}"
    return (
        (f"{here}.o.{{x}}", f"{there}.to_out.0.{{x}}"),
        (f"{here}.norm_{{n}}.weight", f"{there}.norm_{{n}}.weight"),
        (f"{here}.{{n}}.{{x}}", f"{there}.to_{{n}}.{{x}}"),
    )


TRANSFORMER: Names = (
    ("patch_embedding.{x}", "patch_embedding.{x}"),
    ("text_embedding.0.{x}", "condition_embedder.text_embedder.linear_1.{x}"),
    ("text_embedding.2.{x}", "condition_embedder.text_embedder.linear_2.{x}"),
    ("time_embedding.0.{x}", "condition_embedder.time_embedder.linear_1.{x}"),
    ("time_embedding.2.{x}", "condition_embedder.time_embedder.linear_2.{x}"),
    ("time_projection.1.{x}", "condition_embedder.time_proj.{x}"),
    ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
    *_attention("self_attn", "attn1"),
    *_attention("cross_attn", "attn2"),
    ("blocks.{i}.norm3.{x}", "blocks.{i}.norm2.{x}"),
    ("blocks.{i}.ffn.0.{x}", "blocks.{i}.ffn.net.0.proj.{x}"),
    ("blocks.{i}.ffn.2.{x}", "blocks.{i}.ffn.net.2.{x}"),
    ("head.head.{x}", "proj_out.{x}"),
    ("head.modulation", "scale_shift_table"),
)

TEXT_ENCODER: Names = (
    ("token_embedding.weight", "shared.weight"),
    ("blocks.{i}.norm1.weight", "encoder.block.{i}.layer.0.layer_norm.weight"),
    ("blocks.{i}.norm2.weight", "encoder.block.{i}.layer.1.layer_norm.weight"),
    (
        "blocks.{i}.pos_embedding.embedding.weight",
        "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    ("blocks.{i}.attn.{x}.weight", "encoder.block.{i}.layer.0.SelfAttention.{x}.weight"),
    ("blocks.{i}.ffn.gate.0.weight", "encoder.block.{i}.layer.1.DenseReluDense.wi_0.weight"),
    ("blocks.{i}.ffn.fc1.weight", "encoder.block.{i}.layer.1.DenseReluDense.wi_1.weight"),
    ("blocks.{i}.ffn.fc2.weight", "encoder.block.{i}.layer.1.DenseReluDense.wo.weight"),
    ("norm.weight", "encoder.final_layer_norm.weight"),
)

# Position in a residual block's nn.Sequential to diffusers' name.
_RESIDUAL = {0: "norm1", 2: "conv1", 3: "norm2", 6: "conv2"}


def _residual(original: str, diffusers: str) -> Names:
    return (
        *(
            (f"{original}.residual.{position}.{{x}}", f"{diffusers}.{name}.{{x}}")
            for position, name in _RESIDUAL.items()
        ),
        (f"{original}.shortcut.{{x}}", f"{diffusers}.conv_shortcut.{{x}}"),
    )


@cache
def vae_names(num_res_blocks: int, levels: int = 4) -> Names:
    """The VAE's; the original numbers all blocks of the decoder in one row."""
    up: Names = ()
    for index in range(levels * (num_res_blocks + 2) - 1):
        level, block = divmod(index, num_res_blocks + 2)
        original, diffusers = f"decoder.upsamples.{index}", f"decoder.up_blocks.{level}"
        if block <= num_res_blocks:
            up += _residual(original, f"{diffusers}.resnets.{block}")
        else:
            up += ((f"{original}.{{x*}}", f"{diffusers}.upsamplers.0.{{x*}}"),)
    both: Names = ()
    for side in ("encoder", "decoder"):
        both += (
            (f"{side}.conv1.{{x}}", f"{side}.conv_in.{{x}}"),
            *_residual(f"{side}.middle.0", f"{side}.mid_block.resnets.0"),
            (f"{side}.middle.1.{{x*}}", f"{side}.mid_block.attentions.0.{{x*}}"),
            *_residual(f"{side}.middle.2", f"{side}.mid_block.resnets.1"),
            (f"{side}.head.0.gamma", f"{side}.norm_out.gamma"),
            (f"{side}.head.2.{{x}}", f"{side}.conv_out.{{x}}"),
        )
    return (
        ("conv1.{x}", "quant_conv.{x}"),
        ("conv2.{x}", "post_quant_conv.{x}"),
        *both,
        *_residual("encoder.downsamples.{i}", "encoder.down_blocks.{i}"),
        ("encoder.downsamples.{i}.{x*}", "encoder.down_blocks.{i}.{x*}"),
        *up,
    )


def names(part: str, num_res_blocks: int = 2) -> Names:
    """The rules of a part; `num_res_blocks` is the VAE's."""
    tables = {"transformer": TRANSFORMER, "text_encoder": TEXT_ENCODER}
    return vae_names(num_res_blocks) if part == "vae" else tables[part]


@cache
def _compiled(rules: Names, to_original: bool) -> list:
    pairs = [(there, here) if to_original else (here, there) for here, there in rules]
    return [(compile_template(a), b.replace("*}", "}")) for a, b in pairs]


def rename(rules: Names, keys: Iterable[str], *, to_original: bool) -> dict[str, str]:
    """Each key that a rule fits, and its other name."""
    renamed = {}
    for key in keys:
        for pattern, template in _compiled(rules, to_original):
            if match := pattern.fullmatch(key):
                renamed[key] = template.format(**match.groupdict())
                break
    return renamed

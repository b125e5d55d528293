"""README.md of an exported model: what it is, how it was made, and how it runs in PyTorch."""

from collections.abc import Mapping
from typing import Any

LICENCE = "apache-2.0"


def text(config: Mapping[str, Any], manifest: Mapping[str, Any], layout: str) -> str:
    """The card as Markdown.

    config, manifest: of the checkpoint; from the manifest come `source`, and `training` and
    `metrics` (objects) if whoever made the checkpoint wrote them there.
    """
    layers, sizes = config["linear_layers"], config.get("transformer", {})
    count = sizes.get("num_layers", "?")
    lines = [
        "---",
        f"license: {LICENCE}",
        "pipeline_tag: text-to-video",
        f"library_name: {'diffusers' if layout != 'original' else 'wan'}",
        "---",
        "",
        f"# {'Linearised ' if layers else ''}Wan2.1 text-to-video",
        "",
        f"{len(layers)} of the {count} self-attention layers are linear (Hedgehog feature maps)"
        + (f": {', '.join(map(str, layers))}, counted from 0." if layers else "; all are softmax."),
        f"Written by linvideo_jax {manifest.get('linvideo_jax', '')}".rstrip() + ".",
        "",
        "## How it was made",
        "",
        f"Weights from: {manifest.get('source') or 'not recorded'}.",
        *_rows(manifest.get("training")),
        "",
        "## Metrics",
        "",
        *(_rows(manifest.get("metrics")) or ["None are recorded with this checkpoint."]),
        "",
        "## Sampling",
        "",
        *(
            f"- {key}: {config[key]}"
            for key in ("sampler", "num_inference_steps", "guidance_scale", "flow_shift")
        ),
        *_few_steps(config.get("denoising_steps"), layout),
        "",
    ]
    if layers:
        lines += [
            "## In PyTorch",
            "",
            "diffusers loads this model without further code, but then runs every layer with",
            "softmax attention. `linvideo_processor.py` computes the linear layers:",
            "",
            "```python",
            "from diffusers import WanTransformer3DModel",
            "from linvideo_processor import use_linear_layers",
            "",
            'transformer = WanTransformer3DModel.from_pretrained(".", subfolder="transformer")',
            'use_linear_layers(transformer, "linvideo.safetensors")',
            "```",
            "",
        ]
    lines += [
        "## Licence",
        "",
        "Wan2.1 is under Apache-2.0, and so are weights that are made from it; the licences of",
        "the prompts and videos that it was trained on are their own.",
    ]
    return "\n".join(lines) + "\n"


def _few_steps(steps: Any, layout: str) -> list[str]:
    if not steps:
        return []
    in_diffusers = (
        f": diffusers takes them with `num_inference_steps={len(steps)}, guidance_scale=1` and the "
        "scheduler that lies here"
    )
    listed = ", ".join(f"{step:g}" for step in steps)
    return [
        f"- denoising_steps: {listed}, timesteps before the shift",
        "",
        f"Distilled to these steps (DMD2){in_diffusers if layout == 'diffusers' else ''}.",
    ]


def _rows(values: Any) -> list[str]:
    if not isinstance(values, Mapping):
        return []
    return [f"- {key}: {value}" for key, value in values.items()]

"""A model card as the hub reads it: an adapter's provenance in; Markdown with YAML front matter out.

It says how to load the adapter, what it was made from, and what is not known about it, and names no site and no photo.
Errors: EXPORT-06 when nobody says under which licence the adapter goes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app import text
from app.config import RunConfig
from app.errors import AdapterError

# an adapter inherits its base model's
LICENCES = {"mini": "apache-2.0", "stable-diffusion-v1-5": "creativeml-openrail-m"}
TAGS = (
    "text-to-image",
    "diffusers",
    "lora",
    "template:sd-lora",
    "stable-diffusion",
    "federated-learning",
    "flower",
    "bouquet",
)


def licence(config: RunConfig, asked: str | None) -> str:
    if not (known := asked or LICENCES.get(config.base_model)):
        fix = f"look at the base model's licence and name it: --licence NAME, as in {', '.join(LICENCES.values())}"
        raise AdapterError("EXPORT-06", found=f"base model {config.base_model}", fix=fix)
    return known


def card(
    repo: str,
    config: RunConfig,
    provenance: dict[str, Any],
    pictures: Sequence[tuple[str, str]],
    under: str,
    base_id: str,
) -> str:
    """`pictures` are (prompt, path in the repository); the first prompt is the instance prompt. `base_id`: or ''."""
    from huggingface_hub import ModelCard, ModelCardData

    prompt = pictures[0][0] if pictures else ""
    data = ModelCardData(
        base_model=base_id or None,
        base_model_relation="adapter" if base_id else None,
        license=under,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=list(TAGS),
        instance_prompt=prompt or None,
        widget=[{"text": words, "output": {"url": path}} for words, path in pictures] or None,
    )
    body = BODY.format(
        name=repo.rsplit("/", 1)[-1],
        picture=(
            "![Without and with the adapter, same prompts and seeds](images/before-after.png)\n\n" if pictures else ""
        ),
        repo=repo,
        base=base_id or config.base_model,
        load=base_id or f"models/{config.base_model}",
        prompt=prompt,
        side=config.resolution,
        guidance=f"{config.sample_guidance:g}",
        table=table(config, provenance, len(provenance.get("sites", {}))),
        under=under,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def table(config: RunConfig, provenance: dict[str, Any], sites: int) -> str:
    known = provenance.get("versions", {})
    rows = {
        "sites": sites or "not recorded",
        "training images": images(provenance),
        "rounds × local steps × batch": (
            f"{provenance.get('rounds', config.rounds)} × {config.local_steps} × {config.batch_size}"
        ),
        "LoRA": f"rank {config.lora_rank}, alpha {config.lora_rank}, {config.lora_targets} of the UNet",
        "picture size": f"{config.resolution} × {config.resolution}",
        "learning rate, seed": f"{config.learning_rate:g}, {config.seed}",
        "base model's SHA-256": f"`{provenance.get('base', {}).get('fingerprint', 'not recorded')}`",
        "adapter's SHA-256": f"`{provenance.get('adapter_sha256', 'not recorded')}`",
        "made": f"{provenance.get('made', 'not recorded')}, run {provenance.get('run', 'not recorded')}",
        "versions": ", ".join(f"{name} {version}" for name, version in known.items()) or "not recorded",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {cell(value)} |" for name, value in rows.items())])


def images(provenance: dict[str, Any]) -> str:
    """As the sites say; and how many counted, where the hub believed fewer."""
    said = provenance.get("images", "not recorded")
    counted = [site["counted"] for site in provenance.get("sites", {}).values() if "counted" in site]
    if not counted or sum(counted) == said:
        return str(said)
    return f"{said} by the sites' word, {sum(counted)} of them counted in the mean"


def cell(value: Any) -> str:
    """A value in a table of Markdown: one line, no bar, no tag."""
    return text.line(value).replace("|", "\\|").replace("<", "&lt;")


BODY = """# {name}

A LoRA adapter of `{base}`, trained by several sites together with Bouquet (federated learning on Flower). Each site
trained on its own photos; the photos did not leave the sites, and a hub averaged the adapters.

{picture}## Load it

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{load}", safety_checker=None)
pipe.load_lora_weights("{repo}", weight_name="pytorch_lora_weights.safetensors")
pipe("{prompt}", height={side}, width={side}, guidance_scale={guidance}).images[0].save("picture.png")
```

ComfyUI: put `kohya.safetensors` into `models/loras/` under a name of your choice and add a *Load LoRA* node. A1111: put
it into `models/Lora/` and write `<lora:name:1>` into the prompt. In both, choose `{base}` as the checkpoint.
`adapter_model.safetensors` is for PEFT; `fp16/` holds the same files at half the size. All of them draw the same
picture, which was checked before they were uploaded.

## Where it comes from

{table}

`provenance.json` has the whole configuration.

## Limits

- What the sites' photos show, and who chose them, is known at the sites alone. The adapter inherits their gaps, and the
  base model's.
- An adapter can remember photos it was trained on. Averaging over sites does not rule that out.
- It only means something on the base model above (compare the SHA-256), around {side} × {side} pixels.
- Licence: {under}, as of the base model. Where that licence restricts uses, the same restrictions hold for the adapter.
"""

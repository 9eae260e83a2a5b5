"""A model card as the hub reads it: an adapter's provenance in; Markdown with YAML front matter out.

It says how to load the adapter, what it was made from, and what is not known about it, and names no site and no photo.
Errors: EXPORT-06 when nobody says under which licence the adapter goes out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from app import lora, text
from app.adapter import formats
from app.config import RunConfig
from app.errors import AdapterError
from app.families import sd
from app.families.base import Family
from app.hub.history import Provenance, Spent
from bouquet.adapter.sample import loading

OTHER = "other"
LICENCES = {  # as Hugging Face names them; an adapter inherits its base model's
    "mini": "apache-2.0",
    "stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-xl-base-1.0": "openrail++",
    "stable-diffusion-3.5-medium": OTHER,
    "flux.1-dev": OTHER,
    "flux.2-klein-base-4b": "apache-2.0",
    "z-image": "apache-2.0",
    "qwen-image": "apache-2.0",
}
LICENCE_NAMES = {  # of those that it has no name of its own for
    "stable-diffusion-3.5-medium": "stabilityai-ai-community",
    "flux.1-dev": "flux-1-dev-non-commercial-license",
}
NOT_MEASURED = (  # whether photos that it was trained on can be told from others
    "**Not measured.** Nobody looked before this adapter was published whether it tells a photo that it was trained on"
    " from one that it was not."
)
TAGS = ("text-to-image", "diffusers", "lora", "template:sd-lora", "federated-learning", "flower", "bouquet")


def licence(config: RunConfig, asked: str | None) -> str:
    if not (known := asked or LICENCES.get(config.base_model)):
        fix = f"look at the base model's licence and name it: --licence NAME, as in {', '.join(LICENCES.values())}"
        raise AdapterError("EXPORT-06", found=f"base model {config.base_model}", fix=fix)
    return known


def tags(family: Family) -> list[str]:
    own = "stable-diffusion" if family is sd.FAMILY else family.label.lower().replace(" ", "-")
    return [*TAGS[:4], own, *TAGS[4:]]


def card(
    repo: str,
    config: RunConfig,
    provenance: Provenance,
    pictures: Sequence[tuple[str, str]],
    under: str,
    base_id: str,
    family: Family = sd.FAMILY,
    membership: str = "",
) -> str:
    """`pictures` are (prompt, path in the repository); the instance prompt is the trigger word, else the first prompt.
    `base_id`: or ''. `membership`: what is known of who can be told to have been in it (release.py); '' is nothing.
    """
    from huggingface_hub import ModelCard, ModelCardData

    prompt = pictures[0][0] if pictures else ""
    base = base_id or config.base_model
    called = LICENCE_NAMES.get(config.base_model) if under == OTHER else None
    data = ModelCardData(
        base_model=base_id or None,
        base_model_relation="adapter" if base_id else None,
        license=under,
        license_name=called,
        license_link=f"https://huggingface.co/{base_id}/blob/main/LICENSE.md" if called and base_id else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags(family),
        instance_prompt=config.trigger_word.strip() or prompt or None,
        widget=[{"text": words, "output": {"url": path}} for words, path in pictures] or None,
    )
    body = BODY.format(
        name=repo.rsplit("/", 1)[-1],
        picture=(
            "![Without and with the adapter, same prompts and seeds](images/before-after.png)\n\n" if pictures else ""
        ),
        repo=repo,
        base=base,
        pipeline=family.pipeline,
        load=loading(family, base_id or f"models/{config.base_model}"),
        call=call(prompt, config, family),
        tools=(UNETS if family.kohya else TRANSFORMERS).format(base=base),
        side=config.resolution,
        table=table(config, provenance, family),
        membership=membership or NOT_MEASURED,
        under=called or under,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def call(prompt: str, config: RunConfig, family: Family) -> str:
    """What the pipeline is called with, as a person types it."""
    given: dict[str, Any] = {"height": config.resolution, "width": config.resolution} | family.drawing(config)
    typed = {name: f"{value:g}" if isinstance(value, float) else json.dumps(value) for name, value in given.items()}
    return ", ".join([json.dumps(prompt, ensure_ascii=False), *(f"{name}={value}" for name, value in typed.items())])


def table(config: RunConfig, provenance: Provenance, family: Family) -> str:
    part, unknown = formats.net_of(family), "not recorded"
    rounds = config.rounds if provenance.rounds is None else provenance.rounds
    batch = config.batch_size * config.gradient_accumulation
    rows = {
        "sites": len(provenance.sites) or unknown,
        "training images": images(provenance),
        "rounds × local steps × images a step": f"{rounds} × {config.local_steps} × {batch}",
        "LoRA": f"{lora.told(config)}, {config.lora_targets} of the {part}",
        **({"differential privacy": privacy(provenance.privacy)} if provenance.privacy else {}),
        **({"trained on by one site": f"{provenance.personal.steps} steps"} if provenance.personal else {}),
        **({"trigger word": config.trigger_word} if config.trigger_word.strip() else {}),
        "picture size": f"{config.resolution} × {config.resolution}",
        "learning rate, seed": f"{config.learning_rate:g}, {config.seed}",
        "base model's SHA-256": f"`{provenance.base.fingerprint if provenance.base else unknown}`",
        "adapter's SHA-256": f"`{provenance.adapter_sha256 or unknown}`",
        "made": f"{provenance.made or unknown}, run {provenance.run or unknown}",
        "versions": ", ".join(f"{name} {version}" for name, version in provenance.versions.items()) or unknown,
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {cell(value)} |" for name, value in rows.items())])


def images(provenance: Provenance) -> str:
    """As the sites say; and how many counted, where the hub believed fewer."""
    said = "not recorded" if provenance.images is None else str(provenance.images)
    counted = [site.counted for site in provenance.sites.values() if site.counted is not None]
    if not counted or sum(counted) == provenance.images:
        return said
    return f"{said} by the sites' word, {sum(counted)} of them counted in the mean"


def privacy(told: Spent) -> str:
    """What holds of each photo of how many sites."""
    return (
        f"{told.sites} of {told.of} sites, by their own account: epsilon {told.epsilon:.3g} of each photo"
        f" at delta {told.delta:g}, for all that they have sent in this run and before"
    )


def cell(value: Any) -> str:
    """A value in a table of Markdown: one line, no bar, no tag."""
    return text.line(value).replace("|", "\\|").replace("<", "&lt;")


UNETS = """ComfyUI: put `kohya.safetensors` into `models/loras/` under a name of your choice and add a *Load LoRA* node.
A1111: put it into `models/Lora/` and write `<lora:name:1>` into the prompt. In both, choose `{base}` as the
checkpoint."""
TRANSFORMERS = """ComfyUI: put `pytorch_lora_weights.safetensors` into `models/loras/` under a name of your choice and
add a *Load LoRA* node, on `{base}`."""
BODY = """# {name}

A LoRA adapter of `{base}`, trained by several sites together with Bouquet (federated learning on Flower). Each site
trained on its own photos; the photos did not leave the sites, and a hub averaged the adapters.

{picture}## Load it

```python
from diffusers import {pipeline}

pipe = {load}
pipe.load_lora_weights("{repo}", weight_name="pytorch_lora_weights.safetensors")
pipe({call}).images[0].save("picture.png")
```

{tools}
`adapter_model.safetensors` is for PEFT; `fp16/` holds the same files at half the size. All of them draw the same
picture, which was checked before they were uploaded.

## Where it comes from

{table}

`provenance.json` has the whole configuration.

## Who was in it

{membership}

## Limits

- What the sites' photos show, and who chose them, is known at the sites alone. The adapter inherits their gaps, and the
  base model's.
- An adapter can remember photos it was trained on. Averaging over sites does not rule that out.
- It only means something on the base model above (compare the SHA-256), around {side} × {side} pixels.
- Licence: {under}, as of the base model. Where that licence restricts uses, the same restrictions hold for the adapter.
"""

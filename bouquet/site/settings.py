"""What a site's operator sets, by the variables of its environment, as the kit's .env and Compose give them.

Enters: an environment. Leaves: `Settings`. Errors: CONFIG-01, CONFIG-02, CHECK-09, TRUST-04, TRUST-16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.config import RunConfig
from app.site import budget, consent, limits


@dataclass(frozen=True)
class Settings:
    """Each with its variable."""

    name: str  # SITE_NAME
    data: Path  # BOUQUET_DATA, /data
    models: Path  # BOUQUET_MODELS, /models
    cache: Path  # BOUQUET_CACHE, /cache
    hub: str  # HUB, host:port
    ca: Path  # CA, /ca.crt
    key: Path  # SITE_KEY, /run/secrets/site.key
    gpu: str  # SITE_GPU: an index, a UUID, or none; else NVIDIA_VISIBLE_DEVICES
    fingerprint: str  # BASE_FINGERPRINT, the hub's; '' where it is not known
    limits: limits.Limits  # SITE_LIMITS
    peers: str  # SITE_PEERS
    promise: budget.Promise | None  # SITE_PRIVACY
    # BASE_MODEL and RUN_CONFIG, as in `flwr run --run-config`; SITE_CHECKPOINTING forces gradient-checkpointing
    config: RunConfig

    @classmethod
    def read(cls, env: Mapping[str, str], run_config: str = "") -> Settings:
        """Errors: CONFIG-01, CONFIG-02, CHECK-09, TRUST-04, TRUST-16."""
        from flwr.common.config import parse_config_args

        values: dict[str, Any] = {"base-model": env["BASE_MODEL"]} if env.get("BASE_MODEL") else {}
        if text := run_config or env.get("RUN_CONFIG"):
            values |= parse_config_args([text])
        consent.mode(env)
        if limits.wants_checkpointing(env):
            values["gradient-checkpointing"] = True
        paths = {
            "data": "BOUQUET_DATA",
            "models": "BOUQUET_MODELS",
            "cache": "BOUQUET_CACHE",
            "ca": "CA",
            "key": "SITE_KEY",
        }
        usual = {"ca": "/ca.crt", "key": "/run/secrets/site.key"}
        found = {field: Path(env.get(name) or usual.get(field, f"/{field}")) for field, name in paths.items()}
        pin = env.get("SITE_GPU") or env.get("NVIDIA_VISIBLE_DEVICES", "")
        return cls(
            name=env.get("SITE_NAME", ""),
            hub=env.get("HUB", ""),
            gpu="" if pin in ("none", "void", "cpu") else pin,
            fingerprint=env.get("BASE_FINGERPRINT", ""),
            limits=limits.Limits.read(env.get("SITE_LIMITS", "")),
            peers=env.get("SITE_PEERS", ""),
            promise=budget.of(env, found["cache"]),
            config=RunConfig.read(values),
            **found,
        )

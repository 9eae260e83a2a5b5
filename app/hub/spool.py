"""A round's replies on the shared volume, so that the hub never holds all of them in memory.

Enters: a site's adapter, once it has been accepted. Leaves: the same adapter as a mapping that reads a tensor when
asked for it. Hundreds of sites cost disk for the length of a round, not memory; the folder goes when the round is
written.
Errors: HUB-09 (no room).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from app.hub.volume import no_room
from app.model import Adapter

MOST = 2**27  # bytes of all sites' tensors that are in memory at once


class Kept(Mapping[str, torch.Tensor]):
    """An adapter in a file."""

    def __init__(self, file: Path, adapter: Iterable[str]) -> None:
        self.file, self.keys_ = file, dict.fromkeys(adapter)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.some([key])[key]

    def some(self, keys: Iterable[str]) -> Adapter:
        """These tensors, with the file opened once: opening it for each was most of the hub's time with hundreds of
        sites.
        """
        keys = list(keys)
        if missing := [key for key in keys if key not in self.keys_]:
            raise KeyError(missing[0])
        with safe_open(self.file, "pt") as file:
            return {key: file.get_tensor(key) for key in keys}

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


def some(adapter: Mapping[str, torch.Tensor], keys: Iterable[str]) -> Adapter:
    """These tensors of an adapter, in memory or kept in a file."""
    return adapter.some(keys) if isinstance(adapter, Kept) else {key: adapter[key] for key in keys}


class Spool:
    """One run's folder of replies, `<run>/.replies`; the dot says that nothing in it is finished."""

    def __init__(self, run: Path) -> None:
        self.folder = run / ".replies"

    def keep(self, site: int, adapter: Mapping[str, torch.Tensor]) -> Kept:
        """The reply of node `site`; a later one takes its place. Errors: HUB-09."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(dict(adapter), self.folder / f"{site}.safetensors")
        except (OSError, SafetensorError) as error:
            raise no_room(self.folder.parent, f"a site's reply could not be kept ({type(error).__name__})") from error
        return Kept(self.folder / f"{site}.safetensors", adapter)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

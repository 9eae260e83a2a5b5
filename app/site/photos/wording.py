"""Which words a photo is trained on: each of its captions, with the run's trigger word, in one order or several.

Enters: a photo's captions as its site wrote them; a run's config. Leaves: the texts that are encoded, of which
validation uses the first: the first caption, in the order in which it was written.
A text is encoded once and kept, so that the tags of a caption are not shuffled afresh each time that it is drawn: a
number of orders is made of it (`caption-variants`, the one as written among them), and each time one of these is drawn.
They follow from the caption alone, so that another round and another run find them encoded; a caption of few tags has
fewer of them. The text encoder's work, and the room for what it makes, is that number of times as much.
The trigger word comes in front of a caption that does not have it, after the tags were shuffled, and so stays there.
Errors: none.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from app.config import RunConfig

TRIES = 16  # for each order that is wanted: a caption that says a tag twice has fewer orders than places


@dataclass(frozen=True)
class Wording:
    """trigger: '' for none; variants: orders of a caption's tags, 1 for the one as written; keep: its first tags, which
    stay.
    """

    trigger: str = ""
    variants: int = 1
    keep: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> Wording:
        variants = config.caption_variants if config.caption_shuffle else 1
        return cls(config.trigger_word.strip(), variants, config.keep_tokens)

    def texts(self, captions: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """Of each caption, its texts."""
        return tuple(
            tuple(triggered(order, self.trigger) for order in orders(caption, self.keep, self.variants))
            for caption in captions
        )


AS_WRITTEN = Wording()


def triggered(caption: str, word: str) -> str:
    """The caption with the word in front, unless it is in it: as a whole word, in capitals or not."""
    if not word or re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{word}, {caption}"


def orders(caption: str, keep: int, most: int) -> tuple[str, ...]:
    """At most that many distinct orders of the caption's tags, itself first; the first `keep` tags stay."""
    tags = [tag for tag in (part.strip() for part in caption.split(",")) if tag]
    kept, free = tags[:keep], tags[keep:]
    found, most = {tuple(free): caption}, min(most, math.factorial(min(len(free), 10)))
    for number in range(TRIES * most):
        if len(found) == most:
            break
        order = tuple(free[at] for at in sorted(range(len(free)), key=lambda at: _lot(number, at, caption)))  # noqa: B023
        found.setdefault(order, ", ".join([*kept, *order]))
    return tuple(found.values())


def _lot(number: int, at: int, caption: str) -> bytes:
    return hashlib.sha256(f"{number} {at} {caption}".encode()).digest()

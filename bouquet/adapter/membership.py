"""Can one tell who an adapter was trained on? A site's photos and a run in; a few numbers, and nothing else, out.

Two attacks give every photo a score, higher for one that looks trained on, and are tried on the site's training photos
against those that it held out, which nobody trained on:
  loss  how much lower the loss is with the adapter than with the base model alone, over the same noise (the base's
        loss is how hard the photo is by itself: Watson et al. 2022, arXiv:2111.08440)
  pia   proximal initialisation: the noise that the net finds in the untouched photo is put onto it, and how far the net
        then is from finding that again (Kong et al. 2024, arXiv:2305.18355, eq. 9, its 4-norm)
How well a score tells them apart is the area under its curve (AUC): the chance that a trained photo's is the higher of
two; 0.5 is guessing, and what is below is as telling the other way round. It is a lower bound: a better attack, or
somebody who has every round's adapters, may tell more.

PIA is published for nets that learn from noise by betas (Stable Diffusion, SDXL; epsilon, or v, which the noise is
worked out from). For flow matching the same is done along its straight lines, x = (1 - sigma) z + sigma n: a form of
our own, which nobody has published figures of.
With fewer than LEAST photos on either side no number is told: it cannot be told. Nor is any where the folder has
another number of training photos than the site's journal noted in the run's last round: whoever came since would be
taken for trained on, and make the figures look better than they are.
Enters: a site's folder and cache, a run. Leaves: `Membership`, the site's file. Errors: MEASURE-01, MEASURE-02,
REPORT-05 and those of getting a site ready.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from app import files, records, text
from app.errors import BouquetError
from app.families.noise import Betas, Flow, Schedule
from app.hub import history
from app.model import Adapter, Net
from app.records import entry
from app.site import diffusion, journal
from app.site.cache import Encoded
from app.site.diffusion import Digest, Objective

VERSION = 1
LEAST = 50  # photos on either side, for any number
LEAST_RARE = 500  # held-out photos for the share at 1 % false alarms: five of them are false
RARE = 0.01
NORMAL = 1.959964  # of a two-sided 95 % interval
LEVELS = 8  # noise levels of the loss
NORM = 4  # of PIA's distance
NOISE = 0.57  # PIA's level: so much noise to the photo as at the paper's step 200 of Stable Diffusion's 1000
ATTACKS = ("loss", "pia")


@dataclass(frozen=True)
class Attack:
    """How well one score tells training photos from held-out ones."""

    auc: float = entry("area under the curve; 0.5 is guessing, 1 tells every photo")
    low: float = entry("lower end of its 95 % interval (DeLong)")
    high: float = entry("upper end")
    rare: float | None = entry(
        "share of training photos found where 1 % of the held-out ones are taken for such", default=None
    )


@dataclass(frozen=True)
class Membership:
    """NAME.membership.json: what a site sends to whoever publishes."""

    site: str = entry("the site's name")
    run: str = entry("the run's id")
    adapter: str = entry("SHA-256 of the adapter that was looked at")
    members: int = entry("training photos that were looked at", "photos")
    held_out: int = entry("held-out photos that were looked at", "photos")
    attacks: dict[str, Attack] = entry("loss and pia; empty where too few photos were held out", default={})
    version: int = entry("of this format", default=VERSION)


# --- how well two rows of scores are told apart -----------------------------------------------------------------------


def attack(members: Sequence[float], held_out: Sequence[float]) -> Attack:
    """AUC by ranks (Mann and Whitney: ties count half), with DeLong et al. 1988's variance."""
    ours, others = (torch.tensor(scores, dtype=torch.float64) for scores in (members, held_out))
    wins = (ours[:, None] > others).double() + 0.5 * (ours[:, None] == others).double()
    of_member, of_held_out = wins.mean(dim=1), wins.mean(dim=0)
    area = float(wins.mean())
    half = NORMAL * math.sqrt(float(of_member.var() / len(of_member) + of_held_out.var() / len(of_held_out)))
    return Attack(area, max(0.0, area - half), min(1.0, area + half), found_at(RARE, ours, others))


def found_at(false: float, members: Tensor, held_out: Tensor) -> float | None:
    """The share of members above all but `false` of the held-out; None where that is too few of them to say."""
    if len(held_out) < LEAST_RARE:
        return None
    threshold = held_out.sort(descending=True).values[int(false * len(held_out))]
    return float((members > threshold).double().mean())


# --- scores -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def scores(
    net: Net, objective: Objective, photos: Encoded, pick: Sequence[int], adapter: Adapter, digest: Digest, size: int
) -> dict[str, list[float]]:
    """Each attack's score of each of these photos, in the order of their numbers in `pick`; `size` a pass."""
    from app import model

    net.eval()
    model.apply_adapter(net, {key: torch.zeros_like(value) for key, value in adapter.items()})
    before = _each(lambda part: _loss(net, objective, photos, part, digest), photos, pick, size)
    model.apply_adapter(net, adapter)
    after = _each(lambda part: _loss(net, objective, photos, part, digest), photos, pick, size)
    found = _each(lambda part: _distance(net, objective, photos, part), photos, pick, size)
    return {"loss": (before - after).tolist(), "pia": (-found).tolist()}


def _each(measured: Callable[[Tensor], Tensor], photos: Encoded, pick: Sequence[int], size: int) -> Tensor:
    """float64 [len(pick)]: a pass has photos of one shape."""
    wanted, found = torch.tensor(pick), torch.zeros(len(photos.keys), dtype=torch.float64)
    for bucket in photos.buckets:
        for part in torch.split(bucket[torch.isin(bucket, wanted)], size):
            if len(part):
                found[part] = measured(part).double().cpu()
    return found[wanted]


def _loss(net: Net, objective: Objective, photos: Encoded, part: Tensor, digest: Digest) -> Tensor:
    """Mean loss over each photo's own fixed noise and stratified levels: [B]."""
    latents, given = _on(net, *photos.batch(part))
    drawn = [
        diffusion.fixed_noise(digest(photos.keys[n]), latents.shape[1:], LEVELS, objective.schedule.steps) for n in part
    ]
    noise, t = (torch.stack(rows, dim=1).to(latents.device) for rows in zip(*drawn, strict=True))
    each = [diffusion.losses(net, objective, latents, given, noise[level], t[level]) for level in range(LEVELS)]
    return torch.stack(each).mean(dim=0)


def _distance(net: Net, objective: Objective, photos: Encoded, part: Tensor) -> Tensor:
    """PIA's: between the noise that the net finds in the photo, and the one it finds when that was put onto it: [B]."""
    latents, given = _on(net, *photos.batch(part))
    schedule = objective.schedule
    clean, noisy = (torch.full((len(part),), level, device=latents.device) for level in levels(schedule))
    found = _noise_in(net, objective, latents, clean, given)
    again = _noise_in(net, objective, schedule.noisy(latents, found, noisy), noisy, given)
    return (again - found).abs().pow(NORM).mean(dim=(1, 2, 3)).pow(1 / NORM)


def _on(net: Net, latents: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    device = next(net.parameters()).device
    return diffusion.to_device(latents, device), diffusion.moved(given, device)


def _noise_in(net: Net, objective: Objective, x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
    """float32: the noise that the net finds in x."""
    schedule = objective.schedule
    assert isinstance(schedule, (Betas, Flow)), schedule  # the two that there are
    predicted = diffusion.predict(net, objective.family, x, schedule.told(t), given).float()
    photo, noise = (share[t].view(-1, *(1,) * (x.dim() - 1)) for share in shares(schedule, x.device))
    if isinstance(schedule, Flow):
        return x + photo * predicted  # it says noise - photo
    if schedule.scheduler.config.prediction_type == "v_prediction":  # it says photo's share of the noise - the noise's
        return photo * predicted + noise * x
    return predicted


def shares(schedule: Schedule, device: torch.device) -> tuple[Tensor, Tensor]:
    """How much of the photo, and how much of the noise, there is at each level: float32 [K] each."""
    assert isinstance(schedule, (Betas, Flow)), schedule
    if isinstance(schedule, Flow):
        sigmas = schedule.sigmas_K.to(device)
        return 1 - sigmas, sigmas
    alphas = schedule.scheduler.alphas_cumprod.to(device).float()
    return alphas.sqrt(), (1 - alphas).sqrt()


def levels(schedule: Schedule) -> tuple[int, int]:
    """PIA's two: the one with the least noise, and the one with NOISE."""
    photo, noise = shares(schedule, torch.device("cpu"))
    return int(noise.argmin()), int((noise / photo - NOISE).abs().argmin())


# --- at a site --------------------------------------------------------------------------------------------------------


def look(name: str, folder: Path, run: Path, models: Path, cached: Path, count: int) -> Membership:
    """One site's figures of a run's final adapter, from `count` photos of either kind at most."""
    from app import model
    from app.adapter import formats
    from app.site import budget, train
    from app.site.limits import Limits

    adapter, config = formats.open_adapter(run, models=models)
    config = replace(config, resolutions="")  # each photo once, as those held out are shown
    if not any(
        (place / told).is_file() for place in (run, run / "final") for told in (history.FILE, history.PROVENANCE)
    ):
        found = f"{run} does not say how the run was configured, so that nobody knows which photos were held out"
        raise BouquetError("MEASURE-01", found=found, fix="name the folder of a run that has finished")
    own, promise = Limits.read(os.environ.get("SITE_LIMITS", "")), budget.of(os.environ, cached)
    site = train.Site(config, models, folder, cached, "", limits=own, promise=promise)  # who is held out as in the run
    check_photos(run, cached, len(site.photos))
    drawn = {
        kind: sorted(random.Random(config.seed).sample(range(len(of.keys)), min(count, len(of.keys))))
        for kind, of in (("members", site.train), ("held_out", site.held_out))
    }
    number, digest, size = site.privacy.number, site.privacy.digest, train.WIDER * config.batch_size
    attacks = {}
    if min(map(len, drawn.values())) >= LEAST:
        with site.accelerator.autocast():
            ours = scores(site.net, site.objective, site.train, drawn["members"], adapter, digest, size)
            others = scores(site.net, site.objective, site.held_out, drawn["held_out"], adapter, digest, size)
        for kind in ATTACKS:
            made = attack(ours[kind], others[kind])
            rare = None if made.rare is None else number(made.rare)
            attacks[kind] = Attack(number(made.auc), number(made.low), number(made.high), rare)
    counts = {kind: int(number(len(chosen))) for kind, chosen in drawn.items()}
    return Membership(name, run.resolve().name, model.adapter_hash(adapter), **counts, attacks=attacks)


def check_photos(run: Path, cached: Path, photos: int) -> None:
    """Whether the site trains on as many photos now as in the run's last round here. Errors: MEASURE-01.

    Where the journal has nothing of it (another host, a lost cache) that is said, and the folder is taken as it is.
    """
    from app.adapter import formats

    file = formats.adapter_file(run).parent / history.PROVENANCE  # which has the run's id, were the folder renamed
    number = (history.read_provenance(file).run if file.is_file() else "") or run.resolve().name
    trained = [one for one in journal.read(cached) if one.get("run") == number and one.get("sent")]
    if not trained:
        print(
            f"bouquet: {cached / journal.FILE} has no round of run {number}: the figures are right only if the folder"
            " has the photos that it had then",
            flush=True,
        )
    elif trained[-1].get("images") != photos:
        found = (
            f"round {trained[-1].get('round')} of run {number} was trained on {trained[-1].get('images')} photos here,"
            f" and with this folder it would be {photos}: who came since would be taken for trained on"
        )
        fix = "measure with the photos, and the SITE_LIMITS and SITE_PRIVACY, of the run: take out what came since"
        raise BouquetError("MEASURE-01", found=found, fix=fix)


# --- as a file --------------------------------------------------------------------------------------------------------


def write(path: Path, found: Membership) -> None:
    """In one step. Errors: OSError."""
    files.write_json(path, records.told(found))


def read(path: Path) -> Membership:
    """A site's file, which may hold anything. Errors: MEASURE-02, REPORT-05."""
    try:
        found = records.read(Membership, path)
    except (records.Unfit, OSError) as error:
        if isinstance(error, records.Unfit) and error.newer:
            raise history.refusal(error, str(path)) from None
        raise unfit(text.line(f"{path.name}: {error}")) from None
    numbers = [number for one in found.attacks.values() for number in (one.low, one.auc, one.high)]
    told = found.attacks.keys()
    in_order = all(0 <= one.low <= one.auc <= one.high <= 1 for one in found.attacks.values())
    enough = min(found.members, found.held_out) >= LEAST
    if (numbers and not (in_order and enough and told == set(ATTACKS))) or min(found.members, found.held_out) < 0:
        raise unfit(f"{path.name}: numbers that are missing or impossible")
    return found


def unfit(found: str) -> BouquetError:
    return BouquetError("MEASURE-02", found=found, fix="let the site measure again: bouquet measure membership")


# --- in words ---------------------------------------------------------------------------------------------------------


def highest(found: Membership) -> float | None:
    """The end of the worst attack's interval that is furthest from guessing, as an area above 0.5: what a run's
    release-auc is held against. None where it cannot be told.
    """
    return max((max(one.high, 1 - one.low) for one in found.attacks.values()), default=None)


def sentence(found: Membership) -> str:
    """What a site, and whoever reads the card, has to know of it."""
    looked = f"{found.members} photos trained on, {found.held_out} held out"
    if not found.attacks:
        return f"cannot tell: {looked}, and fewer than {LEAST} on either side say nothing"
    said = [
        f"{kind} {one.auc:.2f} [{one.low:.2f}, {one.high:.2f}]"
        + ("" if one.rare is None else f", {100 * one.rare:.1f} % found at 1 % false alarms")
        for kind, one in found.attacks.items()
    ]
    return f"{'; '.join(said)} ({looked})"

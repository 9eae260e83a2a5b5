"""May an adapter go out, as far as can be told who it was trained on? The sites' membership figures in; a word, or a
refusal, out.

Whoever publishes names a file of each site of the run (membership.py), or says openly that there is none. The group's
threshold is the run's `release-auc`, which stood before every site when it took part: the upper end of the interval of
every attack at every site has to be at or below it (of an area below 0.5, one minus the lower end). A site that cannot
tell is not below any; a threshold of 1, the default, is none.
It keeps honest people from a slip. Who has the adapter can send it anywhere.
Enters: files, the run's adapter, sites and configuration. Leaves: the figures by site; what the card and the audit log
say of them. Errors: EXPORT-09, EXPORT-10, MEASURE-02, REPORT-05.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from app.errors import AdapterError
from bouquet.adapter import membership
from bouquet.adapter.membership import Membership

Figures = dict[str, Membership]  # by site
NONE = 1.0  # the threshold that lets everything out
MEASURE = "at each site: bouquet measure membership NAME --data DIR RUN; then --membership NAME.membership.json of each"


def figures(paths: Collection[Path], adapter: str, sites: Collection[str]) -> Figures:
    """The sites' files, of this adapter. `sites`: of the run; empty where nobody recorded them. Errors: MEASURE-02."""
    found: Figures = {}
    for path in paths:
        one = membership.read(path)
        if one.adapter != adapter:
            raise membership.unfit(f"{path.name} is of adapter {one.adapter[:12]}, this is {adapter[:12]}")
        if one.site in found or (sites and one.site not in sites):
            why = "has two files" if one.site in found else f"is none of the run's: {', '.join(sorted(sites))}"
            raise membership.unfit(f"{path.name}: site {one.site} {why}")
        found[one.site] = one
    return dict(sorted(found.items()))


def missing(found: Figures, sites: Collection[str]) -> list[str]:
    """Whose figures there are none of."""
    return sorted(set(sites) - found.keys()) or ([] if found else ["every site"])


def check(found: Figures, sites: Collection[str], most: float, *, without: bool, sending: bool) -> None:
    """Errors: EXPORT-09 where it is being sent and figures are missing that must be there; EXPORT-10 where they say too
    much.
    """
    lacking = missing(found, sites)
    if sending and lacking and (most < NONE or not without):
        asked = f"the run's release-auc is {most:g}, and asks for all of them. " if most < NONE else ""
        or_else = "" if most < NONE else "; or send it without, which its card will say: --without-membership"
        raise AdapterError("EXPORT-09", found=f"{asked}No figures of {', '.join(lacking)}", fix=f"{MEASURE}{or_else}")
    if most == NONE:
        return
    above = []
    for site, one in found.items():
        high = membership.highest(one)
        if high is None or high > most:
            above.append(f"{site} {membership.sentence(one)}")
    if above:
        raise AdapterError(
            "EXPORT-10",
            found=f"release-auc is {most:g}, and the upper end counts: {'; '.join(above)}",
            fix=(
                "train again with fewer steps, a lower rank, more photos or SITE_PRIVACY; with more held-out photos an"
                " interval is narrower"
            ),
        )


def words(found: Figures, sites: Collection[str]) -> str:
    """For the audit log, and whoever publishes: one line."""
    lacking = [f"{site}: not measured" for site in missing(found, sites)]
    return " | ".join([f"{site}: {membership.sentence(one)}" for site, one in found.items()] + lacking)


def section(found: Figures, names: Mapping[str, str], most: float) -> str:
    """The model card's part about it; '' without any figures. `names`: what each site of the run is called there."""
    if not found:
        return ""
    lines = [f"| {called} | {cells(found.get(site))} |" for site, called in names.items()]
    if not names:
        lines = [f"| site {number} | {cells(one)} |" for number, one in enumerate(found.values(), start=1)]
    limit = (
        f"The sites had agreed to let out no adapter with an upper end above {most:g}." if most < NONE else NO_THRESHOLD
    )
    return "\n".join([MEASURED, "", HEAD, *lines, "", f"{MEANS} {limit}"])


def cells(one: Membership | None) -> str:
    if one is None:
        return "not measured | – | –"
    if not one.attacks:
        return f"{one.members} / {one.held_out} | cannot tell | cannot tell"
    shown = [
        f"{one.attacks[kind].auc:.2f} [{one.attacks[kind].low:.2f}, {one.attacks[kind].high:.2f}]" for kind in KINDS
    ]
    return " | ".join([f"{one.members} / {one.held_out}", *shown])


KINDS = membership.ATTACKS
HEAD = "| | photos trained on / held out | by the loss | by PIA |\n| --- | --- | --- | --- |"
MEASURED = (
    "Each site tried, before this adapter was published, to tell photos that it was trained on from photos of the\n"
    "same site that it was not: the area under the curve, with a 95 % interval; 0.5 is guessing, 1 finds every photo."
)
MEANS = (
    "This is a lower bound: a better attack, or somebody who saw the adapters of every round, may tell more. *Cannot\n"
    f"tell* is a site with fewer than {membership.LEAST} photos on either side."
)
NO_THRESHOLD = "The sites had agreed on no threshold."

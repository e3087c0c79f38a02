"""Chains of a defense that is made of given samples."""

from probdefense.core.defense import Defense
from probdefense.core.sites import SampleSite, Site


def chains_of(defense: Defense) -> int:
    """Of how many chains the samples of a defense are; 0 without samples, or where they weigh differently."""
    tables = [site.table for site in defense.sites.values() if isinstance(site, SampleSite)]
    known = [table for table in tables if table is not None]
    if any(bool((table.weights != table.weights[0]).any()) for table in known):
        return 0
    return max((table.chains for table in known), default=0)


def in_chains(defense: Defense) -> list[Defense]:
    """A defense of samples as one per chain, which gives them in their order; any other as it is."""

    def of(site: Site, number: int) -> Site:
        return site.chain(number) if isinstance(site, SampleSite) else site

    count = chains_of(defense)
    chains = [[of(site, number) for site in defense.sites.values()] for number in range(count)]
    return [Defense.from_sites(defense.net, sites, defense.num_data) for sites in chains] or [defense]


def lengths(defense: Defense) -> list[int]:
    """How many samples each chain has: their draws are not repeated."""
    sites = [site for site in defense.sites.values() if isinstance(site, SampleSite)]
    return [len(site.order) for site in sites if site.order]

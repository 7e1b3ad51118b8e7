"""What is on offer, and who offers it: entry points, read once.

Everything pluggable is found here and only here, LoRaQ's own strategies the same way as a third party's:

    loraq.stage                                           stage kinds
    loraq.pre_transform .main_quantizer .low_rank         strategies, one group a stage kind
    loraq.branch_quantizer .packing
    loraq.format                                          number formats
    loraq.kernel                                          backends of the packed operations

A name is permanent: a changed behaviour gets a new name, so that old recipes reproduce. Two distributions that offer
one name in one group are refused, both named, when that name is asked for or listed: silently taking the first would
make a recipe mean different things on different machines.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Mapping

import attrs
import entrypoints

from loraq.errors import RegistryError, choices, did_you_mean

PREFIX = "loraq."


@attrs.frozen
class Offer:
    """One entry point: `name` in `group`, the object it points to, and the distribution that offers it."""

    group: str
    name: str
    target: str
    distribution: str
    version: str
    _entry_point: entrypoints.EntryPoint = attrs.field(repr=False, eq=False)

    def load(self) -> object:
        """Import and return the object. Raises RegistryError if it cannot be imported."""
        try:
            return self._entry_point.load()
        except Exception as error:  # a plugin may fail in any way; the user must learn which one did
            raise RegistryError(
                f"'{self.name}' in {self.group}, offered by {self.distribution} {self.version} as {self.target}, "
                f"cannot be imported: {type(error).__name__}: {error}."
            ) from error

    def leads_to(self, target: object) -> bool:
        """Whether this is an offer of `target`."""
        try:
            return self.load() is target
        except RegistryError:
            return False


@functools.cache
def _scan(group: str) -> Mapping[str, tuple[Offer, ...]]:
    """All offers of a group by name. A scan takes some milliseconds; entry points do not change while we run."""
    found: dict[str, dict[tuple[str, str], Offer]] = {}
    for entry_point in entrypoints.get_group_all(group):
        distribution = entry_point.distro
        name, version = (distribution.name, distribution.version) if distribution else ("unknown", "?")
        name = re.sub("[-_.]+", "-", name).lower()  # a folder's name has "_" where the distribution's may have "-"
        version = version or _version_of(name)
        target = f"{entry_point.module_name}:{entry_point.object_name}"
        offer = Offer(group, entry_point.name, target, name, version, entry_point)
        # One distribution may be seen twice (an egg-info folder beside its dist-info): the same offer, not a conflict.
        found.setdefault(entry_point.name, {}).setdefault((name, target), offer)
    return {name: tuple(offers.values()) for name, offers in sorted(found.items())}


def _version_of(distribution: str) -> str:
    """A distribution's version by its metadata: the name of an egg-info folder in a source tree does not say it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "?"


def names(group: str) -> list[str]:
    """The names on offer in a group, sorted."""
    return list(_scan(group))


def offer(group: str, name: str) -> Offer:
    """Who offers `name` in `group`. Raises RegistryError if nobody does, or two distributions do."""
    offers = _scan(group).get(name, ())
    if not offers:
        kind = group.removeprefix(PREFIX).replace("_", " ")
        raise RegistryError(
            f"no {kind} called '{name}'; on offer: {choices(names(group))}{did_you_mean(name, names(group))}"
        )
    if len(offers) > 1:
        who = " and ".join(f"{each.distribution} {each.version} ({each.target})" for each in offers)
        raise RegistryError(f"'{name}' in {group} is offered twice, by {who}; uninstall one of them.")
    return offers[0]


def load(group: str, name: str) -> object:
    """The object called `name` in `group`. Raises RegistryError if it is missing, broken or offered twice."""
    return offer(group, name).load()


def offers(group: str) -> list[Offer]:
    """All offers of a group. Raises RegistryError if a name is offered twice."""
    return [offer(group, name) for name in names(group)]


def broken(group: str, name: str, what: str) -> RegistryError:
    """The error for an entry point that loads but is not what its group promises."""
    found = offer(group, name)
    return RegistryError(f"'{name}' in {group}, offered by {found.distribution} as {found.target}, {what}.")


def name_of(group: str, target: type) -> str:
    """The name under which a class is on offer in a group: the way back from `load`, for checkpoints.

    Raises RegistryError for a class that no entry point names.
    """
    path = f"{target.__module__}:{target.__qualname__}"
    for name, found in _scan(group).items():
        if any(each.target == path for each in found):
            return name
    for name, found in _scan(group).items():  # an entry point may name the class where a package re-exports it
        if any(each.leads_to(target) for each in found):
            return name
    raise RegistryError(
        f"{path} is not registered in {group}: a checkpoint could not name it; add an entry point to its distribution."
    )

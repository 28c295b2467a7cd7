"""Which caches are there, of which networks and which image sets, and do they agree?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from featcache.cache import FeatureCache
from featcache.errors import InputError
from featcache.folders import walk
from featcache.tables import as_html, as_text

Place = str | os.PathLike[str] | FeatureCache

SHORT = 12  # characters of a network's id that are shown
_ROWS = 60  # of the table
_NAME = 44  # characters of a network's name there


class CacheSet:
    """Caches of some networks on some image sets: all of a folder, or those of a list.

    Opening reads the table of contents of each file, some milliseconds a file.

    Parameters
    ----------
    places : path, FeatureCache, or an iterable of them
        A folder stands for every ``.h5`` file in it.
    image_set : function of a FeatureCache, optional
        Gives the name of a cache's image set. By default that is its folder, as seen
        from the folder that all caches have in common.
    recursive : bool
        Whether a folder stands for the files of all folders below it, too; links are followed.

    Attributes
    ----------
    caches : tuple of FeatureCache
        Sorted by image set, then by network, so that the networks of two image
        sets come in the same order however the files are called.
    networks : list of str or None
        Network ids.
    image_sets : list of str

    Raises
    ------
    InputError
        If there is no cache, or a ``.h5`` file that is not one.

    Examples
    --------
    >>> caches = CacheSet("caches")                           # doctest: +SKIP
    >>> caches["resnet101", "stage_1"].training()             # doctest: +SKIP
    >>> [c.x("eval") for c in caches.image_set("stage_1")]    # doctest: +SKIP
    """

    def __init__(
        self,
        places: Place | Iterable[Place],
        image_set: Callable[[FeatureCache], str] | None = None,
        recursive: bool = True,
    ) -> None:
        found = _open(places, recursive)
        if image_set is None:
            above = _common_folder(found)
            names = [_folder(cache, above) for cache in found]
        else:
            names = [image_set(cache) for cache in found]
        self._fill(zip(names, found, strict=True))

    def _fill(self, named: Iterable[tuple[str, FeatureCache]]) -> None:
        def key(item: tuple[str, FeatureCache]) -> tuple[str, ...]:
            name, cache = item
            return name, cache.network_name, cache.network_id or "", str(cache.path)

        self._named = sorted(named, key=key)
        self.caches = tuple(cache for _, cache in self._named)
        self.image_sets = list(dict.fromkeys(name for name, _ in self._named))
        by_name = sorted(
            self.caches, key=lambda cache: (cache.network_name, cache.network_id or "")
        )
        self.networks = list(dict.fromkeys(cache.network_id for cache in by_name))

    def _part(self, named: Iterable[tuple[str, FeatureCache]]) -> CacheSet:
        part = CacheSet.__new__(CacheSet)
        part._fill(named)
        return part

    def __len__(self) -> int:
        return len(self.caches)

    def __iter__(self) -> Iterator[FeatureCache]:
        return iter(self.caches)

    # --------------------------------------------------------------- finding

    def network(self, network: str | None) -> CacheSet:
        """The caches of one network, over the image sets.

        Parameters
        ----------
        network : str or None
            Its id, the beginning of it, or its name if no other network has that.

        Raises
        ------
        InputError
            If there is no such network or several, it has two caches of one image set,
            or its caches differ in their classes.
        """
        wanted = self._network_id(network)
        part = self._part(item for item in self._named if item[1].network_id == wanted)
        part._refuse_two()
        refuse_other_classes(part.caches)
        return part

    def image_set(self, name: str) -> CacheSet:
        """The caches of one image set, over the networks.

        Raises
        ------
        InputError
            If there is no such image set, a network has two caches of it, or the caches
            differ in their ids or classes.
        """
        if name not in self.image_sets:
            raise InputError(
                f"no image set {name!r} among these {len(self)} caches; "
                f"there are {', '.join(map(repr, self.image_sets))}"
            )
        part = self._part(item for item in self._named if item[0] == name)
        part._refuse_two()
        refuse_other_images(part.caches)
        refuse_other_classes(part.caches)
        return part

    def __getitem__(self, key: tuple[str | None, str]) -> FeatureCache:
        """The cache of a network (see :meth:`network`) on an image set."""
        if not isinstance(key, tuple) or len(key) != 2:
            raise InputError(
                f"[{key!r}]: give network and image set, such as ['resnet101', 'stage_1'], or use "
                ".network(NETWORK) and .image_set(NAME)"
            )
        network, name = key
        wanted = self._network_id(network)
        part = self._part(i for i in self._named if i[0] == name and i[1].network_id == wanted)
        if not part.caches:
            has = [item[0] for item in self._named if item[1].network_id == wanted]
            raise InputError(
                f"network {network!r} has no cache of image set {name!r}; "
                f"it has {', '.join(map(repr, has))}"
            )
        part._refuse_two()
        return part.caches[0]

    def _network_id(self, network: str | None) -> str | None:
        if network in self.networks:
            return network
        about = {cache.network_id: cache for cache in self.caches}
        fits = [name for name, cache in about.items() if cache.network_name == network]
        if network and not fits:
            fits = [name for name in about if name is not None and name.startswith(network)]
        if len(fits) == 1:
            return fits[0]
        if fits:
            named = " or ".join(f"{about[name].network_name} ({short(name)})" for name in fits)
            raise InputError(f"network {network!r} may be {named}; give the beginning of its id")
        raise InputError(f"no cache of network {short(network)}; there are {self.listing}")

    @property
    def listing(self) -> str:
        """Every file with the beginning of its network's id, on one line."""
        return ", ".join(f"{cache.path} ({short(cache.network_id)})" for cache in self.caches)

    def _refuse_two(self) -> None:
        seen: dict[tuple[str, str | None], FeatureCache] = {}
        for name, cache in self._named:
            other = seen.setdefault((name, cache.network_id), cache)
            if other is not cache:
                raise InputError(
                    f"{cache.path} and {other.path} are of one network and image set ({name!r}); "
                    "keep one, or put each image set into a folder of its own (networks of your "
                    "own are told apart by provenance={'network': NAME} when features are written)"
                )

    # --------------------------------------------------------------- showing

    def __str__(self) -> str:
        return "\n".join([self._title(), as_text(*self._table()), *self._left_out()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(self._title(), *self._table()) + "".join(self._left_out())

    def _title(self) -> str:
        K, S = len(self.networks), len(self.image_sets)
        networks, sets = "network" + "s" * (K != 1), "image set" + "s" * (S != 1)
        return f"{len(self):,} caches of {K} {networks} and {S} {sets}; images x views of each:"

    def _left_out(self) -> list[str]:
        more = len(self.networks) - _ROWS
        return [f"... and {more:,} more networks in .networks"] if more > 0 else []

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """A row a network, a column an image set."""
        header = ["network", "id", "features", *self.image_sets]
        cells: dict[str | None, dict[str, list[str]]] = {}
        first: dict[str, FeatureCache] = {}
        shown = set(self.networks[:_ROWS])
        for name, cache in self._named:
            other = first.setdefault(name, cache)
            if cache.network_id in shown:
                found = cells.setdefault(cache.network_id, {}).setdefault(name, [])
                found.append(_cell(cache, other))
        about = {cache.network_id: cache for cache in self.caches}
        rows = []
        for network in self.networks[:_ROWS]:
            cache = about[network]
            columns = [" and ".join(cells[network].get(name, ["-"])) for name in self.image_sets]
            rows.append([_name(cache), short(network), f"{cache.shape[2]:,}", *columns])
        return header, rows


def refuse_other_images(caches: Sequence[FeatureCache]) -> None:
    """Caches that stand side by side must be of the same images in the same order.

    Raises
    ------
    InputError
        Naming the first that is not, and what differs.
    """
    for cache in caches[1:]:
        first = caches[0]
        if not cache.has_images_of(first):
            raise InputError(
                f"{cache.path}: its images are not those of {first.path} "
                f"({_difference(cache.ids, first.ids, 'images')}); write both with the same "
                "ids in one order (extract: the same --images and --ids), or do not use them as "
                "one image set"
            )


def refuse_other_classes(caches: Sequence[FeatureCache]) -> None:
    """Caches that stand side by side must have the same classes, where they have any.

    Raises
    ------
    InputError
        Naming the first that has not, and what differs.
    """
    having = [cache for cache in caches if len(cache.classes)]
    for cache in having[1:]:
        first = having[0]
        if not np.array_equal(cache.classes, first.classes):
            raise InputError(
                f"{cache.path}: its classes are not those of {first.path} "
                f"({_difference(cache.classes, first.classes, 'classes')}); write both with the "
                "same classes in the same order, or use the caches apart"
            )


def _difference(ours: np.ndarray, theirs: np.ndarray, what: str) -> str:
    if len(ours) != len(theirs):
        return f"{len(ours):,} {what} and {len(theirs):,}"
    at = int(np.flatnonzero(ours != theirs)[0])
    order = "the same in another order: " * np.array_equal(np.sort(ours), np.sort(theirs))
    return f"{order}number {at} is {str(ours[at])!r} and {str(theirs[at])!r}"


def _open(places: Place | Iterable[Place], recursive: bool) -> list[FeatureCache]:
    """Every cache once, whichever places lead to it, and every selection that was given."""
    listed = [places] if isinstance(places, str | os.PathLike | FeatureCache) else list(places)
    found: dict[Path | int, FeatureCache] = {}
    for place in listed:
        if isinstance(place, FeatureCache):
            # Two selections of one file may be of other rows.
            whole = place._rows is None
            found.setdefault(place.path.resolve() if whole else id(place), place)
            continue
        path = Path(place)
        for file in _files(path, recursive) if path.is_dir() else [path]:
            if file.resolve() not in found:
                found[file.resolve()] = FeatureCache(file)
    if not found:
        where = " ".join(map(str, listed)) or "an empty list"
        raise InputError(f"{where}: no .h5 file there; check the folder, or fill it by extraction")
    return list(found.values())


def _files(folder: Path, recursive: bool) -> list[Path]:
    """Its .h5 files, sorted; those of folders below, too, wherever links lead to."""
    folders = walk(folder) if recursive else [next(walk(folder), ("", []))]
    return sorted(Path(at, name) for at, names in folders for name in names if name.endswith(".h5"))


def _common_folder(caches: Sequence[FeatureCache]) -> Path:
    return Path(os.path.commonpath([os.path.abspath(cache.path.parent) for cache in caches]))


def _folder(cache: FeatureCache, above: Path) -> str:
    """The folder of a cache as seen from above; the name of `above` for one right in it."""
    name = Path(os.path.abspath(cache.path.parent)).relative_to(above).as_posix()
    return above.name if name == "." else name


def _cell(cache: FeatureCache, first: FeatureCache) -> str:
    n, v, _ = cache.shape
    text = f"{n:,} x {v}"
    skipped = n - int(np.count_nonzero(cache.valid))
    if skipped:
        text += f", {skipped:,} skipped"
    return text if cache.has_images_of(first) else text + ", other images"


def _name(cache: FeatureCache) -> str:
    """Its beginning, if it is that of many networks side by side."""
    name = cache.network_name
    return name if len(name) <= _NAME else name[: _NAME - 3] + "..."


def short(network: str | None) -> str:
    """The beginning of a network's id, as it is shown."""
    return "without id" if network is None else network[:SHORT]

"""Train image networks from scratch once and keep their penultimate embeddings in HDF5.

Only numpy, scipy and h5py are needed to read caches; training and extraction
need the ``[extract]`` extra (torch, torchvision, timm, Pillow).

Features from anywhere become a cache:

>>> import numpy as np, tempfile
>>> features, labels = np.eye(3, 4), np.array([[1, 0], [0, 1], [1, 1]])
>>> with tempfile.TemporaryDirectory() as folder:
...     file = f"{folder}/mine.h5"
...     cache = FeatureCache.write(file, features, ["a", "b", "c"], labels, ["cat", "dog"])
...     cache.shape, cache.select(["c"]).x("eval").tolist()
((3, 1, 4), [[0.0, 0.0, 1.0, 0.0]])
"""

from featcache.annotations import Labels
from featcache.cache import FeatureCache
from featcache.cacheset import CacheSet
from featcache.errors import InputError

__all__ = ["CacheSet", "FeatureCache", "InputError", "Labels"]
__version__ = "0.1.0"

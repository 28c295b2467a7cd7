"""Train image networks from scratch once and keep their penultimate embeddings in HDF5.

Only numpy, scipy and h5py are needed to read caches; training and extraction
need the ``[extract]`` extra (torch, torchvision, timm, Pillow).
"""

from featcache.annotations import Labels
from featcache.cache import FeatureCache
from featcache.cacheset import CacheSet
from featcache.errors import InputError

__all__ = ["CacheSet", "FeatureCache", "InputError", "Labels"]
__version__ = "0.1.0"

"""Kanji in typefaces: the data, a network and an augmentation of the examples."""

from examples.kanji.dataset import GROUPS, unpack
from examples.kanji.network import CROP, augment, small_resnet

__all__ = ["CROP", "GROUPS", "augment", "small_resnet", "unpack"]

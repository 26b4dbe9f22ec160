"""Data modules: images with labels, and how many classes and channels they have."""

from msv.data.base import ImageData
from msv.data.cifar import CIFAR10, CIFAR100
from msv.data.digits import Digits
from msv.data.fashion_mnist import FashionMNIST
from msv.data.image_folder import ImageFolder
from msv.data.image_paths import ImagePaths
from msv.data.pathfinder import Pathfinder

__all__ = ["CIFAR10", "CIFAR100", "Digits", "FashionMNIST", "ImageData", "ImageFolder", "ImagePaths", "Pathfinder"]

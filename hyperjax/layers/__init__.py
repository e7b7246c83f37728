"""Layers that stay fast when the members of a population have weights of their own."""

from ._conv import conv as conv
from ._conv import conv_general_dilated as conv_general_dilated

"""Searches by ask and tell: what proposes points of the unit cube and learns from their scores."""

from ._types import Search as Search

"""Tuning problems with real data, and how to load one's own."""

from ._a9a import a9a as a9a
from ._data import DataError as DataError
from ._data import DataFile as DataFile
from ._data import DataStatus as DataStatus
from ._data import catalogue as catalogue
from ._data import find as find
from ._data import read as read
from ._digits import digits as digits
from ._mnist import mnist as mnist
from ._registry import get as get
from ._registry import load as load
from ._registry import names as names
from ._task import Task as Task
from ._task import check_task as check_task

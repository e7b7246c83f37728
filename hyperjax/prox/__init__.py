"""Proximal operators `(params, hparams, rate) -> params` of rate times a penalty."""

from ._prox import Prox as Prox
from ._prox import box as box
from ._prox import elastic_net as elastic_net
from ._prox import lasso as lasso
from ._prox import non_negative as non_negative

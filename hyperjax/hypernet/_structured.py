"""The structured best response: any model's params, each leaf with a rule of how it answers."""

import re
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import jax

from .. import _checks, _tree
from .._types import HParams, Key, Params, PyTree
from ._rules import Gated, Rule, gate, materialize
from ._types import Hypernet, ravel


class BestResponse(NamedTuple):
    """The weights of `structured`: params, and how each leaf answers."""

    base: Params  # as the model has them
    response: tuple[PyTree, ...]  # of every leaf, in the order of the leaves


def structured(rules: Mapping[str, Rule]) -> Hypernet:
    """Params that answer to hparams leaf by leaf, without a change to the model.

    `rules` maps regular expressions to rules; for every leaf the first whose expression is found
    in its path holds. Paths are written with dots: "layers.0.kernel", and "layers.0.kernel.value"
    in the state of a Flax NNX model, so that a `$` is best left out.

    >>> import hyperjax as hj
    >>> from hyperjax.hypernet import affine, gate, structured
    >>> net = structured({"kernel": gate(), "bias": affine()})

    phi is a `BestResponse`: `phi.base` are params, `phi.response` the answers. `apply` returns
    params with every weight added up; for one sample of hyperparameters per example see `factored`.

    `init` raises ValueError if an expression matches no leaf or a leaf no expression, or if there
    are no hyperparameters, TypeError for leaves of params or hparams that are not real
    floating-point arrays; `apply` ValueError for another number of hyperparameters than in `init`.
    `rules` that are not a mapping from text to rules raise TypeError at once.
    """
    lazy = factored(rules)

    def apply(phi: BestResponse, hparams: HParams) -> Params:
        return jax.tree.map(materialize, lazy.apply(phi, hparams), is_leaf=_is_gated)

    return lazy._replace(apply=apply)


def factored(rules: Mapping[str, Rule]) -> Hypernet:
    """`structured(rules)` whose `apply` leaves gated weights as `Gated`, for layers that take them.

    Under vmap over hparams such layers hold no weight per example, only a gate. `phi` is the same.
    """
    patterns = compiled(rules)

    def init(key: Key, params: Params, hparams: HParams) -> BestResponse:
        _checks.differentiable("structured", "params", params)
        _checks.differentiable("structured", "hparams", hparams)
        params, count = _tree.strong(params), _tree.size(_tree.strong(hparams))
        if count == 0:
            raise ValueError("structured: `hparams` has no leaves; there is nothing to answer to.")
        leaves, chosen = jax.tree.leaves(params), match(patterns, params)
        keys = jax.random.split(key, len(leaves))
        response = [r.init(k, x, count) for (_, r), k, x in zip(chosen, keys, leaves, strict=True)]
        return BestResponse(params, _tree.strong(tuple(response)))

    def apply(phi: BestResponse, hparams: HParams) -> PyTree:
        leaves, tree = jax.tree.flatten(phi.base)
        chosen, z = match(patterns, phi.base), ravel(hparams)
        rows = zip(chosen, leaves, phi.response, strict=True)
        return tree.unflatten([r.weight(x, c, z.astype(x.dtype)) for (_, r), x, c in rows])

    return Hypernet(init, apply, all(rule.linear for rule in rules.values()))


def gated(*, scale: float = 0.01) -> Hypernet:
    """Every leaf by the rule `gate`: the layers of self-tuning networks, for any model.

    It costs twice the parameters and one gate [h, out] per leaf.
    """
    return structured({"": gate(scale=scale)})


Patterns: TypeAlias = Mapping[str, tuple[re.Pattern, Rule]]


def compiled(rules: Mapping[str, Rule]) -> Patterns:
    if not isinstance(rules, Mapping):
        raise TypeError(
            "structured: `rules` must map regular expressions to rules; got "
            f'{type(rules).__name__}. `{{"": rule}}` is one rule for all leaves.'
        )
    for name, rule in rules.items():
        _checks.has_functions("structured", f"rules[{name!r}]", rule, ("init", "weight"))
    return {name: (_compile(name), rule) for name, rule in rules.items()}


def _compile(name: str) -> re.Pattern:
    if not isinstance(name, str):
        raise TypeError(
            f"structured: the names of `rules` must be text, regular expressions; got {name!r}."
        )
    try:
        return re.compile(name)
    except re.error as error:
        raise ValueError(
            f"structured: rules[{name!r}] must be a regular expression; {error}. `re.escape` takes "
            "a name as it is."
        ) from error


def match(patterns: Patterns, params: Params) -> list[tuple[str, Rule]]:
    """The name and the rule of every leaf."""
    names = [_checks.dotted(k) for k, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = [next((p for p, (r, _) in patterns.items() if r.search(n)), None) for n in names]
    idle = [p for p in patterns if p not in found]
    bare = [n for n, p in zip(names, found, strict=True) if p is None]
    if idle or bare:
        faults = [f"{p!r} matches no leaf that is left to it" for p in idle]
        faults += [f"no rule matches {n!r}" for n in bare]
        raise ValueError(
            f"structured: {'; '.join(faults)}. The leaves are {', '.join(map(repr, names))}; the "
            'first rule that matches holds, and `"": none()` at the end takes what is left.'
        )
    rows = zip(names, found, strict=True)
    return [(name, patterns[p][1]) for name, p in rows if p is not None]


def _is_gated(x) -> bool:
    return isinstance(x, Gated)

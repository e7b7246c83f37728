"""Trees: a part is replaced where it is selected, and only there."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperjax as hj
from hyperjax import _tree


class Inner(NamedTuple):
    params: dict
    opt_state: tuple


class Outer(NamedTuple):
    hparams: jax.Array
    carry: Inner


def outer() -> Outer:
    shared = jnp.ones(2)  # one array in two places, and equal values in others
    return Outer(jnp.ones(()), Inner({"w": shared, "b": jnp.ones(2)}, (shared, None)))


def test_replace_at_replaces_the_selected_part_only():
    tree = outer()
    params = {"w": jnp.zeros(3), "b": jnp.full(2, 7.0)}
    new = _tree.replace_at(lambda t: t.carry.params, tree, params)
    np.testing.assert_array_equal(new.carry.params["w"], np.zeros(3))
    np.testing.assert_array_equal(new.carry.params["b"], np.full(2, 7.0))
    assert new.carry.opt_state is not None
    assert new.carry.opt_state[0] is tree.carry.opt_state[0]  # the same array elsewhere stays
    assert new.hparams is tree.hparams
    assert jax.tree.structure(new) == jax.tree.structure(tree)


def test_replace_at_selects_leaves_roots_and_several_parts():
    tree = outer()
    leaf = _tree.replace_at(lambda t: t.carry.params["b"], tree, jnp.zeros(2))
    np.testing.assert_array_equal(leaf.carry.params["b"], np.zeros(2))
    assert leaf.carry.params["w"] is tree.carry.params["w"]
    assert _tree.replace_at(lambda t: t, tree, tree) == tree
    two = _tree.replace_at(lambda t: (t.carry.params["b"], t.hparams), tree, (3.0, 4.0))
    assert (two.carry.params["b"], two.hparams) == (3.0, 4.0)


def test_replace_at_under_jit_and_vmap():
    set_to = lambda t, v: _tree.replace_at(lambda s: s.carry.params["w"], t, v)
    many = jax.jit(jax.vmap(set_to, (None, 0)))(outer(), jnp.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(many.carry.params["w"], np.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(many.carry.params["b"], np.ones((3, 2)))


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (lambda t: jnp.zeros(2), 1.0, "must select parts .* got"),
        (lambda t: (t.hparams, t.hparams), (1.0, 2.0), "each once"),
        (lambda t: t.carry.params, jnp.ones(2), "structure of what `where` selects"),
    ],
)
def test_replace_at_refuses_what_is_no_selection(where, value, message):
    with pytest.raises(ValueError, match=message):
        _tree.replace_at(where, outer(), value)


def test_copies_are_equal_rows():
    tree = {"a": np.arange(6.0).reshape(2, 3), "b": jnp.float32(7), "key": jax.random.key(3)}
    got = jax.jit(lambda t: hj.copies(t, 4))(tree)
    assert got["a"].shape == (4, 2, 3) and got["b"].shape == (4,) and got["b"].dtype == jnp.float32
    for i in range(4):
        np.testing.assert_array_equal(got["a"][i], tree["a"])
        assert got["key"][i] == tree["key"]
    with pytest.raises(ValueError, match="copies: `count` must be an integer >= 1; got 0"):
        hj.copies(tree, 0)

"""What holds for every row of LOSSES about how it is called: dtypes, numbers of candidates, keywords."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses import LOSSES
from jaxdpo.types import InputError
from tests.losses.table_rows import DEVICES, GROUPS, ROWS, draw, loss, loss_and_gradient, options_of, over


@over(ROWS)
def test_bfloat16_is_computed_in_float32(name):
    x = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16) if array.dtype == np.float32 else array, draw(name))
    steps = str(jax.make_jaxpr(lambda *inputs: loss(name, *inputs))(x, options_of(name)))
    results = [line.split(" = ")[0] for line in steps.splitlines() if " = " in line]
    assert any("f32[" in result for result in results)
    assert not any("bf16[" in result for result in results)


@over(ROWS)
def test_data_decides_on_the_dtype_and_nothing_is_promoted_by_accident(name):
    x = draw(name)

    def dtypes(policy, ref, scalars):
        def cast(array, dtype):
            return None if array is None else jnp.asarray(array, dtype)

        options = {key: jnp.asarray(value, scalars) for key, value in options_of(name).items()}
        mixed = x._replace(policy=cast(x.policy, policy), ref=cast(x.ref, ref))
        return {out.dtype for out in jax.eval_shape(lambda *inputs: loss_and_gradient(name, *inputs), mixed, options)}

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        assert dtypes(jnp.float64, jnp.float64, jnp.float32) == {jnp.dtype(jnp.float64)}
        assert dtypes(jnp.float32, jnp.float32, jnp.float64) == {jnp.dtype(jnp.float32)}
        assert dtypes(jnp.bfloat16, jnp.float32, jnp.float32) == {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}


@over(ROWS)
def test_number_of_candidates_is_as_stated(name):
    spec, x = ROWS[name], draw(name)
    for candidates in (1, 2, 3, 5):

        def resize(array, candidates=candidates):
            return array if array.ndim == 2 else np.resize(array, (DEVICES, GROUPS, candidates))

        resized = jax.tree.map(resize, x)
        if spec.candidates in (None, candidates):
            out = jax.eval_shape(lambda *inputs: loss(name, *inputs), resized, options_of(name))
            assert out.shape == (DEVICES, GROUPS)
        else:
            with pytest.raises(InputError, match=f"{candidates} candidates"):
                jax.eval_shape(lambda *inputs: loss(name, *inputs), resized, options_of(name))


@over(LOSSES)
def test_options_are_all_keywords_and_named_in_the_row(name):
    spec = LOSSES[name]
    parameters = inspect.signature(spec.fn).parameters.values()
    keywords = {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    positional = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    assert positional == ["policy_logps", "ref_logps"][: 1 + spec.needs_reference]
    assert keywords.pop("where").default is None
    estimates = {"targets", "kl", "baseline", "mean_length"}  # what a caller may know better; None by default
    assert all(keywords.pop(key).default is None for key in estimates & set(keywords))
    assert ("divergence" in keywords) == spec.divergence
    assert ("axis_name" in keywords) == (spec.coupling != "none")
    assert set(keywords) - {"divergence", "axis_name"} == {*spec.options, *spec.data}
    with pytest.raises(TypeError, match="unexpected keyword argument 'betta'"):
        spec.fn(*draw(name)[:2], betta=0.1)

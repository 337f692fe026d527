"""Posteriors on disk: what comes back is what was saved, and what is wrong with a file is named."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from diffsbi.flows import coupling
from diffsbi.inference import NLE, NPE, load_posterior, prior_from_json, prior_to_json
from diffsbi.inference.persist import MAGIC
from diffsbi.prior import Prior

SMALL = {"layers": 1, "width": 8, "depth": 1}


def make_prior(**changes):
    distributions = {
        "a": dist.Normal(0.0, 1.0),
        "b": dist.Uniform(-1.0, 2.0),
        "c": dist.LogNormal(-0.1, 0.5),
        "d": dist.TruncatedNormal(0.3, 0.2, low=0.0),
        "e": dist.TruncatedNormal(-1.0, 0.9, low=-2.0, high=-0.3),
        "f": dist.TruncatedNormal(0.0, 0.9, high=0.5),
    }
    return Prior(distributions | changes, {"a": 0.5})


def fitted(prior, density="coupling", options=SMALL, members=2):
    theta = prior.sample(jax.random.key(0), (30,))
    estimator = NPE(prior, density, density_options=options).append(theta, theta[:, :3])
    return estimator.fit(jax.random.key(1), members=members, max_epochs=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("posterior") / "deep" / "a.posterior"
    posterior = fitted(make_prior())
    posterior.save(path)
    return posterior, path


@pytest.mark.optimised
def test_round_trip(saved):
    posterior, path = saved
    loaded = load_posterior(path)
    x = jnp.asarray([0.1, 0.2, 0.9])
    theta = posterior.sample(jax.random.key(2), 5, x)
    np.testing.assert_array_equal(loaded.sample(jax.random.key(2), 5, x), theta)
    np.testing.assert_array_equal(loaded.log_prob(theta, x), posterior.log_prob(theta, x))
    assert loaded.names == posterior.names and loaded.config == posterior.config
    np.testing.assert_array_equal(loaded.prior.fiducial, posterior.prior.fiducial)
    np.testing.assert_array_equal(loaded.history.validation, posterior.history.validation)
    assert loaded.history.stop_reason == posterior.history.stop_reason
    assert b"pickle" not in path.read_bytes()
    inside = eqx.filter_jit(lambda p: p.log_prob(theta, x))(loaded)
    # Terms of order one are added in another order: two units in the last place of theirs.
    np.testing.assert_allclose(inside, posterior.log_prob(theta, x), rtol=1e-6, atol=5e-7)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_default_data_are_saved(saved, tmp_path):
    posterior, _ = saved
    x = jnp.asarray([0.1, 0.2, 0.9])
    posterior.condition(x).save(tmp_path / "b")
    draws = load_posterior(tmp_path / "b").sample(jax.random.key(2), 5)
    np.testing.assert_array_equal(draws, posterior.sample(jax.random.key(2), 5, x))


def test_prior_description_round_trip():
    prior = make_prior()
    again = prior_from_json(json.loads(json.dumps(prior_to_json(prior))))
    theta = prior.sample(jax.random.key(0), (20,))
    np.testing.assert_allclose(again.log_prob(theta), prior.log_prob(theta), rtol=1e-6)
    np.testing.assert_array_equal(again.fiducial, prior.fiducial)
    with pytest.raises(ValueError, match="Cannot describe the Gamma prior of 'g' in JSON"):
        prior_to_json(make_prior(g=dist.Gamma(2.0, 1.0)))


def test_prior_without_description_is_asked_for(tmp_path):
    prior = Prior({"g": dist.Gamma(2.0, 1.0), "a": dist.Normal(0.0, 1.0), "b": dist.Normal(0.0, 1.0)})
    posterior = fitted(prior, members=1)
    posterior.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"Expected prior=.*\['g', 'a', 'b'\]"):
        load_posterior(tmp_path / "a")
    assert load_posterior(tmp_path / "a", prior).names == prior.names


def test_own_density_is_asked_for(tmp_path):
    own = lambda key, dim, condition_dim: coupling(key, dim, condition_dim, layers=1, width=4, depth=1)  # noqa: E731
    posterior = fitted(make_prior(), own, {}, members=1)
    posterior.save(tmp_path / "a")
    with pytest.raises(ValueError, match="Expected density="):
        load_posterior(tmp_path / "a")
    theta, x = make_prior().fiducial, jnp.zeros(3)
    assert load_posterior(tmp_path / "a", density=own).log_prob(theta, x) == posterior.log_prob(theta, x)
    with pytest.raises(ValueError, match="arrays of shapes"):
        load_posterior(tmp_path / "a", density=coupling)


def test_another_prior_is_named(saved):
    _, path = saved
    with pytest.raises(ValueError, match=r"prior of \['a', .*'f'\].*got \['a'\]"):
        load_posterior(path, Prior({"a": dist.Normal(0.0, 1.0)}))
    with pytest.raises(ValueError, match="of 'b', as in .*'high': 3.0"):
        load_posterior(path, make_prior(b=dist.Uniform(-1.0, 3.0)))
    assert load_posterior(path, make_prior()).names == make_prior().names


def edited(path, tmp_path, edit):
    other = tmp_path / "edited"
    other.write_bytes(edit(path.read_bytes()))
    return other


def replaced_header(content, **changes):
    head, _, payload = content[len(MAGIC) :].partition(b"\n")
    return MAGIC + json.dumps(json.loads(head) | changes).encode() + b"\n" + payload


@pytest.mark.parametrize(("edit", "message"), [
    (lambda c: c[:-100], "bytes of arrays.*truncated"),
    (lambda c: c[:60], "complete header.*truncated or damaged"),
    (lambda c: c[:-50] + bytes([c[-50] ^ 1]) + c[-49:], "checksum.*damaged"),
    (lambda c: b"PK" + c, "a diffsbi posterior in .*starts with b'PK"),
    (lambda c: b"", "a diffsbi posterior in .*starts with b''"),
    (lambda c: replaced_header(c, version=99), "version 1 of the posterior format in .*; got 99"),
    (lambda c: replaced_header(c, shapes=[[3]]), r"arrays of shapes \[\[3\]\]"),
    (lambda c: replaced_header(c, dtype="float64"), "floats of float32.*has float64"),
])  # fmt: skip
def test_what_is_wrong_with_a_file_is_named(saved, tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        load_posterior(edited(saved[1], tmp_path, edit))


def test_failed_save_leaves_the_old_file(saved, tmp_path, monkeypatch):
    posterior, path = saved
    target = tmp_path / "kept"
    target.write_bytes(path.read_bytes())

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        posterior.save(target)
    assert target.read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


MIXTURE = "mixture", {"components": 2, "width": 8, "depth": 1}
CONTINUOUS = "continuous", {"steps": 3, "width": 8, "depth": 1}


@pytest.mark.parametrize(("estimator", "density", "options"), [
    (NPE, *MIXTURE),
    (NLE, *CONTINUOUS),
    pytest.param(NLE, *MIXTURE, marks=pytest.mark.slow),
    pytest.param(NPE, *CONTINUOUS, marks=pytest.mark.slow),
])  # fmt: skip
def test_densities_without_layers_train_on_scores_and_come_back(tmp_path, estimator, density, options):
    prior = Prior({"a": dist.Normal(0.0, 1.0), "b": dist.Uniform(-1.0, 2.0)})
    theta = prior.sample(jax.random.key(0), (40,))
    x = theta + 0.3 * jax.random.normal(jax.random.key(1), theta.shape)
    rows = estimator(prior, density, density_options=options).append(theta, x, (x - theta) / 0.3**2)
    posterior = rows.fit(jax.random.key(2), members=1, max_epochs=3)
    posterior.save(tmp_path / "a")
    value = posterior.log_prob(theta, x)
    assert np.all(np.isfinite(value))
    np.testing.assert_array_equal(load_posterior(tmp_path / "a").log_prob(theta, x), value)

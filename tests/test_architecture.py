"""What is known of a model by its config alone agrees with what is published and with the model."""

from __future__ import annotations

import pytest

import moelab
from moelab.store.architecture import KNOWN, Architecture


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_model_has_the_parameters_that_are_published(name):
    said = KNOWN[name]["billions"]
    last_digit = 10.0 ** -len(str(said).partition(".")[2])
    found = Architecture(name).parameters / 1e9
    assert found == pytest.approx(said, rel=0.02, abs=last_digit / 2)


def test_an_architecture_says_what_an_opened_model_takes(demo_store):
    found = Architecture(demo_store / "model")
    with moelab.open(demo_store, progress=False) as lab:
        info, shape = lab.info(), lab._store.shape
    assert found.shape == shape
    assert found.dense_bytes() == info["dense_bytes"]
    assert found.parameters - found.expert_parameters == info["non_expert_parameters"]


def test_a_name_that_is_no_architecture_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="olmoe-1b-7b"):
        Architecture("olmoe")

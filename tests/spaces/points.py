"""Points of a space, for the tests of this folder."""

import keras_tuner


def point(values):
    hp = keras_tuner.HyperParameters()
    hp.values = dict(values)
    return hp


def registered(space):
    hp = point({})
    space.build(hp)
    return hp.space


def random_values(parameters, seed):
    hp = point({})
    for number, parameter in enumerate(parameters):
        if all(condition.is_active(hp.values) for condition in parameter.conditions):
            hp.values[parameter.name] = parameter.random_sample(seed * 1_000 + number)
    return hp.values

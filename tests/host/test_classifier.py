"""The demo's judge names drawings it has never seen, clean or spoilt as a generator might."""

import torch

import classifier
from drawings import CLASSES


def test_it_names_held_out_drawings():
    judge = classifier.load()
    assert classifier.accuracy(judge, 1700, seed=2_000_000) >= 0.99
    assert classifier.accuracy(judge, 850, seed=3_000_000, spoilt=True) >= 0.98


def test_features_bring_the_same_thing_together():
    judge = classifier.load()
    pixels, labels = classifier.drawings(170, seed=4_000_000)
    features = judge.features(pixels)
    assert features.shape == (170, classifier.FEATURES)
    distances = torch.cdist(features, features) + torch.eye(170) * 1e9
    assert (labels[distances.argmin(1)] == labels).float().mean() >= 0.99


def test_the_names_and_the_file():
    pixels, labels = classifier.drawings(len(CLASSES), seed=5_000_000)
    assert classifier.load().names(pixels) == [CLASSES[index] for index in labels]
    assert classifier.WEIGHTS.stat().st_size <= 500_000

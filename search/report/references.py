"""Published test accuracies on Fashion-MNIST, which a result is shown beside.

Baselines: as published by their authors; studies/baselines.py trains each of them. Field: the data
set authors' benchmark list (https://github.com/zalandoresearch/fashion-mnist).
"""

from __future__ import annotations

DATASET = "fashion_mnist"

BASELINES = {
    "dropout-cnn": 0.9139,
    "basic-cnn": 0.9120,
    "advanced-cnn": 0.8986,
    "optimum-cnn": 0.9031,
    "batchnorm-cnn": 0.9207,
    "vgg16-transfer": 0.9204,
}
FIELD = {
    "Human (crowd, no expertise)": 0.835,
    "2 Conv + pooling (TensorFlow tutorial)": 0.916,
    "VGG16, 26M parameters": 0.935,
    "2 Conv + 3 FC ~500K, augmentation": 0.934,
    "Google AutoML, 24 compute hours": 0.939,
    "2 Conv + 2 FC, horizontal flips": 0.939,
    "CNN with shortcuts, random erasing": 0.947,
    "ResNet18, augmentation": 0.949,
    "DENSER (evolutionary search)": 0.953,
    "DenseNet-BC 768K, crops and flips": 0.954,
    "WRN-28-10 + random erasing": 0.963,
    "WRN40-4 8.9M, crops and flips": 0.967,
}
SOURCE = "the data set authors' benchmark list"

"""Scikit-learn's digits for TensorFlow Datasets, and the way to open a set."""

import sys
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from sklearn import datasets

_DESCRIPTION = """\
1,797 handwritten digits, scanned to 8 by 8 pixels. They come with
scikit-learn, so that preparing them needs no network.
"""

_CITATION = """\
@misc{alpaydin1998digits,
  title={Optical Recognition of Handwritten Digits},
  author={Alpaydin, Ethem and Kaynak, Cenk},
  year={1998},
  howpublished={UCI Machine Learning Repository},
  doi={10.24432/C50P49}
}
"""

# The scans count the ink in blocks of 4 by 4 pixels, so they end at 16.
_MOST_INK = 16


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,438 digits to train on and 359 to test with.

    Importing this module registers the builder: `tfds.load("digits")` then
    works like the name of any set that TensorFlow Datasets brings itself.
    Images are `uint8` of shape `(8, 8, 1)`, from 0 for paper to 255 for ink;
    labels are the digits 0 to 9.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/",
            citation=_CITATION,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator]:
        del dl_manager  # Nothing is downloaded.
        digits = datasets.load_digits()
        pixels = np.round(digits.images * (255 / _MOST_INK)).astype(np.uint8)
        examples = [
            (index, {"image": image[..., np.newaxis], "label": int(label)})
            for index, (image, label) in enumerate(
                zip(pixels, digits.target, strict=True)
            )
        ]
        # The scans are sorted by writer. Every fifth one is for the test, so
        # that both splits hold digits of every writer.
        return {
            "train": self._generate_examples(
                example for example in examples if example[0] % 5 != 4
            ),
            "test": self._generate_examples(examples[4::5]),
        }

    def _generate_examples(
        self, examples: Iterator[tuple[int, dict]]
    ) -> Iterator[tuple[int, dict]]:
        yield from examples


def open_dataset(
    name: str, data_dir: str | None
) -> tuple[tf.data.Dataset, tf.data.Dataset, tfds.core.DatasetInfo]:
    """Opens any image classification set, and prepares it the first time.

    Args:
        name: What TensorFlow Datasets calls the set.
        data_dir: Where it keeps prepared sets; None for its usual place.

    Returns:
        Pairs of image and label to train on, others to test with, and what
        the builder says about both.

    Raises:
        SystemExit: If there is no such set, if it has no labeled images of
            one shape or no test split, or if preparing it fails.
    """
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not _labels_images(builder.info):
            raise ValueError("it has no labeled images of one shape")
        builder.download_and_prepare()
        train, test = builder.as_dataset(
            split=["train", "test"], as_supervised=True
        )
    # Builders run code of their own, in which anything may go wrong.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        sys.exit(
            f"--dataset={name} cannot be used ({reason.rstrip('.')}). Name an"
            " image classification set of TensorFlow Datasets with the splits"
            " `train` and `test`; `digits` needs no network."
        )
    return train, test, builder.info


def _labels_images(info):
    if info.supervised_keys != ("image", "label"):
        return False
    image, label = info.features["image"], info.features["label"]
    return (
        isinstance(image, tfds.features.Image)
        and None not in image.shape
        and isinstance(label, tfds.features.ClassLabel)
    )

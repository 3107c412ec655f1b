"""A network as a classifier of scikit-learn, cross-validated in a pipeline.

After https://keras.io/api/utils/sklearn_wrappers/
"""

import keras
from sklearn import model_selection
from sklearn import pipeline
from sklearn import preprocessing

# accum+: import keras_accum
from conformance import program_data


def make(X, y, units):
    inputs = keras.Input(X.shape[1:])
    hidden = keras.layers.Dense(units, activation="relu")(inputs)
    outputs = keras.layers.Dense(y.shape[1], activation="softmax")(hidden)
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        "categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def main(batch_size, epochs):
    images, classes = program_data.digits()
    table, classes = images.reshape(64, -1), classes % 3
    classifier = keras.wrappers.SKLearnClassifier(
        model=make,
        model_kwargs={"units": 16},
        fit_kwargs={
            "batch_size": batch_size,
            "epochs": epochs,
            "shuffle": False,
            "verbose": 0,
        },
    )
    steps = pipeline.make_pipeline(preprocessing.StandardScaler(), classifier)
    scores = model_selection.cross_val_score(
        steps, table, classes, cv=2, error_score="raise"
    )
    assert len(scores) == 2
    steps.fit(table, classes)
    # Goes on from the model that was fitted, which is copied.
    again = keras.wrappers.SKLearnClassifier(
        classifier.model_, fit_kwargs=classifier.fit_kwargs
    )
    again.fit(table, classes)
    return again.model_

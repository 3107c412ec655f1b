"""A detector: two levels of features, and losses of boxes and of classes.

After https://keras.io/examples/vision/retinanet/
"""

import keras
import numpy as np

# accum+: import keras_accum
from conformance import program_data

CLASSES = 2
IGNORED = -2.0


class BoxLoss(keras.losses.Loss):
    """Smooth L1 of the anchors that have a box."""

    def call(self, y_true, y_pred):
        gap = keras.ops.abs(y_true[..., :4] - y_pred)
        loss = keras.ops.where(gap < 1.0, 0.5 * gap**2, gap - 0.5)
        positive = keras.ops.cast(y_true[..., 4] > -1.0, "float32")
        loss = keras.ops.sum(loss, axis=-1) * positive
        count = keras.ops.maximum(keras.ops.sum(positive, axis=-1), 1.0)
        return keras.ops.sum(loss, axis=-1) / count


class FocalLoss(keras.losses.Loss):
    """Focal loss of all anchors but the ignored."""

    def call(self, y_true, y_pred):
        labels = y_true[..., 4]
        one_hot = keras.ops.one_hot(keras.ops.cast(labels, "int32"), CLASSES)
        loss = keras.losses.binary_focal_crossentropy(
            one_hot, y_pred, apply_class_balancing=True, from_logits=True
        )
        loss = keras.ops.where(labels == IGNORED, 0.0, loss)
        positive = keras.ops.cast(labels > -1.0, "float32")
        count = keras.ops.maximum(keras.ops.sum(positive, axis=-1), 1.0)
        return keras.ops.sum(loss, axis=-1) / count


def head(channels, name):
    return keras.Sequential(
        [
            keras.Input((None, None, 8)),
            keras.layers.Conv2D(8, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(channels, 3, padding="same"),
            keras.layers.Reshape((-1, channels)),
        ],
        name=name,
    )


def retinanet():
    images = keras.Input((16, 16, 1))
    c1 = keras.layers.Conv2D(8, 3, 4, "same", activation="relu")(images)
    c2 = keras.layers.Conv2D(8, 3, 2, "same", activation="relu")(c1)
    p2 = keras.layers.Conv2D(8, 1)(c2)
    p1 = keras.layers.Conv2D(8, 1)(c1) + keras.layers.UpSampling2D(2)(p2)
    box_head, class_head = head(4, "box_head"), head(CLASSES, "class_head")
    boxes = keras.layers.Concatenate(axis=1, name="boxes")(
        [box_head(p1), box_head(p2)]
    )
    classes = keras.layers.Concatenate(axis=1, name="classes")(
        [class_head(p1), class_head(p2)]
    )
    outputs = {"boxes": boxes, "classes": classes}
    return keras.Model(images, outputs)
    # accum: return keras_accum.GradientAccumulationModel(images, outputs, **ways)


def targets(masks):
    """Gives the anchors, 4 by 4 and 2 by 2, boxes and labels."""
    labels = []
    for row, mask in enumerate(masks[..., 0]):
        ys, xs = np.nonzero(mask)
        box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        for cells, size in ((4, 4), (2, 8)):
            for y, x in np.ndindex(cells, cells):
                cell = np.array([x, y, x + 1, y + 1]) * size
                covered = mask[cell[1] : cell[3], cell[0] : cell[2]].mean()
                label = -1.0 if covered == 0 else IGNORED
                label = row % CLASSES if covered > 0.3 else label
                labels.append([*(box - cell) / size, label])
    return np.array(labels, "float32").reshape(len(masks), -1, 5)


def main(batch_size, epochs):
    images, masks = program_data.shapes()
    masks[:, 3, 3] = 1  # Each has a box.
    labels = targets(masks)
    model = retinanet()
    model.compile(
        optimizer=keras.optimizers.SGD(0.02, momentum=0.9, clipnorm=10.0),
        loss={"boxes": BoxLoss(), "classes": FocalLoss()},
        loss_weights={"boxes": 1.0, "classes": 2.0},
    )
    model.fit(
        images,
        {"boxes": labels, "classes": labels},
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    )
    return model

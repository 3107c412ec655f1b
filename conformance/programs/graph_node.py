"""Classes of the nodes of one graph, which the model holds.

After https://keras.io/examples/graph/gnn_citations/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum

NODES, FEATURES, CLASSES = 80, 6, 4


def feed_forward(units):
    return keras.Sequential(
        [keras.layers.LayerNormalization(), keras.layers.Dense(units, "gelu")]
    )


class GraphConvolution(keras.layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.prepare = feed_forward(units)
        self.update = feed_forward(units)

    def call(self, nodes, edges, edge_weights):
        messages = self.prepare(tf.gather(nodes, edges[1]))
        messages = messages * edge_weights[:, None]
        gathered = tf.math.unsorted_segment_mean(
            messages, edges[0], num_segments=NODES
        )
        nodes = self.update(tf.concat([nodes, gathered], axis=1))
        return tf.nn.l2_normalize(nodes, axis=-1)


class NodeClassifier(keras.Model):
    # accum: class NodeClassifier(keras_accum.GradientAccumulationModel):
    def __init__(self, graph, units=8, **kwargs):
        super().__init__(**kwargs)
        self.features, self.edges, self.edge_weights = graph
        self.preprocess = feed_forward(units)
        self.first = GraphConvolution(units)
        self.second = GraphConvolution(units)
        self.logits = keras.layers.Dense(CLASSES)

    def call(self, node_ids):
        x = self.preprocess(self.features)
        x = x + self.first(x, self.edges, self.edge_weights)
        x = x + self.second(x, self.edges, self.edge_weights)
        return self.logits(tf.gather(x, node_ids))


def main(batch_size, epochs):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(NODES, FEATURES)).astype("float32")
    edges = rng.integers(0, NODES, (2, 300))
    weights = rng.random(300).astype("float32")
    graph = tf.constant(features), tf.constant(edges), tf.constant(weights)
    classes = np.argmax(features[:, :CLASSES], axis=1)
    model = NodeClassifier(graph)
    # accum: model = NodeClassifier(graph, **ways)
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="acc")],
    )
    trained = rng.permutation(NODES)[:64]
    model.fit(
        x=trained,
        y=classes[trained],
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    )
    return model

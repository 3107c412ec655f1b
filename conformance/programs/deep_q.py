"""Deep Q-learning: a replay memory, and a target network that follows.

After https://keras.io/examples/rl/deep_q_network_breakout/
"""

import keras
import numpy as np

# accum+: import keras_accum

SIZE, ACTIONS, MEMORY, UPDATES = 5, 4, 96, 6
MOVES = np.array([[0, 1], [1, 0], [0, -1], [-1, 0]])


def network():
    states = keras.Input((2,), name="states")
    masks = keras.Input((ACTIONS,), name="masks")
    hidden = keras.layers.Dense(16, activation="relu")(states)
    values = keras.layers.Dense(ACTIONS)(hidden)
    chosen = keras.layers.Dot(axes=1)([values, masks])
    return [states, masks], chosen, keras.Model(states, values)


def play(policy, rng):
    """Fills a memory with steps on a grid, to its corner."""
    at, memory = np.zeros(2, int), []
    for _ in range(MEMORY):
        action = rng.integers(ACTIONS)
        if rng.uniform() > 0.5:
            state = at[None].astype("float32") / SIZE
            action = int(policy.predict_on_batch(state).argmax())
        after = np.clip(at + MOVES[action], 0, SIZE - 1)
        done = bool((after == SIZE - 1).all())
        memory.append((at / SIZE, action, after / SIZE, float(done)))
        at = np.zeros(2, int) if done else after
    return [np.array(each, "float32") for each in zip(*memory, strict=True)]


def main(batch_size, epochs):
    rng = np.random.default_rng(0)
    inputs, chosen, policy = network()
    model = keras.Model(inputs, chosen)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, chosen, **ways)
    _, _, target = network()
    target.set_weights(policy.get_weights())
    model.compile(
        keras.optimizers.SGD(0.1, global_clipnorm=1.0), keras.losses.Huber()
    )
    for _ in range(epochs):
        states, actions, after, done = play(policy, rng)
        for _ in range(UPDATES * 32 // batch_size):
            rows = rng.integers(0, MEMORY, batch_size)
            future = target.predict_on_batch(after[rows]).max(axis=1)
            goals = done[rows] + 0.9 * (1 - done[rows]) * future
            masks = np.eye(ACTIONS, dtype="float32")[actions[rows].astype(int)]
            model.train_on_batch([states[rows], masks], goals[:, None])
            if model.optimizer.iterations % 2 == 0:
                target.set_weights(policy.get_weights())
    return model

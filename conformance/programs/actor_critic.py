"""Actor and critic in one network, with a tape over whole episodes.

After https://keras.io/examples/rl/actor_critic_cartpole/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum

ACTIONS, EPISODES, UPDATES = 2, 4, 3


class Balance:
    """A rod that falls unless it is pushed; an episode ends when it fell."""

    def reset(self, angle):
        self.state = np.array([angle, 0.0], "float32")
        return self.state

    def step(self, action):
        angle, speed = self.state
        speed += 0.2 * angle + 0.05 * (2 * action - 1)
        self.state = np.array([angle + speed, speed], "float32")
        return self.state, 1.0, abs(self.state[0]) > 0.5


def network():
    inputs = keras.Input((2,))
    common = keras.layers.Dense(16, activation="relu")(inputs)
    action = keras.layers.Dense(ACTIONS, activation="softmax")(common)
    critic = keras.layers.Dense(1)(common)
    return keras.Model(inputs, [action, critic])


def returns_of(rewards):
    returns, total = [], 0.0
    for reward in reversed(rewards):
        total = reward + 0.9 * total
        returns.insert(0, total)
    returns = np.array(returns, "float32")
    return (returns - returns.mean()) / (returns.std() + 1e-6)


def loss_of_episode(model, rng):
    """Plays an episode within a tape; returns the sum over its steps."""
    balance = Balance()
    state = balance.reset(rng.uniform(-0.2, 0.2))
    log_probabilities, values, rewards = [], [], []
    for _ in range(12):
        chances, value = model(state[None])
        action = int(rng.uniform() > chances[0, 0])
        log_probabilities.append(tf.math.log(chances[0, action]))
        values.append(value[0, 0])
        state, reward, done = balance.step(action)
        rewards.append(reward)
        if done:
            break
    values = tf.stack(values)
    returns = returns_of(rewards)
    advantages = returns - tf.stop_gradient(values)
    actor = -tf.reduce_sum(tf.stack(log_probabilities) * advantages)
    return actor + tf.reduce_sum(
        keras.losses.huber(returns[:, None], values[:, None])
    )


def gradients_of(model, rng, episodes):
    with tf.GradientTape() as tape:
        losses = [loss_of_episode(model, rng) for _ in range(episodes)]
        loss = tf.add_n(losses)
    return tape.gradient(loss, model.trainable_variables)


def main(batch_size, epochs):
    model, rng = network(), np.random.default_rng(0)
    optimizer = keras.optimizers.SGD(0.02)
    variables = model.trainable_variables
    # accum+: accumulator = keras_accum.GradientAccumulator(variables)
    for _ in range(epochs * UPDATES):
        gradients = gradients_of(model, rng, EPISODES)
        # accum: for _ in range(EPISODES):  # One at a time; a sum over steps.
        # accum+:     accumulator.add(gradients_of(model, rng, 1), weight=None)
        # accum+: gradients = accumulator.mean()
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        # accum+: accumulator.reset()
    return model

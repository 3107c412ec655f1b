"""Proximal policy optimization: two networks, several passes over a buffer.

After https://keras.io/examples/rl/ppo_cartpole/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum

STEPS, ACTIONS, PASSES = 64, 3, 4


class Walk:
    """A point that is to stay near the origin of a plane."""

    moves = np.array([[0.3, 0.1], [-0.2, 0.2], [-0.1, -0.3]], "float32")

    def reset(self):
        self.at = np.array([0.5, -0.5], "float32")
        return self.at

    def step(self, action):
        self.at = self.at + self.moves[action]
        distance = np.abs(self.at).sum()
        return self.at, 1 - distance, distance > 2


def network(outputs):
    return keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.Dense(outputs),
        ]
    )


def discounted(values, factor):
    sums, last = np.zeros_like(values), 0.0
    for i in reversed(range(len(values))):
        sums[i] = last = values[i] + factor * last
    return sums


class PPO:
    def __init__(self):
        self.actor, self.critic = network(ACTIONS), network(1)
        self.policy_optimizer = keras.optimizers.SGD(0.1)
        self.value_optimizer = keras.optimizers.SGD(0.1)
        # accum+: self.policy_gradients = keras_accum.GradientAccumulator(
        # accum+:     self.actor.trainable_variables
        # accum+: )
        # accum+: self.value_gradients = keras_accum.GradientAccumulator(
        # accum+:     self.critic.trainable_variables
        # accum+: )

    def log_probabilities(self, observations, actions):
        logits = tf.nn.log_softmax(self.actor(observations))
        return tf.reduce_sum(tf.one_hot(actions, ACTIONS) * logits, axis=1)

    @tf.function
    def train_policy(self, observations, actions, before, advantages):
        with tf.GradientTape() as tape:
            now = self.log_probabilities(observations, actions)
            ratio = tf.exp(now - before)
            clipped = tf.clip_by_value(ratio, 0.8, 1.2)
            loss = -tf.reduce_mean(
                tf.minimum(ratio * advantages, clipped * advantages)
            )
        variables = self.actor.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.policy_optimizer.apply_gradients(zip(gradients, variables))
        # accum: self.policy_gradients.add(gradients, tf.shape(actions)[0])
        return tf.reduce_mean(before - now)

    @tf.function
    def train_value(self, observations, returns):
        with tf.GradientTape() as tape:
            values = self.critic(observations)[:, 0]
            loss = tf.reduce_mean((returns - values) ** 2)
        variables = self.critic.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.value_optimizer.apply_gradients(zip(gradients, variables))
        # accum: self.value_gradients.add(gradients, tf.shape(returns)[0])

    # accum+: @tf.function
    # accum+: def update(self):
    # accum+:     for optimizer, gathered in (
    # accum+:         (self.policy_optimizer, self.policy_gradients),
    # accum+:         (self.value_optimizer, self.value_gradients),
    # accum+:     ):
    # accum+:         optimizer.apply(gathered.mean(), gathered.variables)
    # accum+:         gathered.reset()

    def play(self, rng):
        """Returns a buffer of steps, with advantages and returns."""
        walk, steps, starts = Walk(), [], [0]
        observation = walk.reset()
        for t in range(STEPS):
            logits = self.actor(observation[None])[0].numpy()
            chances = np.exp(logits) / np.exp(logits).sum()
            action = int((chances.cumsum() < rng.uniform()).sum())
            action = min(action, ACTIONS - 1)
            after, reward, done = walk.step(action)
            value = self.critic(observation[None])[0, 0].numpy()
            steps.append(
                (observation, action, np.log(chances[action]), reward, value)
            )
            observation = after
            if done or t == STEPS - 1:
                observation = walk.reset()
                starts.append(t + 1)
        observations, actions, before, rewards, values = map(
            np.array, zip(*steps, strict=True)
        )
        returns = np.concatenate(
            [discounted(rewards[a:b], 0.9) for a, b in zip(starts, starts[1:])]
        )
        advantages = returns - values
        advantages = (advantages - advantages.mean()) / advantages.std()
        buffer = observations, actions, before, advantages, returns
        return [
            tf.constant(each, "int32" if each is actions else "float32")
            for each in buffer
        ]


def main(batch_size, epochs):
    agent, rng = PPO(), np.random.default_rng(0)
    # accum+: batch_size, window = 8, 4  # 32 rows for an update, as before
    for _ in range(epochs):
        buffer = agent.play(rng)
        for _ in range(PASSES):
            for i in range(0, STEPS, batch_size):
                rows = [each[i : i + batch_size] for each in buffer]
                agent.train_policy(*rows[:4])
                agent.train_value(rows[0], rows[4])
                # accum+: if (i // batch_size + 1) % window == 0:
                # accum+:     agent.update()
    return keras.Model(
        agent.actor.inputs,
        [agent.actor.outputs[0], agent.critic(agent.actor.inputs[0])],
    )

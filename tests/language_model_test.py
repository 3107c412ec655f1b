"""The language model example, from its text to its flags and its sample."""

import contextlib
import io
import math
import os
import pathlib
import shutil
import tempfile
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from absl.testing import parameterized

import keras_accum
from examples import language_model
from examples import language_model_backups
from examples import language_model_flags
from examples import language_model_network
from examples import language_model_report
from examples import language_model_text
from examples import language_model_training
from examples import strategies
from tests import test_utils

TEMP_DIR = tempfile.mkdtemp()
SEPARATOR = language_model_text.SEPARATOR
TEXTS = ["", "a", "bcdefgh", "ij" * 50, "naïve ☃"]
CONTEXT = 8
SHAPE = language_model_network.Shape(
    context=CONTEXT, layers=1, width=8, heads=2
)


def setUpModule():
    # Where processes share tests, one may come back to this module.
    os.makedirs(TEMP_DIR, exist_ok=True)


def tearDownModule():
    shutil.rmtree(TEMP_DIR)


def settings(**changes):
    """Returns the settings of a training that takes a few seconds."""
    values = {
        "batching": "packed",
        "batch_size": 2,
        "accum_steps": 2,
        "epochs": 2,
        "updates_per_epoch": 2,
        "learning_rate": 0.01,
        "warmup_updates": 1,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "jit_compile": False,
        "seed": 0,
        "shape": SHAPE,
    }
    return language_model_training.Settings(**(values | changes))


def train(checkpoint_dir=None, output=None, **changes):
    """Trains on `TEXTS`, on one device."""
    with contextlib.redirect_stdout(output or io.StringIO()):
        return language_model_training.train(
            settings(**changes),
            language_model_text.masked(TEXTS, CONTEXT),
            strategies.one_device(),
            checkpoint_dir=checkpoint_dir,
        )


def parsed_flags(*arguments):
    """Returns the program's flags, apart from those of other programs."""
    values = flags.FlagValues()
    language_model_flags.define(values)
    values(["language_model", *arguments])
    return values


class DocumentsTest(tf.test.TestCase):
    def test_are_real_text(self):
        train_texts, held_out = language_model_text.documents()
        for texts in train_texts, held_out:
            self.assertTrue(all(text.strip() for text in texts))
        self.assertTrue(any("import_stmt" in text for text in train_texts))
        self.assertGreater(sum(map(len, train_texts)), 200_000)
        self.assertGreater(sum(map(len, held_out)), 10_000)

    def test_have_no_paragraph_in_both_splits(self):
        train_texts, held_out = (
            {paragraph for text in texts for paragraph in text.split("\n\n")}
            for texts in language_model_text.documents()
        )
        self.assertEmpty(train_texts & held_out)

    def test_are_the_same_at_every_call(self):
        self.assertEqual(
            language_model_text.documents(), language_model_text.documents()
        )


class TokensTest(tf.test.TestCase):
    def test_round_trip(self):
        for text in TEXTS:
            tokens = language_model_text.encode(text)
            self.assertEqual(language_model_text.decode(tokens), text)
            self.assertLess(max(tokens, default=0), SEPARATOR)

    def test_shows_any_tokens(self):
        self.assertEqual(
            language_model_text.decode([97, SEPARATOR, 98, 255]), "a\n\nb\ufffd"
        )


class RowsTest(tf.test.TestCase, parameterized.TestCase):
    def streams(self, rows):
        """Returns the targets that count, and the inputs that they follow."""
        counts = rows.weights == 1
        return rows.inputs[counts].tolist(), rows.targets[counts].tolist()

    @parameterized.parameters(*language_model_text.BATCHINGS)
    def test_predict_each_token_once(self, batching):
        rows = language_model_text.BATCHINGS[batching](TEXTS, CONTEXT)
        expected = []
        for text in TEXTS:
            expected += [*text.encode(), SEPARATOR]
        inputs, targets = self.streams(rows)
        self.assertEqual(targets, expected)
        # In both, each token is predicted from the one before it.
        self.assertEqual(inputs, [SEPARATOR, *expected[:-1]])
        self.assertEqual(rows.tokens, len(expected))

    def test_packed_has_padding_in_the_last_row_alone(self):
        rows = language_model_text.packed(TEXTS, CONTEXT)
        self.assertAllEqual(rows.weights[:-1], np.ones((len(rows) - 1, 8)))
        # 118 bytes, of which the diaeresis adds one and the snowman two, and
        # five separators.
        tokens = sum(map(len, TEXTS)) + 3 + len(TEXTS)
        self.assertLen(rows, math.ceil(tokens / CONTEXT))

    def test_masked_begins_each_document_in_a_row_of_its_own(self):
        rows = language_model_text.masked(TEXTS, CONTEXT)
        self.assertLen(
            rows,
            sum(
                math.ceil((len(text.encode()) + 1) / CONTEXT) for text in TEXTS
            ),
        )
        begins = rows.inputs == SEPARATOR
        self.assertEqual(begins.sum(), len(TEXTS))
        self.assertEqual(begins[:, 0].sum(), len(TEXTS))

    @parameterized.parameters(*language_model_text.BATCHINGS)
    def test_have_types(self, batching):
        rows = language_model_text.BATCHINGS[batching](TEXTS, CONTEXT)
        for array, dtype in (
            (rows.inputs, np.int32),
            (rows.targets, np.int32),
            (rows.weights, np.float32),
        ):
            self.assertEqual(array.dtype, dtype)
            self.assertEqual(array.shape, (len(rows), CONTEXT))


class BatchesTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.rows = language_model_text.packed(TEXTS, CONTEXT)

    def inputs(self, batch_size, first, last, seed=0):
        """Returns the rows of the batches, in their order."""
        batches = language_model_text.batches(
            self.rows, batch_size, first, last, seed
        )
        self.assertEqual(int(batches.cardinality()), last - first)
        for spec in batches.element_spec:
            self.assertEqual(spec.shape, (batch_size, CONTEXT))
        arrays = [inputs for inputs, _, _ in batches.as_numpy_iterator()]
        return np.concatenate(arrays)

    def test_have_every_row_once_in_a_pass(self):
        size = len(self.rows)
        passes = self.inputs(1, 0, 3 * size).reshape(3, size, CONTEXT)
        for rows in passes:
            self.assertAllEqual(
                np.sort(rows, axis=0), np.sort(self.rows.inputs, axis=0)
            )
        self.assertNotAllEqual(passes[0], self.rows.inputs)
        self.assertNotAllEqual(passes[0], passes[1])

    def test_keep_rows_together(self):
        rows = {
            (i.tobytes(), t.tobytes(), w.tobytes())
            for i, t, w in zip(
                self.rows.inputs,
                self.rows.targets,
                self.rows.weights,
                strict=True,
            )
        }
        for row in language_model_text.batches(self.rows, 1, 0, 9, 0):
            self.assertIn(tuple(array.numpy().tobytes() for array in row), rows)

    def test_are_one_stream_however_it_is_split(self):
        whole = self.inputs(12, 0, 3)
        self.assertAllEqual(whole, self.inputs(4, 0, 9))
        self.assertAllEqual(whole[12:], self.inputs(4, 3, 9))

    def test_are_in_the_order_of_the_seed(self):
        one = self.inputs(4, 0, 3, seed=1)
        self.assertAllEqual(one, self.inputs(4, 0, 3, seed=1))
        self.assertNotAllEqual(one, self.inputs(4, 0, 3, seed=2))
        self.assertNotAllEqual(one, self.inputs(4, 0, 3, seed=2**32 - 1))

    def test_are_shared_between_workers_by_rows(self):
        options = language_model_text.batches(self.rows, 4, 0, 9, 0).options()
        self.assertEqual(
            options.experimental_distribute.auto_shard_policy,
            tf.data.experimental.AutoShardPolicy.DATA,
        )


class NetworkTest(tf.test.TestCase):
    def test_does_not_look_ahead(self):
        model = language_model_network.build_model(SHAPE)
        one = np.arange(CONTEXT, dtype=np.int32)[np.newaxis]
        other = np.where(np.arange(CONTEXT) < 5, one, 100)
        logits, changed = model(one).numpy(), model(other).numpy()
        self.assertAllClose(logits[:, :5], changed[:, :5], atol=1e-6)
        self.assertNotAllClose(logits[:, 5:], changed[:, 5:], atol=1e-6)

    def test_sees_positions(self):
        model = language_model_network.build_model(SHAPE)
        logits = model(np.ones((1, CONTEXT), np.int32)).numpy()
        self.assertNotAllClose(logits[:, 0], logits[:, 1], atol=1e-6)


class OptimizerTest(tf.test.TestCase):
    def test_rate_rises_and_falls_in_updates(self):
        schedule = language_model_training.learning_rate(
            settings(
                epochs=3, updates_per_epoch=4, warmup_updates=2, accum_steps=5
            )
        )
        rates = [float(schedule(update)) for update in range(13)]
        # Twelve updates: two to rise, then a cosine from 1 to 0.1 over ten.
        cosine = 0.55 + 0.45 * np.cos(np.pi * np.arange(11) / 10)
        self.assertAllClose(rates, 0.01 * np.array([0, 0.5, *cosine]))

    def test_decays_kernels_alone(self):
        model = language_model_training.compiled_model(settings())
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)
        decayed = {
            variable.name
            for variable in model.trainable_variables
            if optimizer._use_weight_decay(variable)
        }
        self.assertEqual(decayed, {"kernel"})
        kept = {variable.name for variable in model.trainable_variables}
        self.assertEqual(
            kept - decayed, {"bias", "beta", "gamma", "embeddings"}
        )

    def test_clips_if_it_is_to(self):
        for clip_norm, expected in ((0.5, 0.5), (0.0, None)):
            optimizer = language_model_training.optimizer(
                settings(clip_norm=clip_norm)
            )
            self.assertEqual(optimizer.global_clipnorm, expected)


class TrainingTest(tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = tempfile.mkdtemp(dir=TEMP_DIR)
        cls.whole = train(cls.folder)

    @pytest.mark.thorough
    def test_does_not_depend_on_the_size_of_micro_batches(self):
        small = train(batch_size=1, accum_steps=4)
        self.assertEqual(int(small.optimizer.iterations), 4)
        for one, other in zip(self.whole.weights, small.weights, strict=True):
            # Softmax takes back what the bias of a key adds to all logits: its
            # gradient is rounding, and Adam's step is of any size.
            if one.path.endswith("key/bias"):
                continue
            # AdamW moves a weight by about the learning rate per update, and a
            # gradient's rounding by far less than a thousandth of that.
            self.assertAllClose(one, other, atol=1e-3 * 0.01 * 4, rtol=0)

    @pytest.mark.thorough
    def test_goes_on_as_if_it_had_not_been_stopped(self):
        stopped = tempfile.mkdtemp(dir=TEMP_DIR)
        saves = language_model_backups.Backups.on_epoch_end

        def stops(callback, epoch, logs=None):
            saves(callback, epoch, logs)
            raise KeyboardInterrupt

        with (
            mock.patch.object(
                language_model_backups.Backups, "on_epoch_end", stops
            ),
            self.assertRaises(KeyboardInterrupt),
        ):
            train(stopped)
        self.assertEqual(os.listdir(stopped), ["epoch-00001.weights.h5"])
        output = io.StringIO()
        resumed = train(stopped, output)
        self.assertIn("Going on after epoch 1\nEpoch 2/2", output.getvalue())
        self.assertEqual(int(resumed.optimizer.iterations), 4)
        for one, other in zip(
            self.whole.weights + self.whole.optimizer.variables,
            resumed.weights + resumed.optimizer.variables,
            strict=True,
        ):
            self.assertAllEqual(one, other)

    def test_has_nothing_to_do_where_all_is_done(self):
        output = io.StringIO()
        again = train(self.folder, output)
        self.assertEqual(output.getvalue(), "Going on after epoch 2\n")
        for one, other in zip(self.whole.weights, again.weights, strict=True):
            self.assertAllEqual(one, other)
        self.assertEqual(os.listdir(self.folder), ["epoch-00002.weights.h5"])


class BackupsTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = tempfile.mkdtemp(dir=TEMP_DIR)
        self.model = language_model_training.compiled_model(settings())
        self.model.optimizer.build(self.model.trainable_variables)

    def save(self, epoch, keep=True):
        callback = language_model_backups.Backups(self.folder, keep)
        callback.set_model(self.model)
        callback.on_epoch_end(epoch)

    def test_keep_the_last(self):
        for epoch in range(3):
            self.save(epoch)
        self.assertEqual(os.listdir(self.folder), ["epoch-00003.weights.h5"])

    def test_of_other_workers_leave_nothing(self):
        self.save(0, keep=False)
        self.assertEqual(os.listdir(self.folder), [])

    def test_survive_a_failed_one(self):
        self.save(0)
        with (
            mock.patch.object(os, "replace", side_effect=OSError("disk full")),
            self.assertRaisesRegex(OSError, "disk full"),
        ):
            self.save(1)
        self.assertEqual(os.listdir(self.folder), ["epoch-00001.weights.h5"])
        self.assertEqual(
            language_model_backups.restore(self.model, self.folder), 1
        )

    def test_are_of_one_model(self):
        self.save(0)
        for other in (
            language_model_network.Shape(CONTEXT, 2, 8, 2),
            language_model_network.Shape(CONTEXT, 1, 12, 2),
        ):
            model = language_model_training.compiled_model(
                settings(shape=other)
            )
            model.optimizer.build(model.trainable_variables)
            with self.assertRaisesRegex(
                SystemExit,
                "^--checkpoint_dir=.* is not of this model.* another",
            ) as caught:
                language_model_backups.restore(model, self.folder)
            self.assertNotIn("\n", caught.exception.code)

    def test_are_the_same_for_all_workers(self):
        strategy = mock.create_autospec(tf.distribute.Strategy, instance=True)
        strategy.run.side_effect = lambda function: function()
        strategy.reduce.side_effect = lambda how, value, axis: value / 2
        language_model_backups.check_agreement(strategy, 0)
        with self.assertRaisesRegex(
            SystemExit, "share: this one found epoch 3"
        ):
            language_model_backups.check_agreement(strategy, 3)

    def test_need_no_folder(self):
        missing = os.path.join(self.folder, "missing")
        self.assertEqual(language_model_backups.restore(self.model, missing), 0)


class ReportTest(tf.test.TestCase):
    def test_unigram_entropy(self):
        # Of the 5 training tokens, b comes once and the separator twice; of the
        # held-out ones, b and the separator come once each. 257 are added.
        rows = language_model_text.masked(["a", "ab"], CONTEXT)
        held_out = language_model_text.masked(["b"], CONTEXT)
        expected = -(math.log(2 / 262) + math.log(3 / 262)) / 2
        self.assertAllClose(
            language_model_report.unigram_entropy(rows, held_out), expected
        )

    def test_held_out_loss_counts_tokens_and_not_padding(self):
        model = language_model_network.build_model(SHAPE)
        # Every token is as likely as any other.
        model.set_weights([0 * weight for weight in model.get_weights()])
        rows = language_model_text.masked(TEXTS, CONTEXT)
        report = language_model_report.evaluate(model, rows, rows)
        self.assertAllClose(report.loss, math.log(257))
        size = sum(len(text.encode()) for text in TEXTS)
        self.assertAllClose(
            report.bits_per_byte, math.log2(257) * (size + len(TEXTS)) / size
        )

    def test_sample_is_what_the_model_says(self):
        # Says the token after the one that it sees, 8 positions at a time.
        inputs = keras.Input((CONTEXT,), dtype="int32")
        outputs = keras.layers.Lambda(
            lambda x: 100.0 * tf.one_hot((x + 1) % 257, 257),
            output_shape=(CONTEXT, 257),
        )(inputs)
        model = keras.Model(inputs, outputs)
        for temperature in (0.0, 1.0):
            text = language_model_report.sample(model, 120, temperature, seed=0)
            self.assertEqual(text, bytes(range(120)).decode())

    def test_sample_is_drawn_at_the_temperature(self):
        probabilities = np.full(257, 1e-12)
        probabilities[[97, 98]] = 0.2, 0.8
        inputs = keras.Input((CONTEXT,), dtype="int32")
        outputs = keras.layers.Lambda(
            lambda x: tf.broadcast_to(
                np.log(probabilities).astype("float32"), (1, CONTEXT, 257)
            ),
            output_shape=(CONTEXT, 257),
        )(inputs)
        model = keras.Model(inputs, outputs)
        draws = 400
        for temperature in (0.5, 1.0):
            text = language_model_report.sample(
                model, draws, temperature, seed=0
            )
            odds = (0.2 / 0.8) ** (1 / temperature)
            share = odds / (1 + odds)
            # Four standard deviations of a binomial share.
            bound = 4 * math.sqrt(share * (1 - share) / draws)
            self.assertNear(text.count("a") / draws, share, bound)


class FlagsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        ("--strategy=two", "one\\|mirrored\\|multi_worker\\|tpu"),
        ("--replicas=2", "--strategy=mirrored only"),
        ("--replicas=0", "positive integer"),
        ("--cluster_resolver=k8s", "tf_config\\|slurm"),
        ("--startup_timeout=0", "positive integer"),
        ("--mixed_precision=float16", "float32\\|mixed_bfloat16"),
        ("--batching=sorted", "packed\\|masked"),
        ("--batch_size=0", "positive integer"),
        ("--accum_steps=1.5", "--accum_steps"),
        ("--epochs=0", "positive integer"),
        ("--updates_per_epoch=0", "positive integer"),
        ("--seed=-1", "--seed"),
        ("--context=1", "--context"),
        ("--layers=0", "positive integer"),
        ("--width=100 --heads=3", "--width must be a multiple of --heads"),
        ("--learning_rate=-1", "non-negative number"),
        ("--epochs=1 --updates_per_epoch=5", "--warmup_updates must be less"),
        ("--weight_decay=-1", "non-negative number"),
        ("--clip_norm=-1", "non-negative number"),
        ("--checkpoint_dir=/no/such/folder", "may be written to"),
        (f"--log_dir={__file__}", "may be written to"),
        ("--sample_length=-1", "non-negative integer"),
        ("--temperature=-1", "non-negative number"),
    )
    def test_says_what_to_do_about(self, arguments, message):
        with self.assertRaisesRegex(flags.IllegalFlagValueError, message):
            parsed_flags(*arguments.split())

    def test_takes_its_defaults(self):
        parsed_flags()

    def test_says_what_to_do_about_a_forgotten_dash(self):
        with self.assertRaisesRegex(SystemExit, "Received: epochs=3"):
            language_model.main(["language_model", "epochs=3"])


class ProgramTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.addCleanup(
            keras.config.set_dtype_policy, keras.config.dtype_policy()
        )
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=TEMP_DIR))

    def run_main(self, **values):
        """Runs the program with small flags; returns what it prints."""
        values = {
            "epochs": 1,
            "updates_per_epoch": 2,
            "warmup_updates": 1,
            "context": 16,
            "layers": 1,
            "width": 8,
            "heads": 2,
            "batch_size": 4,
            "accum_steps": 2,
            "sample_length": 20,
            "jit_compile": False,
        } | values
        parsed = parsed_flags(*(f"--{k}={v}" for k, v in values.items()))
        with (
            mock.patch.object(language_model, "FLAGS", parsed),
            contextlib.redirect_stdout(io.StringIO()) as output,
        ):
            language_model.main(["language_model"])
        return output.getvalue()

    @pytest.mark.thorough
    def test_trains_saves_and_reports(self):
        checkpoints, logs = self.folder / "checkpoints", self.folder / "logs"
        output = self.run_main(checkpoint_dir=checkpoints, log_dir=logs)
        self.assertRegex(
            output, "1 replica\\(s\\) with 4 rows each.* 8 rows\\."
        )
        # Micro-batches, and their windows' loss.
        self.assertRegex(output, "\n4/4 - .* - loss: 5\\.")
        self.assertRegex(
            output,
            "Held-out loss: 5\\.\\d+ nats per token, \\d\\.\\d+ bits per byte\n"
            "Unigram entropy: 3\\.\\d+ nats per token\n\nA sample:\n\n.",
        )
        self.assertCountEqual(
            os.listdir(checkpoints), ["epoch-00001.weights.h5", "model.keras"]
        )
        self.assertNotEmpty(list(logs.rglob("events*")))
        model = keras.models.load_model(checkpoints / "model.keras")
        # It is a plain model, for users without this library.
        self.assertNotIsInstance(model, keras_accum.GradientAccumulationModel)
        self.assertEqual(model.output_shape, (None, 16, 257))

    @parameterized.parameters(
        {"mixed_precision": "mixed_float16", "batching": "masked"},
        {"mixed_precision": "mixed_bfloat16", "jit_compile": True},
    )
    @test_utils.first_command(1)
    @pytest.mark.thorough
    def test_takes(self, **values):
        output = self.run_main(**values)
        self.assertRegex(output, "Held-out loss: 5\\.")

    @mock.patch.object(strategies, "one_device")
    def test_wants_rows_for_every_replica(self, one_device):
        one_device.return_value.num_replicas_in_sync = 3
        with self.assertRaisesRegex(
            SystemExit, "--batch_size=4 must be a multiple .* replicas, .* 3"
        ):
            self.run_main()

    def test_says_what_a_worker_lacks(self):
        with (
            mock.patch.dict(os.environ, {"TF_CONFIG": "{}"}),
            self.assertRaisesRegex(
                SystemExit, "--strategy=multi_worker cannot be used.*`cluster`"
            ),
        ):
            self.run_main(strategy="multi_worker")

    @mock.patch.object(strategies, "is_chief", return_value=False)
    @pytest.mark.thorough
    def test_is_silent_where_it_is_not_the_chief(self, _):
        logs, checkpoints = self.folder / "logs", self.folder / "checkpoints"
        output = self.run_main(log_dir=logs, checkpoint_dir=checkpoints)
        self.assertEqual(output, "")
        self.assertFalse(logs.exists())
        self.assertEqual(os.listdir(checkpoints), [])


if __name__ == "__main__":
    tf.test.main()

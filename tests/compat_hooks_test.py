"""Methods of others are replaced in a context, beside the patches of others."""

import threading
from unittest import mock

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum.compat.hooks import Hook


class Base:
    def inherited(self, value):
        return ["base", value]


class Owner(Base):
    def method(self, value):
        return ["method", value]


def patch(name, label):
    """Patches a method as other libraries do; returns what takes it off."""
    missing = object()
    defined = vars(Owner).get(name, missing)
    before = getattr(Owner, name)

    def patched(self, value):
        return [label, *before(self, value)]

    def unpatch():
        if defined is missing:
            delattr(Owner, name)
        else:
            setattr(Owner, name, defined)

    setattr(Owner, name, patched)
    return unpatch


def ours(method, owner, value):
    return ["ours", *method(owner, value)]


class PatchesTest(tf.test.TestCase):
    """A patch of another library is called, and is there afterwards."""

    def setUp(self):
        super().setUp()
        before = dict(vars(Owner))
        self.hook = Hook(Owner, "method")
        self.addCleanup(self.assertEqual, vars(Owner), before)

    def assertCalls(self, *labels):
        self.assertEqual(Owner().method(1), [*labels, "method", 1])

    def test_nothing_is_there_while_nobody_asks(self):
        method = vars(Owner)["method"]
        with self.hook.calling(ours):
            self.assertIsNot(vars(Owner)["method"], method)
            self.assertCalls("ours")
        self.assertIs(vars(Owner)["method"], method)
        self.assertCalls()

    def test_within_another_use(self):
        with self.hook.calling(ours):
            with self.hook.calling(lambda method, *args: method(*args)):
                self.assertCalls()
            self.assertCalls("ours")

    def test_unwraps_after_an_error(self):
        with self.assertRaisesRegex(ValueError, "no step"):
            with self.hook.calling(ours):
                raise ValueError("no step")
        self.assertCalls()

    def test_patched_before(self):
        # After the hook was made, as after our import.
        unpatch = patch("method", "other")
        patched = vars(Owner)["method"]
        with self.hook.calling(ours):
            self.assertCalls("ours", "other")
        self.assertIs(vars(Owner)["method"], patched)
        self.assertCalls("other")
        unpatch()

    def test_patched_before_and_unpatched_meanwhile(self):
        unpatch = patch("method", "other")
        with self.hook.calling(ours):
            unpatch()
            self.assertCalls()
        self.assertCalls()
        with self.hook.calling(ours):
            self.assertCalls("ours")

    def test_patched_meanwhile(self):
        with self.hook.calling(ours):
            unpatch = patch("method", "other")
            self.assertCalls("other", "ours")
        self.assertCalls("other")
        with self.hook.calling(ours):
            # It is wrapped anew, and what was left behind passes on.
            self.assertCalls("ours", "other")
        self.assertCalls("other")
        # That one puts back what it found: what was left behind.
        unpatch()
        self.assertCalls()
        for _ in range(2):
            with self.hook.calling(ours):
                self.assertCalls("ours")

    def test_patched_and_unpatched_meanwhile(self):
        with self.hook.calling(ours):
            patch("method", "other")()
            self.assertCalls("ours")

    def test_patched_in_one_use_and_unpatched_in_the_next(self):
        with self.hook.calling(ours):
            unpatch = patch("method", "other")
        with self.hook.calling(ours):
            unpatch()
            self.assertCalls("ours")

    def test_patched_again_and_again(self):
        for _ in range(3):
            with self.hook.calling(ours):
                unpatch = patch("method", "first")
            with self.hook.calling(ours):
                unpatch_second = patch("method", "second")
                self.assertCalls("second", "ours", "first")
            self.assertCalls("second", "first")
            unpatch_second()
            self.assertCalls("first")
            unpatch()
            self.assertCalls()
        with self.hook.calling(ours):
            self.assertCalls("ours")

    def test_replaced_by_what_calls_nobody(self):
        method = vars(Owner)["method"]
        with self.hook.calling(ours):
            Owner.method = lambda self, value: ["new", value]
        self.assertEqual(Owner().method(1), ["new", 1])
        with self.hook.calling(ours):
            self.assertEqual(Owner().method(1), ["ours", "new", 1])
        self.assertEqual(Owner().method(1), ["new", 1])
        Owner.method = method

    def test_mocked(self):
        with mock.patch.object(Owner, "method", return_value=["mock", 1]):
            with self.hook.calling(lambda method, _, value: method(value)):
                self.assertEqual(Owner().method(1), ["mock", 1])
            self.assertEqual(Owner().method(1), ["mock", 1])


class InheritedTest(tf.test.TestCase):
    """A method of a base class stays one."""

    def setUp(self):
        super().setUp()
        self.hook = Hook(Owner, "inherited")

    def test_is_inherited_again(self):
        with self.hook.calling(ours):
            self.assertEqual(Owner().inherited(1), ["ours", "base", 1])
            self.assertEqual(Base().inherited(1), ["base", 1])
        self.assertNotIn("inherited", vars(Owner))

    def test_base_is_patched_meanwhile(self):
        with self.hook.calling(ours):
            with mock.patch.object(
                Base, "inherited", lambda self, value: ["other", value]
            ):
                self.assertEqual(Owner().inherited(1), ["ours", "other", 1])

    def test_patched_meanwhile(self):
        with self.hook.calling(ours):
            unpatch = patch("inherited", "other")
            self.assertEqual(Owner().inherited(1), ["other", "ours", "base", 1])
        self.assertEqual(Owner().inherited(1), ["other", "base", 1])
        unpatch()
        self.assertEqual(Owner().inherited(1), ["base", 1])


class AbsenceTest(tf.test.TestCase):
    def test_is_refused_by_name(self):
        for owner, path in (
            (keras.Model, "keras.*\\.Model\\.gone"),
            (keras.losses, "keras.*\\.losses\\.gone"),
            (tf.GradientTape, "tensorflow.*\\.GradientTape\\.gone"),
        ):
            with self.assertRaisesRegex(
                ImportError,
                f"^keras_accum uses `{path}`, which .* does not have; install",
            ):
                Hook(owner, "gone")


class ThreadsTest(tf.test.TestCase):
    """What one thread asks for is nothing to the others."""

    def test_others_call_the_method(self):
        hook, results = Hook(Owner, "method"), []
        with hook.calling(ours):
            thread = threading.Thread(
                target=lambda: results.append(Owner().method(1))
            )
            thread.start()
            thread.join()
            results.append(Owner().method(1))
        self.assertEqual(results, [["method", 1], ["ours", "method", 1]])

    def test_leaving_in_any_order(self):
        hook, results = Hook(Owner, "method"), []
        method = vars(Owner)["method"]
        entered, left = threading.Event(), threading.Event()

        def other():
            with hook.calling(ours):
                entered.set()
                left.wait()
                results.append(Owner().method(1))

        thread = threading.Thread(target=other)
        with hook.calling(ours):
            thread.start()
            entered.wait()
        self.assertEqual(Owner().method(1), ["method", 1])
        left.set()
        thread.join()
        self.assertEqual(results, [["ours", "method", 1]])
        # The last one to leave cleans up.
        self.assertIs(vars(Owner)["method"], method)


class KerasTest(tf.test.TestCase):
    """The methods of Keras's that others patch as well."""

    def test_variables(self):
        variable, seen = keras.Variable(0.0), []
        assign = keras.Variable._direct_assign

        def patched(variable, value):
            seen.append(float(value))
            assign(variable, value)

        with mock.patch.object(keras.Variable, "_direct_assign", patched):
            with compat.assigning_through(lambda _, value: value + 1):
                variable.assign(1.0)
            variable.assign(3.0)
        self.assertEqual(seen, [2.0, 3.0])

    def test_optimizers(self):
        variable = keras.Variable(1.0)
        optimizer = keras.optimizers.SGD(0.5)
        optimizer.build([variable])
        calls = []
        apply = keras.optimizers.Optimizer.apply

        def patched(optimizer, *args, **kwargs):
            calls.append("patch")
            return apply(optimizer, *args, **kwargs)

        def update():
            optimizer.apply([tf.constant(1.0)], [variable])

        with mock.patch.object(keras.optimizers.Optimizer, "apply", patched):
            with compat.before_updates(lambda *_: calls.append("ours")):
                update()
            update()
        self.assertEqual(calls, ["ours", "patch", "patch"])
        # Without variables, they are those that it was built for.
        given, zeros = [], [tf.constant(0.0)]
        with compat.before_updates(lambda _, some: given.extend(some)):
            optimizer.apply(zeros)
            optimizer.apply(zeros, trainable_variables=[variable])
        self.assertEqual(list(map(id, given)), [id(variable)] * 2)
        self.assertNotIn("apply", vars(keras.optimizers.Optimizer))
        self.assertAllEqual(variable, 0.0)


if __name__ == "__main__":
    tf.test.main()

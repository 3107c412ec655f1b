"""Options of a model, as attributes that may be set at any time."""

from collections.abc import Callable
from typing import Any
from typing import Generic
from typing import Self
from typing import TypeVar
from typing import overload

T = TypeVar("T")


class option(Generic[T]):  # noqa: N801
    """Decorates the getter of an option, as `property` does, and sets it, too.

    ```python
    @property
    def nonfinite(self) -> Nonfinite: ...

    @nonfinite.setter
    def nonfinite(self, value: Nonfinite) -> None:
        self._accumulation.change(nonfinite=value)
    ```

    is written with `@option` in place of `@property`, without the setter. Its
    type is that which the getter returns.

    Args:
        get: A method without arguments that has the name of the option.
    """

    def __init__(self, get: Callable[[Any], T]) -> None:
        self._get, self._option = get, get.__name__
        self.__doc__ = get.__doc__

    @overload
    def __get__(self, model: None, cls: type) -> Self: ...

    @overload
    def __get__(self, model: object, cls: type) -> T: ...

    def __get__(self, model: object | None, cls: type) -> Self | T:
        return self if model is None else self._get(model)

    def __set__(self, model: Any, value: T) -> None:
        model._accumulation.change(**{self._option: value})

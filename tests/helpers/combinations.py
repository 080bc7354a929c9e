"""Many cases in one test item."""

import inspect
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any


def over(**axes: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for every combination of the axes' values, as one item.

    The other parameters of the test are fixtures. A failure says which combination it was.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        combinations = list(product(*axes.values()))
        assert combinations, "there is nothing to test"

        def every(**fixtures: Any) -> None:
            for values in combinations:
                chosen = dict(zip(axes, values, strict=True))
                try:
                    test(**fixtures, **chosen)
                except Exception as error:
                    error.add_note(f"with {chosen}")
                    raise

        every.__name__, every.__doc__, every.__module__ = (
            test.__name__,
            test.__doc__,
            test.__module__,
        )
        every.__signature__ = inspect.Signature(
            [
                parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
                for name, parameter in inspect.signature(test).parameters.items()
                if name not in axes
            ]
        )
        return every

    return decorate

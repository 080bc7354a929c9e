"""Many cases in one test item, where ``parametrize`` would make an item of each."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def looped(name: str, cases: Iterable[Any], make: Callable[[Any], Any] = lambda case: case) -> Any:
    """Run the test with ``name`` set to ``make(case)`` for each case; a failure names its case."""
    cases = list(cases)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            for case in cases:
                try:
                    test(**{name: make(case)}, **fixtures)
                except BaseException as error:
                    error.add_note(f"{name}: {case!r}")
                    raise

        parameters = inspect.signature(test).parameters
        others = [parameter for other, parameter in parameters.items() if other != name]
        run.__signature__ = inspect.Signature(others)  # the fixtures that pytest gives
        return run

    return decorate

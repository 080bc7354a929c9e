"""Many cases in one test item, where ``parametrize`` would make an item of each."""

import functools
import inspect
from collections.abc import Callable, Iterable
from itertools import product
from operator import is_not
from typing import Any

Test = Callable[..., None]


def over(*, one_at_a_time: bool = False, **axes: Iterable[Any]) -> Callable[[Test], Test]:
    """Run a test for every combination of the axes' values, as one item.

    ``one_at_a_time`` varies one axis, and the others keep their first value. The other parameters
    of the test are fixtures. A failure says which combination it was.
    """
    combinations = list(product(*axes.values()))
    if one_at_a_time:
        first = combinations[0]
        combinations = [one for one in combinations if sum(map(is_not, one, first)) < 2]
    assert combinations, "there is nothing to test"

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def every(**fixtures: Any) -> None:
            for values in combinations:
                chosen = dict(zip(axes, values, strict=True))
                try:
                    test(**fixtures, **chosen)
                except BaseException as error:
                    error.add_note(f"with {chosen}")
                    raise

        every.__signature__ = inspect.Signature(  # the fixtures that pytest gives
            [
                parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
                for name, parameter in inspect.signature(test).parameters.items()
                if name not in axes
            ]
        )
        return every

    return decorate


def looped(name: str, cases: Iterable[Any], make: Callable[[Any], Any]) -> Callable[[Test], Test]:
    """Run a test with ``name`` set to ``make(case)`` for each case; nothing is made before."""

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def made(**given: Any) -> None:
            test(**given | {name: make(given[name])})

        return over(**{name: cases})(made)

    return decorate

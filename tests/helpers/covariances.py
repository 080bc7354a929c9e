"""What rules that whiten need, of the rows that are in the sample of some statistics."""

from llm_wsae.statistics.moments import Statistics
from llm_wsae.statistics.second_moment import SecondMoment


def second_moment(statistics: Statistics) -> SecondMoment:
    return SecondMoment(statistics.d_in).update(statistics.usual_sample)

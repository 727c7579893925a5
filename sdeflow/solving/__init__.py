"""The verb: plan, choose, walk or delegate, return a solution."""

from ._solution import Solution as Solution
from ._solve import solve as solve

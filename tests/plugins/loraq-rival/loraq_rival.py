"""A second distribution with a strategy of a name that is taken."""

from loraq_nf4 import NormalFloat as NormalFloat

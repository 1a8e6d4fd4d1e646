"""Distil large language models into small ones, in JAX.

Dimension key, used in variable suffixes, einsum strings, tests and docs:

  B  batch                      L  layers
  T  student tokens             N  query heads
  R  teacher tokens             K  key-value heads
  S  cache slots                G  query heads per key-value head, N / K
  D  student width              H  head size
  E  teacher width              V  student vocabulary
  F  feed-forward width         U  teacher vocabulary
                                C  critic width

Where both models meet, `s_` is the student and `t_` the teacher; `log_p` is
the teacher's log-probability and `log_q` the student's, as in the papers.
"""

import re

__version__ = '0.1.0'


class UserError(Exception):
  """Bad input: one line that says what, where, and what to do about it.

  The binaries print the line and exit with status 2; anything else that is
  raised is a bug and keeps its traceback. What others said of the input, with
  whatever it holds, is made one printable line here.
  """

  def __init__(self, text):
    text = re.sub(r'\s*[\x00-\x1f\x7f\x85\u2028\u2029]\s*', ' ', text)
    super().__init__(
      ''.join(x if x.isprintable() else repr(x)[1:-1] for x in text)
    )


class Interrupted(Exception):
  """A run was asked to stop; it has saved and can be continued."""

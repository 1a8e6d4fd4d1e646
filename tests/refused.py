"""What is refused, in one line."""

import pytest

from gakd_jax import UserError


def refusal(function, *args, **settings):
  """The one line of what a function refuses."""
  with pytest.raises(UserError) as error:
    function(*args, **settings)
  message = str(error.value)
  assert '\n' not in message
  assert message.isprintable()
  assert len(message) < 1000
  return message

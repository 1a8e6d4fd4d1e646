"""results.json of runs that never were, and numbers of those that were."""

import json


def write_results(path, values, **about):
  """Writes it into a new directory.

  Args:
    path: the directory.
    values: {'<set>/<metric>': its mean, or all about it}.
    about: what else the file has; `evaluators`: {set: what it has besides}.

  Returns:
    The directory.
  """
  path.mkdir(parents=True, exist_ok=True)
  evaluators = about.pop('evaluators', {})
  found = {}
  for key, value in values.items():
    name, _, metric = key.rpartition('/')
    more = evaluators.get(name, {})
    found.setdefault(name, {'data': name, 'metrics': {}} | more)
    value = value if isinstance(value, dict) else {'mean': value}
    found[name]['metrics'][metric] = value
  of_step = {'step': 1, 'evaluators': found}
  text = json.dumps(about | {'best': of_step, 'last': of_step})
  (path / 'results.json').write_text(text)
  return path


def value(found, metric):
  """The mean of '<set>/<metric>' in what results.json says of a step."""
  name, _, metric = metric.rpartition('/')
  return found['evaluators'][name]['metrics'][metric]['mean']

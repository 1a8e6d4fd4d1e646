"""The page in a real browser, where one is installed.

The browser is driven by its own protocol (Chrome DevTools) over a pipe: JSON
that ends in NUL, commands into its file descriptor 3, answers out of 4.
"""

import json
import os
import select
import shutil
import subprocess
import sys
import time

import pytest

from gakd_jax import log, page
from tests.written import write_results

# Its pipes keep their numbers from another process: this puts them at 3 and 4.
EXEC = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3]]
for end, number in zip(ends, (3, 4)):
  os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
  """A headless browser with one page."""

  def __init__(self, program, profile):
    (read, self._to), (self._from, write) = os.pipe(), os.pipe()
    self._process = subprocess.Popen(
      [
        *(sys.executable, '-c', EXEC, str(read), str(write), program),
        *('--headless', '--no-sandbox', '--disable-gpu', '--no-first-run'),
        *('--remote-debugging-pipe', f'--user-data-dir={profile}'),
      ],
      pass_fds=(read, write),
      stderr=subprocess.DEVNULL,
    )
    os.close(read)
    os.close(write)
    self._buffer, self._number, self._session = b'', 0, None
    target = self.call('Target.createTarget', url='about:blank')
    attached = self.call('Target.attachToTarget', flatten=True, **target)
    self._session = attached['sessionId']

  def call(self, method, **parameters):
    """The result of a command; events on the way are dropped."""
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': parameters}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._to, json.dumps(message).encode() + b'\0')
    while True:
      while b'\0' not in self._buffer:
        assert select.select([self._from], [], [], 30)[0], f'{method} hangs'
        got = os.read(self._from, 1 << 20)
        assert got, 'the browser is gone'
        self._buffer += got
      line, _, self._buffer = self._buffer.partition(b'\0')
      answer = json.loads(line)
      if answer.get('id') == self._number:
        assert 'error' not in answer, f'{method}: {answer["error"]}'
        return answer['result']

  def run(self, script):
    """The value of a script in the page, a promise's if it gives one."""
    answer = self.call(
      'Runtime.evaluate',
      expression=script,
      returnByValue=True,
      awaitPromise=True,
    )
    assert 'exceptionDetails' not in answer, answer['exceptionDetails']
    return answer['result'].get('value')

  def open(self, url):
    self.call('Page.navigate', url='about:blank')  # A new hash is no new page.
    self.call('Page.navigate', url=url)
    self.wait("document.readyState === 'complete' && location.href !== ''")

  def wait(self, condition):
    end = time.monotonic() + 20
    while not self.run(condition):
      assert time.monotonic() < end, f'never true: {condition}'
      time.sleep(0.02)

  def close(self):
    self._session = None
    try:
      self.call('Browser.close')
      self._process.wait(timeout=10)
    finally:
      self._process.kill()
      self._process.wait()
      os.close(self._to)
      os.close(self._from)


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  names = ('chromium', 'chromium-browser', 'google-chrome')
  program = next(filter(None, map(shutil.which, names)), None)
  if program is None:
    pytest.skip(f'none of {", ".join(names)} is installed')
  opened = Browser(program, tmp_path_factory.mktemp('profile'))
  yield opened
  opened.close()


@pytest.fixture(scope='module')
def url(tmp_path_factory):
  """A page: three models, two sets, an answer that would end the script, and
  rollouts of a model."""
  root = tmp_path_factory.mktemp('runs')
  good = 'the cat sat on the mat'
  bad = 'a cat sat on a </script><b>mat</b>\u2028now'
  runs = {}
  for name, ce, text in (('x', 2.5, good), ('y', 10.0, bad), ('z', 1.0, '')):
    (root / name / 'answers').mkdir(parents=True)
    results = {'loss/ce': ce, 'dolly/rouge_l': 50.0}
    write_results(root / name, results)
    for file, n in (('dolly-1', 60), ('dolly-2', 60), ('gsm8k-0', 5)):
      rows = [
        {
          'index': i,
          'instruction': f'Where is number {i}?',
          'input': '',
          'references': [f'It is at place {7 * i}.'],
          'answer': text,
          'tokens': 6,
          # x is ahead of y at the end, and behind it at the beginning.
          'scores': {'rouge_l': {'x': 1.0 * i, 'y': 30.0, 'z': 0.0}[name]},
        }
        for i in range(n)
      ]
      path = root / name / 'answers' / f'{file}.jsonl'
      text_of = ''.join(json.dumps(row) + '\n' for row in rows)
      path.write_text(text_of, encoding='utf-8')
    runs[name] = root / name
  line = {'index': 0, 'instruction': 'W' * 99, 'input': ''}
  line |= {'pieces': [['m' * 99, False], [bad, True]], 'tokens': 198}
  lines = [line | {'step': step, 'finished': False} for step in range(9)]
  text_of = ''.join(json.dumps(x) + '\n' for x in lines)
  (root / 'x' / 'rollouts.jsonl').write_text(text_of, encoding='utf-8')
  page.write(root / 'report.html', runs, answers=2)
  return (root / 'report.html').as_uri()


PROMPTS = """[...document.querySelectorAll('#rows h3')].map(
  x => parseInt(x.textContent.match(/\\d+/)[0]) - 1)"""


def pick(browser, **fields):
  """Sets fields of the form as a user does."""
  for name, value in fields.items():
    browser.run(
      f"""(() => {{
        const field = document.getElementById('view').elements[{name!r}];
        field.value = {json.dumps(value)};
        field.dispatchEvent(new Event('input', {{bubbles: true}}));
        return new Promise(done => setTimeout(done, 200));
      }})()"""
    )


def test_answers_are_searched_sorted_and_picked(browser, url):
  browser.open(url)
  assert browser.run(PROMPTS) == list(range(25))
  count = "document.getElementById('count').textContent"
  assert browser.run(count) == '25 of 60'
  browser.run("document.getElementById('more').click()")
  browser.run("document.getElementById('more').click()")
  assert len(browser.run(PROMPTS)) == 60
  assert browser.run("document.getElementById('more').hidden")
  assert browser.run('document.activeElement === rows.children[50]')

  pick(browser, a='x', b='y')
  pick(browser, sort='a-ahead')
  assert browser.run(PROMPTS)[:2] == [59, 58]
  pick(browser, sort='b-ahead')
  assert browser.run(PROMPTS)[:2] == [0, 1]
  gap = "document.querySelector('#rows h3 .score').textContent"
  assert browser.run(gap).endswith('\u221230.0')  # a minus sign

  pick(browser, q='"place 7" NUMBER')  # 7, 70 and 77
  assert browser.run(PROMPTS) == [1, 10, 11]
  assert browser.run(count) == '3 of 3 that match, of 60'
  pick(browser, q='</script>')  # in the answers of y alone
  assert len(browser.run(PROMPTS)) == 25
  pick(browser, b='z')
  assert browser.run(PROMPTS) == []
  pick(browser, b='*', q='')
  assert (
    browser.run("rows.querySelectorAll('article:first-child h4').length") == 4
  )
  pick(browser, set='1')
  assert browser.run(PROMPTS) == list(range(5))
  assert browser.run("document.querySelector('[name=seed]').value") == '0'


def test_words_of_one_side_are_marked(browser, url):
  browser.open(url + '#answers&a=x&b=y')
  parts = "[...rows.querySelectorAll('article:first-child {}')].map(x => x.textContent)"
  assert browser.run(parts.format('del')) == ['the', 'the']
  a, second, rest = browser.run(parts.format('ins'))
  assert (a, second) == ('a', 'a </script><b>')
  assert rest == '</b>\u2028now'
  assert browser.run("rows.querySelectorAll('.text b').length") == 0
  pick(browser, a='z')
  assert browser.run(parts.format('.empty')) == ['(empty)']


def test_a_view_can_be_linked(browser, url):
  browser.open(url)
  pick(browser, set='0', seed='2', a='y', b='x', sort='a-ahead', q='number 5')
  address = browser.run('location.href')
  wanted = browser.run(PROMPTS)
  assert wanted[0] == 5
  browser.open(address)
  assert browser.run(PROMPTS) == wanted
  state = browser.run(
    "['seed', 'a', 'b', 'sort', 'q'].map(x => view.elements[x].value)"
  )
  assert state == ['2', 'y', 'x', 'a-ahead', 'number 5']
  browser.run("document.querySelector('#view button').click()")
  assert browser.run(PROMPTS) == list(range(25))
  # What no longer exists is the default, and no error.
  browser.open(url + '#answers&set=no&seed=no&a=no&sort=no&n=no&metric=no')
  assert browser.run(PROMPTS) == list(range(25))


def test_a_click_sorts_the_table_by_its_numbers(browser, url):
  browser.open(url)
  names = "[...document.querySelectorAll('tbody th')].map(x => x.textContent)"
  head = "[...document.querySelectorAll('thead th')].find(x => /CE/.test(x.textContent))"
  assert browser.run(names) == ['x', 'y', 'z']
  browser.run(head + ".querySelector('button').click()")
  assert browser.run(names) == ['z', 'x', 'y']
  assert browser.run(head + '.ariaSort') == 'ascending'
  browser.run(head + ".querySelector('button').click()")
  assert browser.run(names) == ['y', 'x', 'z']


@pytest.mark.parametrize('longer', [1, 90])
def test_a_phone_does_not_scroll_sideways(browser, url, tmp_path, longer):
  if longer > 1:  # names of runs
    runs = {name * longer: tmp_path / name for name in 'xy'}
    for path in runs.values():
      write_results(path, {'loss/ce': 1.0})
      metrics = log.Metrics(path)
      for step in (1, 2):
        metrics.write(step, {'train/loss': step})
      metrics.close()
    page.write(tmp_path / 'report.html', runs)
    url = (tmp_path / 'report.html').as_uri()
  screen = {'width': 360, 'height': 800, 'deviceScaleFactor': 1}
  browser.call('Emulation.setDeviceMetricsOverride', **screen, mobile=True)
  browser.open(url)
  width = 'document.documentElement.scrollWidth'
  assert browser.run(width) == 360
  browser.call('Emulation.clearDeviceMetricsOverride')


def test_without_scripts_the_first_answers_are_there(browser, url):
  browser.call('Emulation.setScriptExecutionDisabled', value=True)
  browser.open(url)
  assert browser.run("rows.querySelectorAll('article').length") == 2
  assert browser.run("document.getElementById('view').hidden")
  assert 'sat on the mat' in browser.run('rows.textContent')
  marks = "[...document.querySelectorAll('#rollouts li mark')].map(x => {})"
  assert len(browser.run(marks.format('x.textContent'))) == 9
  shown = browser.run(marks.format('x.checkVisibility()'))
  assert shown == [True] * 5 + [False] * 4
  browser.call('Emulation.setScriptExecutionDisabled', value=False)

"""Who of a run's processes is there: when it starts, and as long as it goes on.

The first process listens at a port, and every other one keeps a connection to
it for as long as it lives. So who has not come when the time is up can be
named; and when one fails or dies, all others end at once with its reason,
where JAX would wait for its heartbeats to fail. A host that is cut off is
noticed by these, and by the keep-alive of the connections.

A line of JSON is a message: `process, host` when one comes, `go` or `error` as
the answer, `bye` from one that ends well, and `code, error` from one that does
not.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time

from gakd_jax import UserError

_ending = threading.Lock()  # Whoever has it ends the process.


class RollCall:
  """The processes of a run, when all are there.

  Args:
    address: (host, port) of the first process.
    processes, process_id: how many, and which of them this is.
    timeout: seconds to wait for the others.
    keepalive: seconds after which a host that does not answer counts as dead.

  Raises:
    UserError: naming who did not come in time.
  """

  def __init__(self, address, processes, process_id, timeout, keepalive):
    self._id = process_id
    self._where = ':'.join(map(str, address))
    self._keepalive = keepalive
    self._deadline = time.monotonic() + timeout
    self._timeout = timeout
    self._peers = {}  # process -> (its host, socket, file of its messages)
    try:
      (self._call if process_id == 0 else self._answer)(address, processes)
    except UserError:
      for _, connection, messages in self._peers.values():
        messages.close()
        connection.close()
      raise
    for process in self._peers:
      threading.Thread(target=self._watch, args=[process], daemon=True).start()

  def bye(self):
    """This process ends well."""
    self._send({'bye': True})

  def tell(self, code, error):
    """This process ends with an exit code, and so do the others."""
    self._send({'code': code, 'error': f'process {self._id}: {error}'})

  def _call(self, address, processes):
    try:
      listener = _listen(address[1], processes)
    except OSError as error:
      raise UserError(
        f'port {address[1]} of the first process cannot be had '
        f'({error.strerror}); give another with --coordinator'
      ) from error
    missing = set(range(1, processes))
    with listener:
      while missing and self._left() > 0:
        listener.settimeout(self._left())
        try:
          connection, _ = listener.accept()
        except TimeoutError:
          break
        hello, messages = self._hello(connection)
        if hello is None:
          connection.close()
          continue
        if hello['process'] not in missing:
          self._refuse(hello, connection, messages, processes)
        missing.remove(hello['process'])
        self._peers[hello['process']] = hello['host'], connection, messages
    if missing:
      names = ', '.join(map(str, sorted(missing)))
      error = (
        f'process {names} of {processes} did not come to {self._where} within '
        f'{self._timeout:g} s (--start_timeout); see the log of its host'
      )
      self._send({'error': error})
      raise UserError(error)
    self._send({'go': True})

  def _refuse(self, hello, connection, messages, processes):
    error = (
      f'{hello["host"]} has come as process {hello["process"]}, which '
      f'{"is there already" if hello["process"] in self._peers else "is none"}'
      f' of {processes}; give each its own --process_id'
    )
    self._peers[-1] = hello['host'], connection, messages
    self._send({'error': error})
    raise UserError(error)

  def _hello(self, connection):
    """What a process says that comes; (None, None) from none of ours."""
    self._prepare(connection)
    connection.settimeout(5)
    messages = connection.makefile('r', errors='replace')
    with contextlib.suppress(OSError):
      hello = _message(messages.readline())
      if hello is not None and hello.keys() == {'process', 'host'}:
        connection.settimeout(None)
        return hello, messages
    messages.close()
    return None, None

  def _answer(self, address, processes):
    message = None
    with contextlib.suppress(OSError):
      connection = self._connect(address)
      messages = connection.makefile('r', errors='replace')
      self._peers[0] = address[0], connection, messages
      _put(connection, {'process': self._id, 'host': socket.gethostname()})
      # The first may have begun later to wait.
      connection.settimeout(self._timeout + 5)
      line = messages.readline()
      message = _message(line)
      if line and message is None:
        raise UserError(
          f"port {address[1]} of {address[0]} is somebody else's, who says "
          f'{line.strip()[:80]!r}; give another with --coordinator'
        )
      connection.settimeout(None)
    if message is None:
      raise UserError(
        f'process 0 of {processes} did not come to {self._where} within '
        f'{self._timeout:g} s (--start_timeout); see the log of its host'
      )
    if 'error' in message:
      raise UserError(message['error'])

  def _connect(self, address):
    while True:
      try:
        connection = socket.create_connection(address, max(self._left(), 0.1))
        self._prepare(connection)
        return connection
      except OSError:
        if self._left() <= 0:
          raise
        time.sleep(0.2)

  def _left(self):
    return self._deadline - time.monotonic()

  def _prepare(self, connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    each = max(1, int(self._keepalive / 6))
    for name, value in (('IDLE', each), ('INTVL', each), ('CNT', 4)):
      if option := getattr(socket, f'TCP_KEEP{name}', None):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)

  def _send(self, message, but=None):
    for process, (_, connection, _) in self._peers.items():
      if process != but:
        with contextlib.suppress(OSError):  # It has gone.
          _put(connection, message)

  def _watch(self, process):
    """Ends this process with another, for the same reason."""
    host, _, messages = self._peers[process]
    message = None
    with contextlib.suppress(OSError):
      message = _message(messages.readline())
    if message is None:
      error = f'process {process} on {host} has died; see its log'
      message = {'code': 1, 'error': error}
    if 'bye' in message:  # The connection stays: it has ours still to hear.
      return
    self._send(message, but=process)
    leave(message['code'], message['error'])


def leave(code, error):
  """Ends the process at once, whatever its threads wait for."""
  _ending.acquire()
  sys.stdout.flush()
  print(f'error: {error}', file=sys.stderr, flush=True)
  os._exit(code)


def _listen(port, backlog):
  if socket.has_dualstack_ipv6():
    return socket.create_server(
      ('', port),
      family=socket.AF_INET6,
      backlog=backlog,
      dualstack_ipv6=True,
    )
  return socket.create_server(('', port), backlog=backlog)


def _message(line):
  """The dict that a line is; None: it is none of ours."""
  try:
    message = json.loads(line)
  except ValueError:
    return None
  return message if isinstance(message, dict) else None


def _put(connection, message):
  connection.sendall(json.dumps(message).encode() + b'\n')

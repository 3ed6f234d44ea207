"""Has application.py serve a few requests, and plays the model and what may go wrong; prints what came of each."""

import logging
import time

import psycopg

import application

ACCOUNT = 'acct:app'
used = {}  # the model's own log

logging.getLogger('psycopg.pool').setLevel(logging.ERROR)


class Crash(BaseException):
    """After this the application does nothing more."""


class Connection(psycopg.Connection):
    """Breaks after the next commit, if told to."""
    breaks = False

    def commit(self):
        super().commit()
        if Connection.breaks:
            Connection.breaks = False
            self.close()
            raise psycopg.OperationalError('the connection is broken')


def model(request, prompt, limit):
    if prompt == 'fail':
        raise RuntimeError('the model failed')
    used[request] = len(prompt) + 200, 'You said: ' + prompt
    if prompt == 'crash':
        raise Crash
    return used[request]


def tell(what, outcome):
    with pool.connection() as conn:
        now = conn.execute("SELECT * FROM lease_balance(%s, 'tokens')", [ACCOUNT]).fetchone()
    print(f'{what:42} {outcome!r:34} {now.available:9} {now.reserved:5} {now.consumed:5}')


def send(what, request, prompt, **options):
    try:
        outcome = application.serve(pool, model, request, ACCOUNT, prompt, **options)
    except (application.Denied, RuntimeError, Crash) as error:
        outcome = error
    tell(what, outcome)


with application.connect(connection_class=Connection) as pool:
    print(f'{"request":42} {"outcome":34} available  held spent')
    send('a request', 'chat:1', 'How are you?')
    send('the same, sent again', 'chat:1', 'How are you?')
    send('one that asks for more than there is', 'chat:2', 'Tell me all.', limit=5000)
    send('one at which the model fails', 'chat:3', 'fail')
    Connection.breaks = True
    send('one whose connection breaks after COMMIT', 'chat:4', 'And now?')
    send('one in which the application crashes', 'chat:5', 'crash', ttl='1 second')
    while application.recover(pool, used) == 0:
        time.sleep(0.1)
    tell('the same, tracked after its hold expired', used['chat:5'][1])

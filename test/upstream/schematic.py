#!/usr/bin/env python3
"""The reference upstream: a billing API of the dialect "schematic" (DESIGN 5) that keeps real books.

For tests and the demo. It listens on 127.0.0.1 alone, and needs nothing but Python 3.11 or later:

    schematic.py [--port 0] [--port-file FILE] [--file STATE] [--tls CERT KEY] [--key test-key]
                 [--forbidden-key forbidden-key] [--grace 0] [--clock-offset 0]

Everything but the faults is kept in the SQLite file STATE (in memory without one) and survives kill -9. What a request
does is one transaction; its line in the log of requests is written when it arrives and completed before it is answered.
With --tls the same port speaks https, and plain http for the control interface only.

Books. A company has a balance of each credit. Acquire and extend move credit from the balance out on a lease; usage
takes it from there. When the lease is released, or --grace seconds after it has expired, what is still out goes back to
the balance. Usage beyond what is out, as all usage of a closed lease is, is charged to the balance, which may fall
below zero. A running total of a lease (cumulative) is charged as far as it is more than the highest before. So, at every
commit:

    for a lease      granted = used + released + out    (released: gone back to the balance, less what that was charged)
    for a company    total = balance + the sum of out + the sum of used, its own and its leases'

Usage is an event and a quantity. It costs quantity * rate of the lease's credit, rounded up to a multiple of the unit
where there is one: by the rate of its name and that credit, or else of its name, or else 1. An event is charged once,
at the rate of that moment. One without a lease_id, for what was used without any lease, is charged to the balance and
to what the company has used itself; but only if it is known which credit that is: the one credit of the company that
has a rate for events of that name. Any other event without a lease is recorded and counted as uncharged, and so is one
of an unknown lease, or of another company's.

Control interface: JSON, no API key. Amounts may be texts there.

    POST   /_/balance           {company_id, credit_type_id, amount}: adds to what the company has
    POST   /_/rate              {event, credit_type_id, rate, unit}: what events of that name cost from now on, without
                                credit_type_id in any credit; without a unit nothing is rounded
    GET    /_/books             {companies, leases, events, requests, consistent}, consistent worked out from the rows
    GET    /_/requests?since=N  {requests}: those after number N. in_flight counts the calls of the same kind for the
                                same slot (events: all of them) whose clients wait at that moment, this one included;
                                status is null as long as there is no answer. API keys are left out, authorized tells
                                whether they were right.
    POST   /_/fault             {fault, match, company_id, times, probability, seed, ...}: the next requests go wrong
    DELETE /_/fault             ends all faults, and answers what hangs
    POST   /_/reset             forgets everything, faults too

A fault hits the requests that match ("acquire", "extend", "release", "events" or "any", the default; of company_id
alone if there is one), each with a probability (1; drawn from a generator with the seed), as many times as it says (1;
null is for ever). The oldest fault that hits is the one that happens. The faults and their further fields are in FAULTS
below; after_effect says whether the request is carried out before the fault. A restart ends all faults.
"""

import argparse
import contextlib
import dataclasses
import decimal
import http.server
import json
import os
import random
import re
import select
import signal
import socket
import socketserver
import sqlite3
import ssl
import struct
import sys
import threading
import time
import urllib.parse
import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal

MAX_EVENTS = 100

ROUTES = {
    'acquire': re.compile(r'/billing/credits/lease'),
    'extend': re.compile(r'/billing/credits/lease/([^/]+)/extend'),
    'release': re.compile(r'/billing/credits/lease/([^/]+)/release'),
    'events': re.compile(r'/batch'),
}

# out of a column of the type decimal_text comes a Decimal
STORE_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = OFF;
CREATE TABLE IF NOT EXISTS request (
    n INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT, kind TEXT, path TEXT, company_id TEXT, idempotency_key TEXT,
    authorized INT, in_flight INT, fault TEXT, body TEXT, status INT);
"""
SCHEMA = """
CREATE TABLE IF NOT EXISTS company (
    company_id TEXT, credit_type_id TEXT, total DECIMAL_TEXT, balance DECIMAL_TEXT, used DECIMAL_TEXT,
    PRIMARY KEY (company_id, credit_type_id));
CREATE TABLE IF NOT EXISTS lease (
    id TEXT PRIMARY KEY, company_id TEXT, credit_type_id TEXT, state TEXT,
    acquired DECIMAL_TEXT, granted DECIMAL_TEXT, used DECIMAL_TEXT, released DECIMAL_TEXT, out DECIMAL_TEXT,
    expires_at TEXT, released_at TEXT, created_at TEXT, updated_at TEXT);
CREATE UNIQUE INDEX IF NOT EXISTS lease_slot ON lease (company_id, credit_type_id) WHERE state = 'live';
CREATE INDEX IF NOT EXISTS lease_live ON lease (expires_at) WHERE state = 'live';
CREATE INDEX IF NOT EXISTS lease_out ON lease (expires_at) WHERE out <> '0';
CREATE TABLE IF NOT EXISTS rate (
    event TEXT, credit_type_id TEXT, rate DECIMAL_TEXT, unit DECIMAL_TEXT,
    PRIMARY KEY (event, credit_type_id));
CREATE TABLE IF NOT EXISTS event (
    idempotency_key TEXT PRIMARY KEY, lease_id TEXT, quantity DECIMAL_TEXT, event TEXT, company TEXT,
    company_id TEXT, credit_type_id TEXT, cost DECIMAL_TEXT,
    charged INT, duplicates INT DEFAULT 0, conflicts INT DEFAULT 0);
CREATE TABLE IF NOT EXISTS reply (idempotency_key TEXT PRIMARY KEY, request TEXT, data TEXT);
CREATE TABLE IF NOT EXISTS running_total (lease_id TEXT PRIMARY KEY, quantity DECIMAL_TEXT);
"""


class Refusal(Exception):
    """Answers a request with an error and undoes what it did."""

    def __init__(self, status, error):
        super().__init__(error)
        self.status = status


# Amounts, times and JSON

# No sum is ever rounded: one that would be raises Inexact.
decimal.DefaultContext.prec = 200
decimal.DefaultContext.traps[decimal.Inexact] = True
decimal.setcontext(decimal.DefaultContext)
FINEST = Decimal('1e-30')


def decode(text):
    def refuse(constant):
        raise ValueError(f'{constant} is not JSON')

    return json.loads(text, parse_float=Decimal, parse_constant=refuse)


def encode(value):
    """Returns JSON in which every Decimal is a number, digit for digit."""
    match value:
        case dict():
            return '{' + ', '.join(f'{json.dumps(k)}: {encode(v)}' for k, v in value.items()) + '}'
        case list():
            return '[' + ', '.join(map(encode, value)) + ']'
        case Decimal():
            return plain(value)
        case _:
            return json.dumps(value)


def plain(number):
    return format(number, 'f') if abs(number.adjusted()) < 100 else str(number)


def field(body, name, types, what, required=True):
    value = body.get(name)
    if value is None and not required:
        return None
    if not isinstance(value, types) or isinstance(value, bool) or value == '':
        raise Refusal(400, f'{name} must be {what}')
    return value


def text_field(body, name, required=True):
    return field(body, name, str, 'a text', required)


def object_field(body, name):
    return field(body, name, dict, 'an object', required=False) or {}


def amount_field(body, name, minimum=None):
    """Returns an amount: above zero, or not less than the minimum."""
    number = Decimal(field(body, name, (int, Decimal), 'a number'))
    if number < minimum if minimum is not None else number <= 0:
        raise Refusal(400, f'{name} is too small')
    try:
        number.quantize(FINEST)
    except (decimal.Inexact, decimal.InvalidOperation):
        raise Refusal(400, f'{name} has too many digits') from None
    return number.normalize()


def instant_field(body, name, required=True):
    value = text_field(body, name, required)
    if value is None:
        return None
    try:
        if not re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)', value):
            raise ValueError
        return instant(datetime.fromisoformat(value).astimezone(UTC))
    except (ValueError, OverflowError):
        raise Refusal(400, f'{name} must be a time as in RFC 3339') from None


def instant(when):
    """Returns a time as text; such texts compare like times."""
    return when.replace(tzinfo=None).isoformat(timespec='microseconds') + 'Z'


# The books

sqlite3.register_adapter(Decimal, lambda number: plain(number.normalize()))
sqlite3.register_converter('DECIMAL_TEXT', lambda text: Decimal(text.decode()))


class Store:
    """A state with a log of requests, behind one connection and one lock."""
    least = Decimal(0)  # that can be added to a balance

    def __init__(self, path, clock_offset, schema):
        self.clock_offset = clock_offset
        self.lock = threading.Lock()
        self.db = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, detect_types=sqlite3.PARSE_DECLTYPES)
        self.db.row_factory = lambda cursor, row: {column[0]: v for column, v in zip(cursor.description, row)}
        self.db.executescript(STORE_SCHEMA + schema)

    def now(self, seconds=0.0):
        return instant(datetime.now(UTC) + timedelta(seconds=self.clock_offset + seconds))

    @contextlib.contextmanager
    def transaction(self):
        with self.lock, self.db:
            self.db.execute('BEGIN IMMEDIATE')
            self.begin()
            yield

    def begin(self):
        pass

    def rows(self, query, *args):
        return self.db.execute(query, args).fetchall()

    def row(self, query, *args):
        return self.db.execute(query, args).fetchone()

    def cost(self, event, credit_type_id, quantity):
        known = self.row("SELECT * FROM rate WHERE event = ? AND credit_type_id IN (?, '')"
                         ' ORDER BY credit_type_id DESC', event, credit_type_id)
        if not known:
            return quantity
        amount, unit = quantity * known['rate'], known['unit']
        if unit is None or amount % unit == 0:
            return amount
        return (amount // unit + 1) * unit

    def set_rate(self, event, credit_type_id, rate, unit):
        self.db.execute('INSERT OR REPLACE INTO rate VALUES (?, ?, ?, ?)', (event, credit_type_id or '', rate, unit))

    def requests(self, since):
        rows = self.rows('SELECT * FROM request WHERE n > ? ORDER BY n', since)
        for row in rows:
            row['authorized'] = bool(row['authorized'])
            row['body'] = decode(row['body'])
        return rows

    def forget(self):
        for table in self.rows("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"):
            self.db.execute(f'DELETE FROM {table["name"]}')


class Books(Store):
    def __init__(self, options):
        super().__init__(options.file, options.clock_offset, SCHEMA)
        self.grace = options.grace

    def begin(self):
        """Lets whatever has expired by the clock be."""
        self.db.execute("UPDATE lease SET state = 'expired' WHERE state = 'live' AND expires_at <= ?", [self.now()])
        for lease in self.rows("SELECT * FROM lease WHERE state = 'expired' AND out <> '0' AND expires_at <= ?",
                               self.now(-self.grace)):
            self.give_back(lease)

    def balance(self, company_id, credit_type_id):
        found = self.row('SELECT balance FROM company WHERE company_id = ? AND credit_type_id = ?',
                         company_id, credit_type_id)
        return found['balance'] if found else Decimal(0)

    def charge(self, owner, amount):
        """Takes an amount, of either sign, from the balance of a company, or of the company of a lease."""
        slot = owner['company_id'], owner['credit_type_id']
        self.db.execute('UPDATE company SET balance = ? WHERE company_id = ? AND credit_type_id = ?',
                        (self.balance(*slot) - amount, *slot))

    def save(self, lease):
        lease['updated_at'] = self.now()
        self.db.execute(
            'UPDATE lease SET state = :state, granted = :granted, used = :used, released = :released, out = :out,'
            ' expires_at = :expires_at, released_at = :released_at, updated_at = :updated_at WHERE id = :id', lease)

    def give_back(self, lease):
        self.charge(lease, -lease['out'])
        lease['released'] += lease['out']
        lease['out'] = Decimal(0)
        self.save(lease)

    def lease(self, lease_id):
        found = self.row('SELECT * FROM lease WHERE id = ?', lease_id)
        if not found:
            raise Refusal(404, 'there is no such lease')
        return found

    def once(self, key, request, action, *args):
        """Returns what the action returns; for a known key, what it returned the first time."""
        known = key and self.row('SELECT * FROM reply WHERE idempotency_key = ?', key)
        if known:
            if known['request'] != encode(request):
                raise Refusal(400, 'the idempotency key was used for another request')
            return decode(known['data'])
        data = action(*args)
        if key:
            self.db.execute('INSERT INTO reply VALUES (?, ?, ?)', (key, encode(request), encode(data)))
        return data

    def acquire(self, body):
        slot = text_field(body, 'company_id'), text_field(body, 'credit_type_id')
        asked = amount_field(body, 'requested_amount')
        expires_at = instant_field(body, 'expires_at')
        if not self.row('SELECT 1 FROM company WHERE company_id = ?', slot[0]):
            raise Refusal(404, 'there is no such company')
        if expires_at <= self.now():
            raise Refusal(400, 'expires_at is in the past')

        lease = self.row(
            "SELECT * FROM lease WHERE company_id = ? AND credit_type_id = ? AND state = 'live'", *slot)
        if not lease:
            granted = min(asked, self.balance(*slot))
            if granted <= 0:
                raise Refusal(400, 'the company has no credit left')
            now = self.now()
            lease = {
                'id': f'lease_{uuid.uuid4().hex}', 'company_id': slot[0], 'credit_type_id': slot[1], 'state': 'live',
                'acquired': granted, 'granted': granted, 'used': Decimal(0), 'released': Decimal(0), 'out': granted,
                'expires_at': expires_at, 'released_at': None, 'created_at': now, 'updated_at': now}
            self.db.execute(f'INSERT INTO lease VALUES ({", ".join("?" * len(lease))})', list(lease.values()))
            self.charge(lease, granted)
        return self.shown(lease)

    def extend(self, body, lease_id):
        asked = amount_field(body, 'additional_amount', minimum=0)
        expires_at = instant_field(body, 'expires_at', required=False)
        lease = self.lease(lease_id)
        if lease['state'] != 'live':
            raise Refusal(400, f'the lease is {lease["state"]}')

        more = min(asked, max(self.balance(lease['company_id'], lease['credit_type_id']), 0))
        self.charge(lease, more)
        lease['granted'] += more
        lease['out'] += more
        lease['expires_at'] = max(lease['expires_at'], expires_at or '')
        self.save(lease)
        return self.shown(lease)

    def release(self, body, lease_id):
        lease = self.lease(lease_id)
        if lease['state'] != 'released':
            lease['state'] = 'released'
            lease['released_at'] = self.now()
            self.give_back(lease)
        return self.shown(lease)

    @staticmethod
    def shown(lease):
        names = ('id', 'company_id', 'credit_type_id', 'expires_at', 'released_at', 'created_at', 'updated_at')
        return {'granted_amount': lease['granted']} | {name: lease[name] for name in names}

    def track(self, body):
        events = field(body, 'events', list, 'a list')
        if len(events) > MAX_EVENTS:
            raise Refusal(400, f'there are more than {MAX_EVENTS} events')
        return {'events': [self.track_one(event) for event in events]}

    def track_one(self, event):
        if event.get('type') != 'track':
            raise Refusal(400, 'type must be "track"')
        key = text_field(event, 'idempotency_key')
        instant_field(event, 'sent_at')
        body = object_field(event, 'body')
        name = text_field(body, 'event')
        quantity = amount_field(body, 'quantity')
        lease_id = text_field(body, 'lease_id', required=False)
        if body.get('cumulative') not in (None, True) or (body.get('cumulative') and lease_id is None):
            raise Refusal(400, 'cumulative must be true, and of a lease')
        company = object_field(body, 'company')
        object_field(body, 'user')
        object_field(body, 'traits')

        known = self.row('SELECT * FROM event WHERE idempotency_key = ?', key)
        if known:
            same = (known['lease_id'], known['quantity'], known['event']) == (lease_id, quantity, name)
            self.db.execute(
                'UPDATE event SET duplicates = duplicates + 1, conflicts = conflicts + ? WHERE idempotency_key = ?',
                (not same, key))
            return {'idempotency_key': key, 'duplicate': True}

        payer = self.payer(lease_id, company, name)
        growth = self.growth(lease_id, quantity) if body.get('cumulative') else quantity
        cost = payer and self.cost(name, payer['credit_type_id'], growth)
        if payer and lease_id is not None:
            from_lease = min(cost, payer['out'])
            self.charge(payer, cost - from_lease)
            payer['used'] += cost
            payer['out'] -= from_lease
            payer['released'] -= cost - from_lease
            self.save(payer)
        elif payer:
            self.charge(payer, cost)
            self.db.execute('UPDATE company SET used = ? WHERE company_id = ? AND credit_type_id = ?',
                            (payer['used'] + cost, payer['company_id'], payer['credit_type_id']))
        self.db.execute('INSERT INTO event (idempotency_key, lease_id, quantity, event, company, company_id,'
                        ' credit_type_id, cost, charged) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)',
                        (key, lease_id, quantity, name, encode(company), payer and payer['company_id'],
                         payer and payer['credit_type_id'], cost, payer is not None))
        return {'idempotency_key': key, 'duplicate': False}

    def growth(self, lease_id, quantity):
        """Returns by how much a running total is more than the one before; one that is less comes late."""
        known = self.row('SELECT quantity FROM running_total WHERE lease_id = ?', lease_id)
        before = known['quantity'] if known else Decimal(0)
        if quantity <= before:
            return Decimal(0)
        self.db.execute('INSERT OR REPLACE INTO running_total VALUES (?, ?)', (lease_id, quantity))
        return quantity - before

    def payer(self, lease_id, company, event):
        """Returns the row of the lease or the company that an event is charged to, None if it is not known."""
        if lease_id is not None:
            lease = self.row('SELECT * FROM lease WHERE id = ?', lease_id)
            return lease if lease and (not company or lease['company_id'] in company.values()) else None
        rated = self.rows('SELECT c.* FROM company c JOIN rate r USING (credit_type_id) WHERE r.event = ?', event)
        found = [row for row in rated if row['company_id'] in company.values()]
        return found[0] if len(found) == 1 else None

    # what the control interface asks for

    def add(self, company_id, credit_type_id, amount):
        self.db.execute("INSERT OR IGNORE INTO company VALUES (?, ?, '0', '0', '0')", (company_id, credit_type_id))
        old = self.row('SELECT * FROM company WHERE company_id = ? AND credit_type_id = ?', company_id, credit_type_id)
        self.db.execute(
            'UPDATE company SET total = ?, balance = ? WHERE company_id = ? AND credit_type_id = ?',
            (old['total'] + amount, old['balance'] + amount, company_id, credit_type_id))

    def report(self):
        companies = self.rows('SELECT * FROM company ORDER BY company_id, credit_type_id')
        leases = self.rows('SELECT * FROM lease ORDER BY created_at, id')
        events = self.rows('SELECT * FROM event')
        requests = self.rows('SELECT kind, count(*) AS n FROM request GROUP BY kind ORDER BY kind')

        used = {}
        for event in events:
            if event['charged']:
                payer = event['lease_id'] or (event['company_id'], event['credit_type_id'])
                used[payer] = used.get(payer, 0) + event['cost']
        spread = {(c['company_id'], c['credit_type_id']): c['balance'] + c['used'] for c in companies}
        for lease in leases:
            spread[lease['company_id'], lease['credit_type_id']] += lease['out'] + lease['used']
        consistent = (
            all(lease['granted'] == lease['used'] + lease['released'] + lease['out'] for lease in leases)
            and all(lease['used'] == used.get(lease['id'], 0) and lease['out'] >= 0 for lease in leases)
            and all(c['used'] == used.get((c['company_id'], c['credit_type_id']), 0) for c in companies)
            and all(c['total'] == spread[c['company_id'], c['credit_type_id']] for c in companies))

        return {
            'companies': companies,
            'leases': leases,
            'events': {
                'accepted': len(events),
                'duplicates': sum(event['duplicates'] for event in events),
                'conflicts': sum(event['conflicts'] for event in events),
                'uncharged': sum(not event['charged'] for event in events)},
            'requests': {row['kind']: row['n'] for row in requests},
            'consistent': consistent}


# A request to the API

@dataclasses.dataclass
class Reply:
    status: int
    body: dict | bytes
    headers: dict = dataclasses.field(default_factory=dict)
    chunked: bool = False
    cut: bool = False


class Call:
    """A request: who asks for what, and how it is carried out."""
    routes = ROUTES

    def __init__(self, server, handler, raw):
        self.books = server.books
        self.connection = handler.connection
        self.path = urllib.parse.urlsplit(handler.path).path
        self.key = handler.headers.get('Idempotency-Key')
        self.kind, self.lease_id = self.route(handler.command)
        try:
            self.body = decode(raw)
        except (ValueError, RecursionError):
            self.body = None
        self.events = []
        keys = self.keys(handler)
        self.forbidden = server.forbidden_key in keys
        self.authorized = keys != [] and all(key == server.key for key in keys)

    def keys(self, handler):
        if self.kind != 'events':
            return [handler.headers.get('X-Schematic-Api-Key')]
        if isinstance(self.body, dict) and isinstance(self.body.get('events'), list):
            self.events = [event for event in self.body['events'] if isinstance(event, dict)]
        return [event.pop('api_key', None) for event in self.events]

    def route(self, command):
        for kind, pattern in self.routes.items():
            if command == 'POST' and (found := pattern.fullmatch(self.path)):
                return kind, urllib.parse.unquote(found[1]) if found.groups() else None
        return 'unknown', None

    def slot(self):
        """Returns what only one call at a time is for, and whose it is: companies, as events may be of several."""
        if self.kind == 'events':
            companies = [event['body'].get('company') for event in self.events if isinstance(event.get('body'), dict)]
            named = [name for company in companies if isinstance(company, dict) for name in company.values()]
            return None, {name for name in named if isinstance(name, str)}
        if self.lease_id is not None:
            subject = self.books.row('SELECT * FROM lease WHERE id = ?', self.lease_id)
        else:
            subject = self.body if isinstance(self.body, dict) else None
        if not subject:
            return self.lease_id, set()
        slot = encode([subject.get('company_id'), subject.get('credit_type_id')])
        return slot, {subject['company_id']} if isinstance(subject.get('company_id'), str) else set()

    def perform(self):
        try:
            if self.kind == 'unknown':
                raise Refusal(404, 'there is nothing here')
            if self.forbidden:
                raise Refusal(403, 'the API key has no access')
            if not self.authorized:
                raise Refusal(401, 'the API key is missing or unknown')
            with self.books.transaction():
                return Reply(200, self.carry_out())
        except Refusal as refusal:
            return Reply(refusal.status, self.error(str(refusal)))

    @staticmethod
    def error(text):
        return {'error': text}

    def carry_out(self):
        books = self.books
        if not isinstance(self.body, dict):
            raise Refusal(400, 'the body must be a JSON object')
        if self.kind == 'events':
            if len(self.events) != len(field(self.body, 'events', list, 'a list')):
                raise Refusal(400, 'an event must be an object')
            data = books.track(self.body)
        elif self.kind == 'acquire':
            request = [self.kind, self.body.get('company_id'), self.body.get('credit_type_id')]
            data = books.once(self.key, request, books.acquire, self.body)
        else:
            data = books.once(self.key, [self.kind, self.lease_id], getattr(books, self.kind), self.body, self.lease_id)
        return {'data': data, 'params': {}}


def gone(connection):
    """Returns whether a client has closed its connection, which is all it can do before it has an answer."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


# Faults. Each function returns the reply to send, or None to close the connection without one. The reply it is given
# is None when the request has not been carried out.

def slow(call, fault, reply):
    time.sleep(float(fault['seconds']))
    return reply or call.perform()


def status(call, fault, reply):
    after = fault['retry_after']
    headers = {} if after is None else {'Retry-After': str(after)}
    return Reply(fault['code'], call.error(fault['error']), headers)


def hang(call, fault, reply):
    while not fault.ended.wait(0.05) and not gone(call.connection):
        pass
    return None if gone(call.connection) else reply or call.perform()


def reset(call, fault, reply):
    return dataclasses.replace(reply, cut=True)


def close(call, fault, reply):
    return None


def malformed(call, fault, reply):
    return dataclasses.replace(reply, body=fault['body'].encode())


def mistyped(call, fault, reply):
    if data := reply.body.get('data'):
        if 'value' in fault.options:
            data[fault['field']] = fault['value']
        else:
            data.pop(fault['field'], None)
    return reply


def null_lists(call, fault, reply):
    if data := reply.body.get('data'):
        data |= {'grants': None, 'meta': {'x': [None, {}]}}
        reply.body |= {'params': None, 'warnings': None}
    return reply


def huge(call, fault, reply):
    reply.body['padding'] = 'x' * (int(fault['mib']) << 20)
    return dataclasses.replace(reply, chunked=fault['chunked'])


def late(call, fault, reply):
    expires_at = reply.body.get('data', {}).get('expires_at', '')
    while call.books.now() <= expires_at:
        time.sleep(0.02)
    return reply


def stale_total(call, fault, reply):
    if 'granted_amount' in (data := reply.body.get('data', {})):
        with call.books.transaction():
            data['granted_amount'] = call.books.lease(data['id'])['acquired']
    return reply


def twice(call, fault, reply):
    with fault.lock:
        fault.first = fault.first or reply or call.perform()
    return fault.first


def redirect(call, fault, reply):
    return Reply(302, {}, {'Location': fault['location']})


# The function, and the fields with their defaults; those that happen to a finished reply have no after_effect. The
# ones made by mistyped put a value into a field of the lease; mistyped without a value drops the field. retry_after is
# a number of seconds or the text of a date. hang ends with the fault or the connection. huge is valid JSON, without a
# Content-Length if chunked. late waits until the lease has expired. stale_total answers with what acquire granted.
# twice gives its first reply to each request it hits, and carries out none but that one.
FAULTS = {
    'slow': (slow, {'seconds': 1, 'after_effect': True}),
    'status': (status, {'code': 500, 'retry_after': None, 'error': 'scripted fault', 'after_effect': False}),
    'hang': (hang, {'after_effect': False}),
    'reset': (reset, {}),
    'close': (close, {'after_effect': False}),
    'malformed': (malformed, {'body': '{"data": {"id": '}),
    'mistyped': (mistyped, {'field': 'granted_amount'}),
    'negative': (mistyped, {'field': 'granted_amount', 'value': -1}),
    'absurd': (mistyped, {'field': 'granted_amount', 'value': Decimal('1e40')}),
    'other_company': (mistyped, {'field': 'company_id', 'value': 'another company'}),
    'past_expiry': (mistyped, {'field': 'expires_at', 'value': '2001-01-01T00:00:00Z'}),
    'null_lists': (null_lists, {}),
    'huge': (huge, {'mib': 8, 'chunked': False}),
    'late': (late, {}),
    'stale_total': (stale_total, {}),
    'twice': (twice, {'times': 2, 'after_effect': False}),
    'redirect': (redirect, {'location': '/elsewhere', 'after_effect': False}),
}
COMMON = {'match': 'any', 'company_id': None, 'times': 1, 'probability': 1, 'seed': None}


class Fault:
    faults = FAULTS
    kinds = ROUTES

    def __init__(self, options):
        name = options.get('fault')
        if name not in self.faults:
            raise Refusal(400, f'there is no fault {name}')
        self.name = name
        self.function, defaults = self.faults[name]
        known = {'fault'} | COMMON.keys() | defaults.keys() | ({'value'} if self.function is mistyped else set())
        if unknown := options.keys() - known:
            raise Refusal(400, f'the fault {name} has no field {min(unknown)}')
        self.options = COMMON | defaults | options
        if self['match'] not in {'any', *self.kinds}:
            raise Refusal(400, f'match cannot be {self["match"]}')
        self.left = self['times']
        self.random = random.Random(self['seed'])
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.first = None

    def __getitem__(self, name):
        return self.options[name]

    def hits(self, call, companies):
        if (self['match'] not in ('any', call.kind) or self['company_id'] not in (None, *companies)
                or self.left == 0 or self.random.random() >= self['probability']):
            return False
        if self.left is not None:
            self.left -= 1
        return True

    def happen(self, call):
        reply = call.perform() if self.options.get('after_effect', True) else None
        return self.function(call, self, reply)


# The server

class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256
    books_class = Books
    call_class = Call
    fault_class = Fault

    def __init__(self, options):
        self.books = self.books_class(options)
        self.key = options.key
        self.forbidden_key = options.forbidden_key
        self.tls = None
        if options.tls:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.load_cert_chain(*options.tls)
        self.faults = []
        self.in_flight = {}  # the connections that wait, by kind, slot and number
        super().__init__(('127.0.0.1', options.port), Handler)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # clients may go whenever they like
            super().handle_error(request, client_address)

    def arrive(self, call):
        """Logs a request, counts who else waits for the same thing and picks the fault; call.fault is None without."""
        books = self.books
        with books.transaction():
            slot, companies = call.slot()
            waiting = self.in_flight.setdefault((call.kind, slot), {})
            in_flight = 1 + sum(not gone(connection) for connection in waiting.values())
            call.fault = next((fault for fault in self.faults if fault.hits(call, companies)), None)
            call.n = books.db.execute(
                'INSERT INTO request (at, kind, path, company_id, idempotency_key, authorized, in_flight, fault, body)'
                ' VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)',
                (books.now(), call.kind, call.path, companies.pop() if len(companies) == 1 else None, call.key,
                 call.authorized, in_flight, call.fault and call.fault.name, encode(call.body))).lastrowid
            waiting[call.n] = call.connection
            call.waiting = waiting

    def leave(self, call, reply):
        """Ends what arrive() began; before the reply is sent, so that the client's next call never meets this one."""
        with self.books.transaction():
            del call.waiting[call.n]
            if reply:
                self.books.db.execute('UPDATE request SET status = ? WHERE n = ?', (reply.status, call.n))

    def end_faults(self):
        faults, self.faults = self.faults, []
        for fault in faults:
            fault.ended.set()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def setup(self):
        hello = self.request.recv(1, socket.MSG_PEEK) == b'\x16'
        if self.server.tls and hello:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        self.control_only = self.server.tls and not hello
        super().setup()

    def finish(self):
        super().finish()
        self.connection.close()

    def log_message(self, format, *args):
        pass  # there is /_/requests

    def respond(self):
        raw = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        if self.path.startswith('/_/'):
            self.send(self.control(raw))
        elif self.control_only:
            self.send(Reply(400, {'error': 'plain HTTP request to an HTTPS port'}))
        else:
            self.api(raw)

    do_GET = do_POST = do_PUT = do_DELETE = respond

    def api(self, raw):
        call = self.server.call_class(self.server, self, raw)
        reply = None
        self.server.arrive(call)
        try:
            reply = call.fault.happen(call) if call.fault else call.perform()
        finally:
            self.server.leave(call, reply)
        if reply:
            self.send(reply)
        else:
            self.close_connection = True

    def send(self, reply):
        body = reply.body if isinstance(reply.body, bytes) else encode(reply.body).encode()
        self.send_response(reply.status)
        self.send_header('Content-Type', 'application/json')
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.chunked:
            self.send_header('Transfer-Encoding', 'chunked')
            body = b'%x\r\n%b\r\n0\r\n\r\n' % (len(body), body)
        else:
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if reply.cut:
            self.wfile.write(body[:len(body) // 2])
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            os.close(self.connection.detach())  # resets the connection
            self.close_connection = True
        else:
            self.wfile.write(body)

    def control(self, raw):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        books = self.server.books
        try:
            body = decode(raw or '{}')
            for name in ('amount', 'rate', 'unit'):
                if isinstance(body.get(name), str):
                    body[name] = Decimal(body[name])
            with books.transaction():
                match self.command, url.path:
                    case 'POST' | 'PUT', '/_/balance':
                        books.add(text_field(body, 'company_id'), text_field(body, 'credit_type_id'),
                                  amount_field(body, 'amount', minimum=books.least))
                        return Reply(200, {})
                    case 'POST' | 'PUT', '/_/rate':
                        books.set_rate(text_field(body, 'event'), text_field(body, 'credit_type_id', required=False),
                                       amount_field(body, 'rate', minimum=0),
                                       amount_field(body, 'unit') if body.get('unit') is not None else None)
                        return Reply(200, {})
                    case 'POST', '/_/fault':
                        self.server.faults.append(self.server.fault_class(body))
                        return Reply(200, {})
                    case 'DELETE', '/_/fault':
                        self.server.end_faults()
                        return Reply(200, {})
                    case 'GET', '/_/books':
                        return Reply(200, books.report())
                    case 'GET', '/_/requests':
                        return Reply(200, {'requests': books.requests(int(query.get('since', 0)))})
                    case 'POST', '/_/reset':
                        self.server.end_faults()
                        books.forget()
                        return Reply(200, {})
            return Reply(404, {'error': 'there is nothing here'})
        except Refusal as refusal:
            return Reply(refusal.status, {'error': str(refusal)})
        except (ValueError, decimal.InvalidOperation) as error:
            return Reply(400, {'error': str(error)})


def main(server_class, description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--port', type=int, default=0, help='0 picks a free one')
    parser.add_argument('--port-file', help='gets the port, at once, when the server is ready')
    parser.add_argument('--file', default=':memory:', help='the SQLite file with the state')
    parser.add_argument('--tls', nargs=2, metavar=('CERT', 'KEY'))
    parser.add_argument('--key', default='test-key', help='the API key')
    parser.add_argument('--forbidden-key', default='forbidden-key', help='a known API key that has no access')
    parser.add_argument('--grace', type=float, default=0, metavar='SECONDS',
                        help='how long after its end the unspent part of an expired lease is kept aside')
    parser.add_argument('--clock-offset', type=float, default=0, metavar='SECONDS',
                        help='by how much its clock is ahead')
    options = parser.parse_args()

    # ended at once by either, whatever the parent has made of them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    server = server_class(options)
    port = server.server_address[1]
    if options.port_file:
        with open(f'{options.port_file}.new', 'w') as file:
            file.write(f'{port}\n')
        os.replace(f'{options.port_file}.new', options.port_file)
    print(f'{"https" if options.tls else "http"}://127.0.0.1:{port}', flush=True)
    server.serve_forever()


if __name__ == '__main__':
    main(Server, 'The reference upstream, for tests and the demo.')
